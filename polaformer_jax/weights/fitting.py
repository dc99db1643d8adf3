"""Adapts weights to another image size or number of classes, as the official fine-tuning does.

Position tables of another grid are resized; a classifier for other classes starts from zeros. Every such change is
reported, and nothing else is changed.
"""

import collections
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np

Fit = Literal["tables", "classifier"]

# How each kind of table is resized. The official model interpolates `pos_embed` in its forward pass, bilinearly.
_BICUBIC = ("positional_encoding", "relative_position_bias_table", "absolute_pos_embed")
_BILINEAR = re.compile(r"pos_embed\d")
CLASSIFIER = ("head.kernel", "head.weight", "head.bias")  # under our names and the official ones
# What a model without classifier does not have: PolaFormer++ also leaves out the projection before it.
_PROJECTION = ("proj.kernel", "proj.weight", "proj.bias")
_ITS_NORM = ("norm.scale", "norm.weight", "norm.bias", "norm.mean", "norm.var", "norm.running_mean", "norm.running_var")
OF_CLASSIFIER = (*CLASSIFIER, *_PROJECTION, *_ITS_NORM)


class Change(NamedTuple):
    """One tensor that was changed or omitted."""

    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


def summary(changes: Iterable[Change]) -> list[str]:
    """One line for each kind of change, with the number of tensors."""
    kinds = collections.Counter((change.name.rsplit(".", 1)[-1], change.what) for change in changes)
    return [f"{count} x {leaf}: {what}" if count > 1 else f"{leaf}: {what}" for (leaf, what), count in kinds.items()]


def fitted(
    found: Mapping[str, np.ndarray],
    expected: Mapping[str, tuple[int, ...]],
    allowed: Collection[Fit],
    *,
    spare: Mapping[str, tuple[int, ...]],
) -> tuple[dict[str, np.ndarray], list[Change]]:
    """The tensors, with those of another shape changed as far as `allowed`, and the changes.

    Args:
        found, expected: tensors and shapes under our names. What cannot be changed is returned as found.
        allowed: "tables": position tables of another grid are resized; "classifier": one for another number of classes
            is replaced by zeros, or omitted where the model has none.
        spare: shapes of a classifier that the file has and the model does not.
    """
    tensors, changes = dict(found), []
    if "tables" in allowed:
        for name in found.keys() & expected.keys():
            if (shape := tuple(expected[name])) != found[name].shape:
                if (resized := resize_table(name, found[name], shape)) is not None:
                    tensors[name] = resized
                    method = "bilinear" if _BILINEAR.fullmatch(name) else "bicubic"
                    sides = " to ".join("x".join([str(_side(array.shape))] * 2) for array in (found[name], resized))
                    changes.append(Change(name, f"resized from {sides} ({method})"))
    if "classifier" in allowed:
        wanted = [name for name in CLASSIFIER if name in expected]
        if spare:
            changes.append(Change("head", f"classifier of shape {max(spare.values(), key=len)}: omitted"))
        elif any(name not in found or found[name].shape != tuple(expected[name]) for name in wanted):
            dtype = found["head.bias"].dtype if "head.bias" in found else np.float32
            tensors |= {name: np.zeros(expected[name], dtype) for name in wanted}
            before = f"{found['head.bias'].size} classes" if "head.bias" in found else "no classifier"
            changes.append(Change("head", f"{before}: replaced by zeros for {expected['head.bias'][0]} classes"))
    return tensors, sorted(changes)


def resize_table(name: str, table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """A position table resized to `shape` as PyTorch's `interpolate` does it; None where that does not apply.

    Bicubic uses the coefficient a = -0.75, bilinear is the standard one; neither antialiases when shrinking, corners
    are not aligned, and edges are repeated. `jax.image.resize` differs in all of these. Computed in float64.

    Args:
        table: (1, n, C), or (n, heads) of a relative position bias, with n a square number, also in `shape`.
    """
    leaf = name.rsplit(".", 1)[-1]
    if leaf in _BICUBIC:
        kernel = _cubic
    elif _BILINEAR.fullmatch(name):
        kernel = _linear
    else:
        return None
    if table.ndim != len(shape) or table.shape[:-2] != shape[:-2] or table.shape[-1] != shape[-1]:
        return None
    side, new_side = _side(table.shape), _side(shape)
    if side is None or new_side is None:
        return None
    weights = _weights(side, new_side, kernel)  # (new, old)
    image = np.asarray(table, np.float64).reshape(side, side, table.shape[-1])
    return np.einsum("ai,bj,ijc->abc", weights, weights, image, optimize=True).reshape(shape).astype(table.dtype)


def _side(shape: tuple[int, ...]) -> int | None:
    side = math.isqrt(shape[-2])
    return side if side and side * side == shape[-2] else None


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    x = np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _linear(distance: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, 1 - np.abs(distance))


def _weights(size: int, new_size: int, kernel) -> np.ndarray:
    """(new_size, size) the weight of each old position in a new one; beyond the edge, the edge's value is repeated."""
    centre = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    weights = np.zeros((new_size, size))
    for offset in (-1, 0, 1, 2):
        position = np.floor(centre).astype(int) + offset
        np.add.at(weights, (np.arange(new_size), np.clip(position, 0, size - 1)), kernel(centre - position))
    return weights
