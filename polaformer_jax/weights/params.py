"""Strict exchange of parameters: every tensor is there and fits, and nothing is left over, or one error says what."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from polaformer_jax.errors import UserError
from polaformer_jax.weights import rules

_LISTED = 8  # names shown of each kind of problem


class WeightsError(UserError):
    """Weights that do not fit the model, or a file that holds none."""


def flatten(params: Mapping) -> dict[str, jax.Array]:
    """A tree of nested dicts as one dict, its keys the paths joined by dots: "layers.0.blocks.1.attn.power"."""
    flat = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{path}": leaf for path, leaf in flatten(value).items()})
        else:
            flat[str(key)] = value
    return flat


def unflatten(flat: Mapping[str, object], like: Mapping) -> dict:
    """The inverse of `flatten`, with the structure of `like` (whose lists have integer keys)."""

    def build(tree: Mapping, prefix: str) -> dict:
        return {
            key: build(value, f"{prefix}{key}.") if isinstance(value, Mapping) else flat[f"{prefix}{key}"]
            for key, value in tree.items()
        }

    return build(like, "")


def from_torch(official: Mapping[str, object], like: Mapping) -> dict:
    """Parameters from arrays under the official names and in the official layouts.

    The buffers that official checkpoints hold, and the `norm` that the official Pola-PVT never uses, are passed over.

    Args:
        official: float arrays. like: a tree of parameters (or of their shapes and types) that says what is expected.

    Returns:
        A tree like `like`, each array in the type and on the devices of the one that it stands for.

    Raises:
        WeightsError: with all that is missing, unexpected or of a wrong shape or type.
    """
    wanted = flatten(like)
    names = {name: rules.official_name(name, leaf.ndim) for name, leaf in wanted.items()}
    expected = {names[name]: rules.official_shape(name, leaf.shape) for name, leaf in wanted.items()}
    extra = [name for name in official if name not in expected and not _is_ignored(name)]
    _check(official, expected, extra)
    return unflatten(
        {
            name: _like(rules.from_official(name, np.asarray(official[names[name]])), leaf)
            for name, leaf in wanted.items()
        },
        like,
    )


def from_ours(flat: Mapping[str, object], like: Mapping) -> dict:
    """Parameters from arrays under our own names and layouts, as `flatten` gives them. Strict, as `from_torch` is."""
    wanted = flatten(like)
    _check(flat, {name: leaf.shape for name, leaf in wanted.items()}, [name for name in flat if name not in wanted])
    return unflatten({name: _like(np.asarray(flat[name]), leaf) for name, leaf in wanted.items()}, like)


def _is_ignored(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in rules.BUFFERS or name in rules.UNUSED


def _check(found: Mapping[str, object], expected: Mapping[str, tuple[int, ...]], unexpected: list[str]) -> None:
    shared = [name for name in expected if name in found]
    shapes = [
        f"{name} {tuple(np.shape(found[name]))}, expected {tuple(expected[name])}"
        for name in shared
        if tuple(np.shape(found[name])) != tuple(expected[name])
    ]
    types = [
        f"{name} {np.asarray(found[name]).dtype}, expected a float type"
        for name in shared
        if not jnp.issubdtype(np.asarray(found[name]).dtype, jnp.floating)
    ]
    kinds = {
        "missing": [name for name in expected if name not in found],
        "unexpected": unexpected,
        "of another shape (another image size, window or number of classes?)": shapes,
        "of another type": types,
    }
    lines = [f"  {len(names)} {kind}: {_some(names)}" for kind, names in kinds.items() if names]
    if lines:
        raise WeightsError("\n".join([f"the weights do not fit the model's {len(expected)} tensors:", *lines]))


def _some(names: list[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return "; ".join(names[:_LISTED]) + more


def _like(array: np.ndarray, leaf) -> jax.Array:
    array = np.ascontiguousarray(array).astype(leaf.dtype)
    return jax.device_put(array, leaf.sharding) if isinstance(leaf, jax.Array) else jnp.asarray(array)
