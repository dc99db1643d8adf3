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

from polaformer_jax.models.interpolation import interpolation_weights

Fit = Literal["tables", "classifier"]

# How each kind of table is resized. The official model interpolates `pos_embed` in its forward pass, bilinearly.
_BICUBIC = ("positional_encoding", "relative_position_bias_table", "absolute_pos_embed")
_BILINEAR = re.compile(r"pos_embed\d")
# Layers with an output for each class: a classifier, and those of a segmenter's heads.
CLASSIFIERS = ("head", "decode_head.conv_seg", "auxiliary_head.conv_seg")
_HEAD = ("head.kernel", "head.weight", "head.bias")  # under our names and the official ones
# What a model without classifier does not have: PolaFormer++ also leaves out the projection before it.
_PROJECTION = ("proj.kernel", "proj.weight", "proj.bias")
_ITS_NORM = ("norm.scale", "norm.weight", "norm.bias", "norm.mean", "norm.var", "norm.running_mean", "norm.running_var")
OF_CLASSIFIER = (*_HEAD, *_PROJECTION, *_ITS_NORM)


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
                    method = "bilinear" if _BILINEAR.fullmatch(name.rsplit(".", 1)[-1]) else "bicubic"
                    sides = " to ".join("x".join([str(_side(array.shape))] * 2) for array in (found[name], resized))
                    changes.append(Change(name, f"resized from {sides} ({method})"))
    if "classifier" in allowed:
        if spare:
            changes.append(Change("head", f"classifier of shape {max(spare.values(), key=len)}: omitted"))
        for layer in CLASSIFIERS:
            replaced, change = _classifier(layer, found, expected)
            tensors |= replaced
            changes += change
    return tensors, sorted(changes)


def _classifier(
    layer: str, found: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, np.ndarray], list[Change]]:
    """Zeros in place of a layer with an output for each class, if it has others than expected, or is missing."""
    wanted = [name for name in (f"{layer}.kernel", f"{layer}.weight", f"{layer}.bias") if name in expected]
    if all(name in found and found[name].shape == tuple(expected[name]) for name in wanted):
        return {}, []
    bias = f"{layer}.bias"
    dtype = found[bias].dtype if bias in found else np.float32
    before = f"{found[bias].size} classes" if bias in found else "no classifier"
    change = Change(layer, f"{before}: replaced by zeros for {expected[bias][0]} classes")
    return {name: np.zeros(expected[name], dtype) for name in wanted}, [change]


def resize_table(name: str, table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """A position table resized to `shape` as PyTorch's `interpolate` does it; None where that does not apply.

    See `models.interpolation`. Computed in float64.

    Args:
        table: (1, n, C), or (n, heads) of a relative position bias, with n a square number, also in `shape`.
    """
    leaf = name.rsplit(".", 1)[-1]
    if leaf in _BICUBIC:
        method = "bicubic"
    elif _BILINEAR.fullmatch(leaf):
        method = "bilinear"
    else:
        return None
    if table.ndim != len(shape) or table.shape[:-2] != shape[:-2] or table.shape[-1] != shape[-1]:
        return None
    side, new_side = _side(table.shape), _side(shape)
    if side is None or new_side is None:
        return None
    weights = interpolation_weights(side, new_side, method)  # (new, old)
    image = np.asarray(table, np.float64).reshape(side, side, table.shape[-1])
    return np.einsum("ai,bj,ijc->abc", weights, weights, image, optimize=True).reshape(shape).astype(table.dtype)


def _side(shape: tuple[int, ...]) -> int | None:
    side = math.isqrt(shape[-2])
    return side if side and side * side == shape[-2] else None
