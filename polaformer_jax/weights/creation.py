"""Models made by name, or from a file of weights that says which model it holds."""

import logging
import os
from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx

from polaformer_jax import weights as weights_room
from polaformer_jax.errors import UserError, WeightsError
from polaformer_jax.models import registry
from polaformer_jax.models.pola_pvt import PolaPVT
from polaformer_jax.models.pola_sequence import PolaSequence
from polaformer_jax.models.pola_swin import PolaSwin

log = logging.getLogger(__name__)


def create_model(
    name: str | None = None,
    *,
    weights: Mapping[str, object] | str | os.PathLike | weights_room.WeightsFile | None = None,
    num_classes: int | None = None,
    img_size: int | None = None,
    drop_path: float | None = None,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    attention_impl: str = "auto",
    rngs: nnx.Rngs | None = None,
    **overrides,
) -> PolaPVT | PolaSwin | PolaSequence:
    """A model of the zoo with fresh weights, or with those of a file.

    Args:
        name: one of `list_models()`; None: the model that the file of weights holds.
        weights: whatever `load_weights` takes. Position tables are resized for an `img_size` or windows given here, and
            the classifier replaced by zeros for a `num_classes` given here; each change is logged as a warning.
        num_classes, img_size, drop_path: None keeps the model's own (1000 classes), or the file's; with a name and a
            file, the classes are the file's, and image size and rate those of the name.
        dtype: of the computation; bfloat16 keeps power, normaliser, softmax and logits in float32.
        param_dtype: of the stored parameters.
        attention_impl: how polarity-aware attention is computed, see `polarity_attention`.
        rngs: where the initial weights come from; needed without `weights`, and else not used.
        overrides: any argument of the constructor (`PolaPVT`, `PolaSwin`, `PolaSequence`), by its own name.

    Raises:
        ValueError: unknown name or argument, a combination that cannot be built, or neither weights nor rngs.
        WeightsError: see `load_weights`; or the file does not say which model it holds, and there is no name.
    """
    if weights is not None and not isinstance(weights, Mapping | weights_room.WeightsFile):
        weights = weights_room.read_file(weights)
    given = {"num_classes": num_classes, "img_size": img_size, "drop_path": drop_path, **overrides}
    types = {"dtype": dtype, "param_dtype": param_dtype, "attention_impl": attention_impl}
    if weights is None:
        if rngs is None:
            raise UserError("rngs is None: initial weights are drawn, so pass rngs=nnx.Rngs(seed), or weights=FILE")
        family, settings = registry.lookup(_named(name))
        return family(**registry.resolve(family, settings, **given), **types, rngs=rngs)

    if isinstance(weights, Mapping):
        family, settings = registry.lookup(_named(name))
        model = abstract(family, registry.resolve(family, settings, **given), **types)
    else:
        model, assumed = abstract_of(weights, name, given, **types)
        for line in (line for line in assumed if not line.startswith("alpha")):  # of which load_weights tells
            log.warning("%s does not say, so it is assumed: %s", weights.path, line)
    for line in weights_room.summary(weights_room.load_weights(model, weights, fit=fit_for(given))):
        log.warning("changed to fit the model: %s", line)
    return model


def abstract(family: type, arguments: Mapping[str, object], **types) -> PolaPVT | PolaSwin | PolaSequence:
    """A model whose parameters are shapes and types alone."""
    return nnx.eval_shape(lambda: family(**arguments, **types, rngs=nnx.Rngs(0)))


def abstract_of(
    file: weights_room.WeightsFile, name: str | None, given: Mapping[str, object], **types
) -> tuple[PolaPVT | PolaSwin | PolaSequence, list[str]]:
    """The model that a file holds (or the named one, if there is a name), without values, and what was assumed.

    Args:
        given: arguments that take the place of the file's or the name's, as `create_model` has them; None is nothing.

    Raises:
        ValueError: unknown name or argument, a combination that cannot be built.
        WeightsError: the file does not say which model it holds, or no such model can be built.
    """
    if name is not None:
        family, settings = registry.lookup(name)
        if given.get("num_classes") is None:
            given = {**given, "num_classes": weights_room.num_classes(file)}
        return abstract(family, registry.resolve(family, settings, **given), **types), []
    identity = weights_room.identify(file, img_size=given.get("img_size"))
    family = registry.FAMILIES[identity.family]
    try:
        abstract(family, registry.resolve(family, identity.arguments))
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{file.path} holds tensors of a model that cannot be: {error}") from error
    return abstract(family, registry.resolve(family, identity.arguments, **given), **types), identity.assumed


def fit_for(given: Mapping[str, object]) -> list[weights_room.Fit]:
    """What may be changed to fit the arguments that were given, as `create_model` has them; None is nothing."""
    changed = {name for name, value in given.items() if value is not None}
    fit = ["tables"] if changed & {"img_size", "window_size", "softmax_window_size"} else []
    return [*fit, "classifier"] if "num_classes" in changed else fit


def _named(name: str | None) -> str:
    if name is None:
        raise UserError(f"name is None: give one of {', '.join(registry.list_models())}, or a file of weights")
    return name
