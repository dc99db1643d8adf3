"""How our parameters correspond to the official PyTorch ones: names, and memory layouts.

Module paths are the same on both sides (`layers.0.blocks.1.attn.qkvg`), so only the last part of a name is translated,
and one array layout belongs to each kind. Our names are the paths of the parameter tree, joined by dots.

| kind          | ours                                | official                            |
|---------------|-------------------------------------|-------------------------------------|
| linear        | kernel (in, out)                    | weight (out, in)                    |
| convolution   | kernel (height, width, in, out)     | weight (out, in, height, width)     |
| norms         | scale (C,)                          | weight (C,)                         |
| BatchNorm     | mean, var (C,)                      | running_mean, running_var (C,)      |
| LayerScale    | gamma (1, 1, 1, C)                  | gamma (1, C, 1, 1)                  |
| anything else | bias, power, scale of the attention, position tables: the same name and layout    ||
"""

import re
from typing import NamedTuple

import numpy as np


class Rule(NamedTuple):
    """Suffixes of names, the number of axes they are for, and the permutations of axes in either direction."""

    ours: re.Pattern
    official: re.Pattern
    our_end: str
    official_end: str
    axes: int
    from_official: tuple[int, ...]
    to_official: tuple[int, ...]


def _rule(ours: str, official: str, our_end: str, official_end: str, from_official: tuple[int, ...]) -> Rule:
    inverse = tuple(int(i) for i in np.argsort(from_official))
    return Rule(
        re.compile(ours), re.compile(official), our_end, official_end, len(from_official), from_official, inverse
    )


# The first matching rule is used; parameters that match none keep their name and layout. Only norms have a scale of one
# axis: `attn.scale`, the attention's own parameter, has three.
RULES = (
    _rule(r"(^|\.)scale$", r"(^|\.)weight$", "scale", "weight", (0,)),
    _rule(r"(^|\.)mean$", r"(^|\.)running_mean$", "mean", "running_mean", (0,)),
    _rule(r"(^|\.)var$", r"(^|\.)running_var$", "var", "running_var", (0,)),
    _rule(r"\.gamma_[12]$", r"\.gamma_[12]$", "", "", (0, 2, 3, 1)),
    _rule(r"\.kernel$", r"\.weight$", "kernel", "weight", (1, 0)),
    _rule(r"\.kernel$", r"\.weight$", "kernel", "weight", (2, 3, 1, 0)),
)

# The official models compute these buffers themselves; their checkpoints hold them, but they are not weights.
BUFFERS = ("relative_position_index", "attn_mask", "num_batches_tracked", "angle")
# The official Pola-PVT has a final normalisation that it never calls. Ours has none.
UNUSED = ("norm.weight", "norm.bias")


def _find(name: str, axes: int, side: str) -> Rule | None:
    return next((rule for rule in RULES if rule.axes == axes and getattr(rule, side).search(name)), None)


def official_name(name: str, axes: int) -> str:
    """The official name of our parameter `name` with this number of axes."""
    rule = _find(name, axes, "ours")
    return name if rule is None else name.removesuffix(rule.our_end) + rule.official_end


def our_name(name: str, axes: int) -> str:
    """Our name of the official tensor `name` with this number of axes."""
    rule = _find(name, axes, "official")
    return name if rule is None else name.removesuffix(rule.official_end) + rule.our_end


def official_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The official shape of our parameter `name` of shape `shape`."""
    rule = _find(name, len(shape), "ours")
    return tuple(shape) if rule is None else tuple(shape[axis] for axis in rule.to_official)


def to_official(name: str, array: np.ndarray) -> np.ndarray:
    """Our parameter `name` in the official layout."""
    rule = _find(name, array.ndim, "ours")
    return array if rule is None else array.transpose(rule.to_official)


def from_official(name: str, array: np.ndarray) -> np.ndarray:
    """Our parameter `name` converted from the official layout to ours."""
    rule = _find(name, array.ndim, "ours")
    return array if rule is None else array.transpose(rule.from_official)
