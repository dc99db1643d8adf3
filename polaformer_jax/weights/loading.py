"""Loads weights into models, strictly: all parameters or none."""

import dataclasses
import logging
import os
from collections.abc import Collection, Mapping, Sequence

from flax import nnx

from polaformer_jax.errors import WeightsError
from polaformer_jax.models import registry
from polaformer_jax.models.model_config import ModelConfig
from polaformer_jax.models.model_info import ModelInfo
from polaformer_jax.models.segmenter import SegmenterConfig
from polaformer_jax.weights.files import WeightsFile, read_file
from polaformer_jax.weights.fitting import CLASSIFIERS, Change, Fit
from polaformer_jax.weights.identify import STATED, stored_arguments
from polaformer_jax.weights.params import check, place, shapes

log = logging.getLogger(__name__)

_MEASURED = ("accuracy", "accuracy_top5", "loss", "max_accuracy")  # of the facts in a file


def load_weights(
    model: nnx.Module, source: Mapping[str, object] | str | os.PathLike | WeightsFile, *, fit: Collection[Fit] = ()
) -> list[Change]:
    """Replaces all parameters of `model`, and its `info`, or nothing if anything does not fit.

    Args:
        source: the path of an official `.pth` checkpoint or of `.safetensors` in either layout; what `read_file`
            returned; or a dict of float arrays under the official PyTorch names and in their layouts (a `state_dict` of
            https://github.com/ZacharyMeng/PolaFormer as NumPy arrays). Values are cast to the dtype in which the model
            stores its parameters.
        fit: what may be changed to fit; nothing by default. "tables": position tables of another image size or window
            are resized; "classifier": one for another number of classes is replaced by zeros.

    Returns:
        What was changed to fit.

    Raises:
        WeightsError: lists every tensor that is missing, unexpected, of another shape, not of a float type or not
            finite; the weights were trained with another alpha; or there is no such file, it is of another kind, or it
            is damaged.
    """
    registry.check_model(model)
    file = source if isinstance(source, Mapping | WeightsFile) else read_file(source)
    info = ModelInfo() if isinstance(file, Mapping) else file.info
    params, changes = params_from(file, nnx.to_pure_dict(nnx.state(model)), model.config, fit=fit)
    nnx.update(model, params)
    model.info = fitted_info(info, model.config, changes, fit)
    return changes


def fitted_info(info: ModelInfo, config: ModelConfig, changes: Sequence[Change], fit: Collection[Fit]) -> ModelInfo:
    """What still holds of a file's info for a model whose weights were changed to fit."""
    if changes:  # it was not this model that was measured
        facts = {name: value for name, value in info.facts.items() if name not in _MEASURED}
        info = dataclasses.replace(info, facts=facts)
    if any(change.name in CLASSIFIERS for change in changes):
        info = dataclasses.replace(info, class_names=None)
    if "tables" in fit and info.preprocess is not None and info.preprocess["crop"] != getattr(config, "img_size", None):
        info = dataclasses.replace(info, preprocess=None)
    return info


def params_from(
    source: Mapping[str, object] | str | os.PathLike | WeightsFile,
    like: Mapping,
    config: ModelConfig,
    *,
    fit: Collection[Fit] = (),
) -> tuple[dict, list[Change]]:
    """A pytree of parameters like `like`, for a model of this `config`, and the changes; see `load_weights`."""
    if isinstance(source, Mapping):
        checked = check(source, shapes(like), layout="torch", fit=fit)
        return place(checked.tensors, like), checked.changes
    file = source if isinstance(source, WeightsFile) else read_file(source)
    family = family_of(file) or (None if config.family == SegmenterConfig.family else config.family)
    if family != config.family:
        held = f"the weights of a {family}" if family else "a classifier"
        way = ""
        if config.family == SegmenterConfig.family and family not in (None, "PolaSequence"):
            way = "; a training starts its backbone from it (init.weights); or load_weights(model.backbone, ...)"
        raise WeightsError(f"{file.path} holds {held}, and the model is a {config.family}{way}")
    known, expected = stored_arguments(file), _acting(config)
    if wrong := [name for name in known if name in expected and _differ(known[name], expected[name])]:
        listed = ", ".join(
            f"{name}={_shown(known[name])}, and the model has {_shown(expected[name])}" for name in wrong
        )
        raise WeightsError(
            f"{file.path} was trained with {listed}: the model would compute another function. Give the model the"
            f" file's value ({', '.join(f'config.model.{name}' for name in wrong)}, or an argument of create_model)"
        )
    if "attention" not in known:
        attention = expected.get("attention", "polarity")
        if attention != "polarity":
            log.warning("%s does not specify the attention; the model's, %s, is used", file.path, attention)
        elif "alpha" in expected and "alpha" not in known:
            log.warning("%s does not specify alpha; the model's value %s is used", file.path, expected["alpha"])
    try:
        checked = check(file.tensors, shapes(like), layout=file.layout, fit=fit, release=True)
        return place(checked.tensors, like, release=True), checked.changes
    except WeightsError as error:
        raise WeightsError(f"{file.path}: {error}") from error


def family_of(file: WeightsFile) -> str | None:
    """The family that a file names; None where it names none, as official checkpoints."""
    return file.metadata.get("family")


def _acting(config: ModelConfig) -> dict[str, object]:
    """The arguments that files state, as a model has them; without those that have no effect in it."""
    config = config.backbone if isinstance(config, SegmenterConfig) else config
    values = {name: getattr(config, name) for name in STATED if hasattr(config, name)}
    if values.get("attention", "polarity") != "polarity":
        values.pop("alpha", None)
    used = config.architecture()
    return {name: value for name, value in values.items() if used.get(name, value) is not None}


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _differ(one: object, other: object) -> bool:
    if isinstance(one, str) or not (isinstance(one, Sequence) and isinstance(other, Sequence)):
        return one != other
    return tuple(one) != tuple(other)
