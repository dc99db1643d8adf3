"""Strict exchange of parameters: exactly the expected tensors, all fitting, or one error that lists all problems."""

import mmap
from collections.abc import Collection, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from polaformer_jax.errors import WeightsError
from polaformer_jax.weights import fitting, rules
from polaformer_jax.weights.files import Layout

_LISTED = 8  # names shown of each kind of problem


class Checked(NamedTuple):
    """All tensors that a model needs, under our names and in our layouts.

    Attributes:
        tensors: NumPy arrays, views of what was given where they were not changed.
        changes: what was changed to fit.
        ignored: names of skipped tensors: the official models' buffers, and Pola-PVT's unused `norm`.
    """

    tensors: dict[str, np.ndarray]
    changes: list[fitting.Change]
    ignored: list[str]


def flatten(params: Mapping) -> dict[str, jax.Array]:
    """Nested dicts as one dict, its keys the paths joined by dots: "layers.0.blocks.1.attn.power"."""
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


def check(
    arrays: Mapping[str, object],
    expected: Mapping[str, tuple[int, ...]],
    *,
    layout: Layout,
    fit: Collection[fitting.Fit] = (),
    release: bool = False,
) -> Checked:
    """Selects the tensors that a model needs from `arrays`.

    Args:
        arrays: float arrays in either layout. From the official one, buffers and the `norm` that the official Pola-PVT
            never uses are skipped.
        expected: our shapes by our names.
        fit: which mismatches are fixed, see `fitting.fitted`; none by default.
        release: as for `place`.

    Raises:
        WeightsError: lists all tensors that are missing, unexpected, of a wrong shape or dtype, or not finite.
    """
    fit = (fit,) if isinstance(fit, str) else fit
    if unknown := set(fit) - {"tables", "classifier"}:
        raise ValueError(f"fit holds {', '.join(map(repr, sorted(unknown)))}, expected some of 'tables', 'classifier'")
    names = {
        name: rules.official_name(name, len(shape)) if layout == "torch" else name for name, shape in expected.items()
    }
    ours = {theirs: name for name, theirs in names.items()}
    found, ignored, unexpected = {}, [], []
    for name, array in arrays.items():
        if not isinstance(name, str):
            raise WeightsError(f"the weights have an entry {name!r}, expected names of tensors")
        array = np.asarray(array)
        if name in ours:
            fits = layout == "torch" and array.ndim == len(expected[ours[name]])
            found[ours[name]] = rules.from_official(ours[name], array) if fits else array
        elif layout == "torch" and (name.rsplit(".", 1)[-1] in rules.BUFFERS or name in rules.UNUSED):
            ignored.append(name)
        else:
            unexpected.append(name)
    spare = [name for name in unexpected if "classifier" in fit and name in fitting.OF_CLASSIFIER]
    tensors, changes = fitting.fitted(found, expected, fit, spare={name: np.shape(arrays[name]) for name in spare})
    _raise_misfits(tensors, expected, names, [name for name in unexpected if name not in spare], release)
    return Checked({name: tensors[name] for name in expected}, changes, ignored)


def from_torch(official: Mapping[str, object], like: Mapping) -> dict:
    """Parameters from arrays under the official names and in the official layouts, strictly.

    Args:
        like: a pytree of parameters (or of their shapes and dtypes) that says what is expected.

    Returns:
        A pytree like `like`, each array with the dtype and on the devices of the leaf that it replaces.

    Raises:
        WeightsError: see `check`.
    """
    return place(check(official, shapes(like), layout="torch").tensors, like)


def shapes(like: Mapping) -> dict[str, tuple[int, ...]]:
    """Our names and shapes of a pytree of parameters."""
    return {name: tuple(leaf.shape) for name, leaf in flatten(like).items()}


def place(tensors: Mapping[str, np.ndarray], like: Mapping, *, release: bool = False) -> dict:
    """A pytree like `like`, each array with the dtype and on the devices of the (possibly abstract) leaf it replaces.

    Always copies, since JAX may keep using memory that it is given, and this memory is the caller's or a file's.

    Args:
        release: the tensors are views of a file mapped read-only; its pages are released after each tensor, so that
            the weights are in memory only once.

    Raises:
        WeightsError: a value is too large for the dtype.
    """
    placed = {}
    for name, leaf in flatten(like).items():
        try:
            host = _aligned_copy(tensors[name], leaf.dtype)
        except FloatingPointError as error:
            raise WeightsError(f"{name} holds values too large for the model's type, {leaf.dtype}") from error
        placed[name] = _on_devices(host, getattr(leaf, "sharding", None)).block_until_ready()
        if release:
            _release(tensors[name])
    return unflatten(placed, like)


def _on_devices(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """The array on the default device, or each device's part of it on the devices of `sharding`."""
    if sharding is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _aligned_copy(array: np.ndarray, dtype) -> np.ndarray:
    """A copy aligned to 64 bytes, which JAX on a CPU can use without copying again."""
    size = array.size * jnp.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + size].view(dtype).reshape(array.shape)
    with np.errstate(over="raise"):
        copy[...] = array
    return copy


def _is_finite(array: np.ndarray, release: bool) -> bool:
    finite = bool(np.isfinite(array).all())
    if release:
        _release(array)
    return finite


def _release(array: np.ndarray) -> None:
    """Drops the pages of a mapped file that reading has loaded; they would be read again if needed."""
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    base = base.obj if isinstance(base, memoryview) else base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def _raise_misfits(
    found: Mapping[str, np.ndarray],
    expected: Mapping[str, tuple[int, ...]],
    names: Mapping[str, str],
    unexpected: list[str],
    release: bool,
) -> None:
    """Raises one error, in which tensors have the names and shapes of the file's layout, `names`."""

    def shown(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        same = names[name] == name or len(shape) != len(expected[name])
        return tuple(shape) if same else rules.official_shape(name, shape)

    shared = [name for name in expected if name in found]
    shapes = [
        f"{names[name]} {shown(name, found[name].shape)}, expected {shown(name, expected[name])}"
        for name in shared
        if found[name].shape != tuple(expected[name])
    ]
    types = [
        f"{names[name]} {found[name].dtype}, expected a float type"
        for name in shared
        if not jnp.issubdtype(found[name].dtype, jnp.floating)
    ]
    values = [
        names[name]
        for name in shared
        if jnp.issubdtype(found[name].dtype, jnp.floating) and not _is_finite(found[name], release)
    ]
    kinds = {
        "missing": [names[name] for name in expected if name not in found],
        "unexpected": unexpected,
        "of another shape (another image size, window or number of classes?)": shapes,
        "of another type": types,
        "with values that are not finite (NaN or infinity: the file is broken, or its training diverged)": values,
    }
    lines = [f"  {len(names)} {kind}: {_some(names)}" for kind, names in kinds.items() if names]
    if lines:
        raise WeightsError("\n".join([f"the weights do not fit the model's {len(expected)} tensors:", *lines]))


def _some(names: list[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return "; ".join(names[:_LISTED]) + more
