"""Our own weights files: safetensors, parameters under their paths, and a tag that says so."""

import json
import os
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from polaformer_jax import atomic
from polaformer_jax.weights.params import WeightsError

FORMAT = "polaformer_jax/1"

# safetensors.numpy writes bfloat16, and cannot read it.
_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.dtype("bfloat16")}


def write(path: str | os.PathLike, flat: Mapping[str, object], *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes arrays to `path`, a `.safetensors` file, at once or not at all: aside first, then renamed.

    Args:
        path: local or in a bucket (`gs://`). Its folder is made where it lacks.
        metadata: further strings for the file's header.
    """
    path = epath.Path(path)
    if path.suffix != ".safetensors":
        raise WeightsError(f"weights are written as .safetensors, not as {path.name!r}")
    content = safetensors.numpy.save(
        {name: np.ascontiguousarray(array) for name, array in flat.items()}, {**(metadata or {}), "format": FORMAT}
    )
    atomic.write(path, content)


def read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the metadata of a file that `write` wrote.

    Raises:
        WeightsError: there is no such file, it is of another kind, or it is damaged.
    """
    path = epath.Path(path)
    if path.suffix != ".safetensors":
        raise WeightsError(
            f"cannot read {path}: expected our own .safetensors. For an official checkpoint (.pth), pass a dict of its "
            "arrays under their official names instead of the path"
        )
    if not path.exists():
        raise WeightsError(f"there is no weights file {path}")
    content = path.read_bytes()
    try:
        arrays = {name: _array(**view) for name, view in safetensors.deserialize(content)}
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise WeightsError(f"{path} is damaged, or no safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise WeightsError(
            f"{path} has the format tag {metadata.get('format')!r}, expected {FORMAT!r}: save_weights did not write "
            "it. If it holds official tensors, pass them as a dict under their official names instead of the path"
        )
    return arrays, metadata


def _array(*, dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    return np.frombuffer(data, _TYPES[dtype]).reshape(shape)
