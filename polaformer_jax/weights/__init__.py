"""Weights that people exchange: read strictly, under official or our own names, and written as safetensors.

`load_weights` and `save_weights` act on a model. `from_torch`, `from_ours` and `flatten` act on a pure dict of
parameters (`nnx.to_pure_dict`), which is what training holds; `read` and `write` are the files.
"""

import os
from collections.abc import Mapping

from flax import nnx

from polaformer_jax.weights.files import FORMAT, read, write
from polaformer_jax.weights.params import WeightsError, flatten, from_ours, from_torch

__all__ = [
    "FORMAT",
    "WeightsError",
    "flatten",
    "from_ours",
    "from_torch",
    "load_weights",
    "read",
    "save_weights",
    "write",
]


def load_weights(model: nnx.Module, source: Mapping[str, object] | str | os.PathLike) -> None:
    """Replaces all parameters of `model`, or none where something does not fit.

    Args:
        source: a dict of float arrays under the official PyTorch names and in their layouts (a `state_dict` of
            https://github.com/ZacharyMeng/PolaFormer as NumPy arrays), or the path of a `.safetensors` file that
            `save_weights` wrote. Values are cast to the type in which the model stores its parameters.

    Raises:
        WeightsError: with every tensor that is missing, unexpected, misshapen or not of a float type; or there is no
            such file, it is of another kind, or it is damaged.
    """
    like = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    if isinstance(source, Mapping):
        params = from_torch(source, like)
    else:
        params = from_ours(read(source)[0], like)
    nnx.update(model, params)


def save_weights(
    model: nnx.Module | Mapping, path: str | os.PathLike, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes the parameters to `path` (`.safetensors`) under our names and layouts, at once or not at all.

    Args:
        model: a model, or a pure dict of its parameters.
        metadata: further strings for the file's header.
    """
    params = model if isinstance(model, Mapping) else nnx.to_pure_dict(nnx.state(model, nnx.Param))
    write(path, flatten(params), metadata=metadata)
