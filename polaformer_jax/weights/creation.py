"""`create_model`: models by name, or from a file of weights that says which model it holds."""

import logging
import os
from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx

from polaformer_jax.errors import UserError
from polaformer_jax.models import registry
from polaformer_jax.models.registry import Model
from polaformer_jax.weights import hub
from polaformer_jax.weights.files import WeightsFile, read_file
from polaformer_jax.weights.fitting import Fit, summary
from polaformer_jax.weights.identify import identify, num_classes_of
from polaformer_jax.weights.loading import load_weights

log = logging.getLogger(__name__)


def create_model(
    name: str | None = None,
    *,
    weights: Mapping[str, object] | str | os.PathLike | WeightsFile | None = None,
    num_classes: int | None = None,
    img_size: int | None = None,
    drop_path: float | None = None,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    attention_impl: str = "auto",
    rngs: nnx.Rngs | None = None,
    **overrides,
) -> Model:
    """Creates a model by name with random weights, or with the weights of a file.

    Args:
        name: one of `list_models()`; None: the model that the weights file holds; or an address on the Hugging Face Hub
            (`hf://OWNER/REPOSITORY`), which is taken as `weights`.
        weights: whatever `load_weights` takes. Position tables are resized for an `img_size` or windows given here, and
            the classifier is replaced by zeros for a `num_classes` given here; each change is logged as a warning.
        num_classes, img_size, drop_path: None keeps the model's own value (1000 classes), or the file's; with a name
            and a file, the number of classes is the file's, and image size and rate are those of the name.
        dtype: of activations and matrix products; bfloat16 keeps power, normaliser, softmax and logits in float32.
        param_dtype: of the stored parameters.
        attention_impl: how polarity-aware attention and the MLPs are computed, see `polarity_attention` and `Block`.
        rngs: where the initial weights are drawn from; required without `weights`, otherwise unused.
        overrides: any other field of the model's config (`PolaPVTConfig`, `PolaSwinConfig`, `PolaSequenceConfig`).

    Raises:
        UserError: unknown name or argument, a combination that cannot be built, or neither weights nor rngs.
        WeightsError: see `load_weights`; or the file does not say which model it holds, and there is no name.
    """
    if name is not None and hub.is_address(name):
        if weights is not None:
            raise UserError(f"{name} and weights={weights!r} both name weights: give one of them")
        name, weights = None, name
    given = {"num_classes": num_classes, "img_size": img_size, "drop_path": drop_path, **overrides}
    computation = {"dtype": dtype, "param_dtype": param_dtype, "attention_impl": attention_impl}
    if weights is None:
        if rngs is None:
            raise UserError("rngs is None: initial weights are random, so pass rngs=nnx.Rngs(seed), or weights=FILE")
        return registry.create(registry.model_config(_required(name), **given), **computation, rngs=rngs)

    if not isinstance(weights, Mapping | WeightsFile):
        weights = read_file(weights)
    if isinstance(weights, Mapping):
        model = registry.create_abstract(registry.model_config(_required(name), **given), **computation)
    else:
        model, assumed = abstract_model(weights, name, given, **computation)
        for line in (line for line in assumed if not line.startswith("alpha")):  # which load_weights reports
            log.warning("%s does not specify it, so it is assumed: %s", weights.path, line)
    for line in summary(load_weights(model, weights, fit=allowed_fits(given))):
        log.warning("changed to fit the model: %s", line)
    return model


def abstract_model(
    file: WeightsFile, name: str | None, given: Mapping[str, object], **computation
) -> tuple[Model, list[str]]:
    """The abstract model that a file holds (or the named one, if there is a name), and what was assumed.

    Args:
        given: arguments that replace those of the file or the name, as in `create_model`; None replaces nothing.

    Raises:
        UserError: unknown name or argument, a combination that cannot be built.
        WeightsError: the file does not say which model it holds, or no such model can be built.
    """
    if name is not None:
        if given.get("num_classes") is None:
            given = {**given, "num_classes": num_classes_of(file)}
        return registry.create_abstract(registry.model_config(name, **given), **computation), []
    identity = identify(file, img_size=given.get("img_size"))
    return registry.create_abstract(registry.change(identity.config, **given), **computation), identity.assumed


def allowed_fits(given: Mapping[str, object]) -> list[Fit]:
    """What may be changed to fit the arguments given to `create_model`; None counts as not given."""
    changed = {name for name, value in given.items() if value is not None}
    fits = ["tables"] if changed & {"img_size", "window_size", "softmax_window_size"} else []
    return [*fits, "classifier"] if "num_classes" in changed else fits


def _required(name: str | None) -> str:
    if name is None:
        raise UserError(f"name is None: give one of {', '.join(registry.list_models())}, or a file of weights")
    return name
