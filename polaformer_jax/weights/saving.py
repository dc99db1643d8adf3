"""Saves models as `.safetensors` that name their own model, in our layout or the official one."""

import json
import os
from collections.abc import Mapping

from flax import nnx

from polaformer_jax.errors import WeightsError
from polaformer_jax.files import atomic
from polaformer_jax.models import registry
from polaformer_jax.models.segmenter import SegmenterConfig
from polaformer_jax.weights import safetensors_file
from polaformer_jax.weights.files import Layout
from polaformer_jax.weights.metadata import RESERVED, metadata_of
from polaformer_jax.weights.official import to_torch
from polaformer_jax.weights.params import flatten


def save_weights(
    model: nnx.Module,
    path: str | os.PathLike,
    *,
    layout: Layout = "ours",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a model's parameters and its `info` to `path` (`.safetensors`) atomically. The file names its own model.

    Args:
        layout: "ours", or "torch" for the official names and memory layouts, buffers included, which the official model
            loads with `load_state_dict(safetensors.torch.load_file(path), strict=True)`.
        metadata: further strings for the file's header, under other names than those that describe the model; they
            replace what `info` has under the same names.

    Raises:
        WeightsError: the path has another suffix.
        ValueError: metadata that cannot be written.
    """
    if layout not in ("ours", "torch"):
        raise ValueError(f"layout is {layout!r}, expected 'ours' or 'torch'")
    if layout == "torch" and isinstance(model.config, SegmenterConfig):
        raise WeightsError(
            "layout='torch': there is no official code of segmenters to give names and layouts; take 'ours'"
        )
    described = model_metadata(model)
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(f"metadata {key!r}: {value!r}: expected strings")
        if key in RESERVED:
            raise ValueError(f"metadata {key!r}: this name describes the file's content and is reserved")
    arrays = to_torch(model) if layout == "torch" else flatten(nnx.to_pure_dict(nnx.state(model)))
    write_file(path, arrays, layout=layout, metadata={**metadata_of(model.info), **(metadata or {}), **described})


def write_file(
    path: str | os.PathLike, arrays: Mapping[str, object], *, layout: Layout, metadata: Mapping[str, str]
) -> None:
    """Writes arrays of either layout to `path` (`.safetensors`), completely or not at all.

    Raises:
        UserError: the file cannot be written, or has another suffix.
    """
    check_suffix(path)
    with atomic.reported("weights", path):
        safetensors_file.write(path, arrays, {**metadata, "layout": layout})


def check_suffix(path: str | os.PathLike, *, argument: str | None = None) -> None:
    """Raises a WeightsError if the path, which may be the value of an argument, does not end in `.safetensors`."""
    if not os.fspath(path).endswith(".safetensors"):
        name = os.path.basename(os.fspath(path))
        raise WeightsError(f"weights are written as .safetensors, not as {name!r}", argument=argument)


def model_metadata(model: nnx.Module) -> dict[str, str]:
    """What a file says about its model: its registered name if it has one, its family, and its config."""
    config = model.config
    name = registry.name_of(config) or config.family
    return {"model": name, "family": config.family, "arguments": json.dumps(config.to_dict())}
