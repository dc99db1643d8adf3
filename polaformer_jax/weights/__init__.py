"""Weights that people exchange: official PyTorch checkpoints and safetensors, read strictly, and handed back.

`load_weights` and `save_weights` act on a model, `read_file` on a file alone. `check`, `place` and `flatten` act on
pure dicts of parameters (`nnx.to_pure_dict`), which is what training holds.
"""

import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence

from flax import nnx

from polaformer_jax.errors import WeightsError
from polaformer_jax.models import registry
from polaformer_jax.weights import safetensors_file
from polaformer_jax.weights.files import Layout, WeightsFile, read_file
from polaformer_jax.weights.fitting import Change, Fit, summary
from polaformer_jax.weights.identify import Identity, identify, num_classes, stored_arguments
from polaformer_jax.weights.official import in_official_layout, to_torch
from polaformer_jax.weights.params import Checked, check, flatten, from_torch, place, shapes, unflatten
from polaformer_jax.weights.rules import UNUSED

log = logging.getLogger(__name__)

__all__ = [
    "UNUSED",
    "Change",
    "Checked",
    "Fit",
    "Identity",
    "Layout",
    "WeightsError",
    "WeightsFile",
    "check",
    "check_suffix",
    "flatten",
    "from_torch",
    "identify",
    "in_official_layout",
    "load_weights",
    "model_metadata",
    "num_classes",
    "params_from",
    "place",
    "read_file",
    "save_weights",
    "shapes",
    "stored_arguments",
    "summary",
    "to_torch",
    "unflatten",
    "write_file",
]


def load_weights(
    model: nnx.Module, source: Mapping[str, object] | str | os.PathLike | WeightsFile, *, fit: Collection[Fit] = ()
) -> list[Change]:
    """Replaces all parameters of `model`, or none where something does not fit.

    Args:
        source: the path of an official `.pth` checkpoint or of `.safetensors` in either layout; what `read_file`
            returned; or a dict of float arrays under the official PyTorch names and in their layouts (a `state_dict` of
            https://github.com/ZacharyMeng/PolaFormer as NumPy arrays). Values are cast to the type in which the model
            stores its parameters.
        fit: what may be changed to fit, nothing by default. "tables": position tables of another image size or window
            are resized; "classifier": one for another number of classes is replaced by zeros.

    Returns:
        What was changed to fit.

    Raises:
        WeightsError: with every tensor that is missing, unexpected, misshapen or not of a float type; the weights were
            trained with another alpha; or there is no such file, it is of another kind, or it is damaged.
    """
    if not hasattr(model, "arguments"):
        raise TypeError(f"model is a {type(model).__name__}, expected a PolaPVT, PolaSwin or PolaSequence")
    params, changes = params_from(source, nnx.to_pure_dict(nnx.state(model, nnx.Param)), dict(model.arguments), fit=fit)
    nnx.update(model, params)
    return changes


def params_from(
    source: Mapping[str, object] | str | os.PathLike | WeightsFile,
    like: Mapping,
    arguments: Mapping[str, object],
    *,
    fit: Collection[Fit] = (),
) -> tuple[dict, list[Change]]:
    """A tree of parameters like `like`, for the model with these `arguments`, and the changes; see `load_weights`."""
    if isinstance(source, Mapping):
        checked = check(source, shapes(like), layout="torch", fit=fit)
        return place(checked.tensors, like), checked.changes
    file = source if isinstance(source, WeightsFile) else read_file(source)
    known = stored_arguments(file)
    if wrong := [name for name in known if _differ(known[name], arguments.get(name))]:
        listed = ", ".join(f"{name}={known[name]}, and the model has {arguments.get(name)}" for name in wrong)
        raise WeightsError(
            f"{file.path} was trained with {listed}: no shape shows it, and it makes another function. Give the model "
            "what the file has (config.model.alpha, config.task.attention)"
        )
    if "alpha" not in known and "attention" not in known:
        log.warning("%s does not say its alpha; the model's, %s, is taken", file.path, arguments["alpha"])
    try:
        checked = check(file.tensors, shapes(like), layout=file.layout, fit=fit)
        return place(checked.tensors, like, give_back=True), checked.changes
    except WeightsError as error:
        raise WeightsError(f"{file.path}: {error}") from error


def _differ(one: object, other: object) -> bool:
    if isinstance(one, str) or not (isinstance(one, Sequence) and isinstance(other, Sequence)):
        return one != other
    return tuple(one) != tuple(other)


def save_weights(
    model: nnx.Module,
    path: str | os.PathLike,
    *,
    layout: Layout = "ours",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a model's parameters to `path` (`.safetensors`), at once or not at all. The file names its own model.

    Args:
        layout: "ours", or "torch" for the official names and memory layouts, buffers included, which the official
            model takes by `load_state_dict(safetensors.torch.load_file(path), strict=True)`.
        metadata: further strings for the file's header, under other names than those that describe the model.

    Raises:
        WeightsError: the path has another suffix. ValueError: metadata that cannot be written.
    """
    if layout not in ("ours", "torch"):
        raise ValueError(f"layout is {layout!r}, expected 'ours' or 'torch'")
    described = model_metadata(model)
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(f"metadata {key!r}: {value!r}: expected strings")
        if key in described or key in ("format", "layout", "checksum"):
            raise ValueError(f"metadata {key!r}: this name says what the file holds, and is not free")
    arrays = to_torch(model) if layout == "torch" else flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    write_file(path, arrays, layout=layout, metadata={**described, **(metadata or {})})


def write_file(
    path: str | os.PathLike, arrays: Mapping[str, object], *, layout: Layout, metadata: Mapping[str, str]
) -> None:
    """Writes arrays of either layout to `path` (`.safetensors`)."""
    check_suffix(path)
    safetensors_file.write(path, arrays, {**metadata, "layout": layout})


def check_suffix(path: str | os.PathLike) -> None:
    """Raises a WeightsError if this is no name for a file to write."""
    if not os.fspath(path).endswith(".safetensors"):
        raise WeightsError(f"weights are written as .safetensors, not as {os.path.basename(os.fspath(path))!r}")


def model_metadata(model: nnx.Module) -> dict[str, str]:
    """What a file says of its model: its name in the zoo if it has one, its family, and the constructor's arguments."""
    family, arguments = type(model).__name__, dict(model.arguments)
    name = registry.name_of(family, arguments) or family
    return {"model": name, "family": family, "arguments": json.dumps(arguments)}
