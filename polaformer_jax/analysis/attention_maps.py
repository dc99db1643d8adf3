"""Where a block looks: its attention weights, recovered from its own queries and keys.

Linear attention never forms its weights, but `attention_rows` does. This module adds up their rows, several at a time,
and places them on the image.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from polaformer_jax.analysis.attention_rows import is_linear, row_entropy, rows_of
from polaformer_jax.errors import UserError
from polaformer_jax.models.backbone import Backbone
from polaformer_jax.models.layers import Grid, ResidualBlock
from polaformer_jax.models.model_config import STRIDES
from polaformer_jax.models.window_attention import SwinBlock

STREAMS = ("same", "opposite", "relu", "softmax")
_ENTRIES = 1 << 22  # attention weights held at once, of each stream


@dataclasses.dataclass(frozen=True)
class Stream:
    """One attention of a block.

    Attributes:
        weights: (batch, heads, height, width) on the grid of the keys: a row of the attention matrix, or the mean of
            its rows. Softmax rows sum to 1. A row of a linear stream sums to s / (s + 1e-6), where s is the normaliser
            without its 1e-6: mostly just below 1, less where queries and keys hardly overlap, and 0 where they do not.
        entropy: (batch, heads) in nats, of the row divided by its sum; averaged over the rows where `weights` is.
            Rows of zeros, and those with negative weights (of PolaFormer++'s linear blocks), have no entropy and are
            not counted; NaN if there are no others.
    """

    weights: np.ndarray
    entropy: np.ndarray


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
    """Where one block looks.

    Attributes:
        stage, block: which block, counted from 0.
        streams: "same" (same-signed) and "opposite" (opposite-signed) of a polarity-aware block, "softmax" of a softmax
            block, "relu" of linear attention with that feature map.
        uniform_entropy: log n, the entropy of a token that attends equally to all n keys within its reach.
    """

    stage: int
    block: int
    streams: Mapping[str, Stream]
    uniform_entropy: float


def attention_maps(
    model: Backbone,
    images: jax.Array,
    *,
    stage: int,
    block: int = -1,
    token: tuple[int, int] | None = None,
) -> AttentionMaps:
    """Where a block of a model looks in each image.

    The weights are the model's own, formed from its queries and keys: for a linear block, with Q = [q+, q-],
    Q' = [q-, q+], K = [k+, k-] as in `polarity_attention`::

        A_same[i, j]     = (Q_i  K_j / n) / (Q_i  mean_n(K) + 1e-6)        A_same v1 is the same-signed stream,
        A_opposite[i, j] = (Q'_i K_j / n) / (Q'_i mean_n(K) + 1e-6)        A_opposite v2 the opposite-signed one.

    Windows of Pola-Swin are placed at their positions in the image, their cyclic shift undone: a token has weights
    within its window, and zeros elsewhere. Takes time O(N n) for N query and n key tokens, and memory O(N + n).

    Args:
        images: normalised, as the model takes them.
        stage, block: counted from 0, or from the end where negative.
        token: (row, column) of the query token on the stage's grid of (img_size / stride)² tokens, strides 4, 8, 16,
            32; None averages over all query tokens.

    Raises:
        ValueError: the stage, block or token does not exist, or the images do not fit the model.
    """
    if not isinstance(model, Backbone):
        raise UserError(f"the model is a {type(model).__name__}, expected an image model: maps are drawn over images")
    stage, block = resolve_block(model, stage, block)
    side = model.config.img_size // STRIDES[stage]
    members = members_of(model.blocks(stage)[block], (side, side))
    window = position = None
    if token is not None:
        row, column = resolve_token(token, side)
        window, position = np.argwhere(members == row * side + column)[0]

    graphdef, params = nnx.split(model)
    sums = jax.device_get(
        _sums(graphdef, nnx.to_pure_dict(params), jnp.asarray(images), position, stage=stage, block=block)
    )
    keys = next(iter(sums.values())).rows.shape[-1]
    if keys != members.shape[1]:  # spatially reduced keys have their own grid
        members = np.arange(keys)[None]
    return AttentionMaps(
        stage=stage,
        block=block,
        streams={name: _placed(sums[name], members, window, queries=side**2) for name in STREAMS if name in sums},
        uniform_entropy=math.log(keys),
    )


def last_linear_block(model: Backbone) -> tuple[int, int]:
    """(stage, block) of the last block of type L, or of type S if there is no L.

    Blocks of a single token, which has nothing to choose from, are returned only if there are no others.
    """

    def rank(place: tuple[int, int]) -> tuple:
        stage, block = place
        return model.config.img_size > STRIDES[stage], is_linear(model.blocks(stage)[block]), place

    return max(((i, j) for i in range(len(STRIDES)) for j in range(len(model.blocks(i)))), key=rank)


def resolve_block(model: Backbone, stage: int, block: int) -> tuple[int, int]:
    """Stage and block counted from 0.

    Raises:
        ValueError: the stage, or the block in it, does not exist.
    """
    stage = _index("stage", stage, len(STRIDES), f"{type(model).__name__} has {len(STRIDES)} stages")
    depth = len(model.blocks(stage))
    return stage, _index("block", block, depth, f"stage {stage} has {depth} block{'' if depth == 1 else 's'}")


def resolve_token(token: tuple[int, int], side: int) -> tuple[int, int]:
    """(row, column) counted from 0.

    Raises:
        ValueError: the token is not a pair, or not on a grid of side x side tokens.
    """
    grid = f"the stage's grid has {side}x{side} tokens"
    if len(token) != 2:
        raise ValueError(f"token {token!r}: expected (row, column); {grid}")
    return _index("token row", token[0], side, grid), _index("token column", token[1], side, grid)


def _index(what: str, value: int, count: int, available: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = count
    if not -count <= number < count:
        raise ValueError(
            f"{what} {value!r}: expected an integer from 0 to {count - 1} (or -1 for the last one): {available}"
        )
    return number % count


class _Sums(NamedTuple):
    """Sums over query tokens, for each window of each image."""

    rows: jax.Array  # (B, windows, h, n) of the rows of the attention matrix
    entropy: jax.Array  # (B, windows, h) of the entropies of the rows that are not all zero
    counted: jax.Array  # (B, windows, h) the number of those rows


@functools.partial(jax.jit, static_argnames=("graphdef", "stage", "block"))
def _sums(graphdef, params, images: jax.Array, position, *, stage: int, block: int) -> dict[str, _Sums]:
    """Sums by stream: over all query tokens, or, if `position` is given, over that one token of each window."""
    model = nnx.merge(graphdef, params)
    chosen = model.blocks(stage)[block]
    # (B * windows, N / windows, C); one window, but for Pola-Swin
    grid = (images.shape[1] // STRIDES[stage], images.shape[2] // STRIDES[stage])
    x = chosen.attention_input(model.tokens_before(images, stage=stage, block=block), grid)
    tokens = x.shape[1]
    rows = rows_of(chosen, x, grid)

    def sums(start, count):
        return {name: _summed(weights) for name, weights in rows(start, count).items()}

    if position is not None:
        total = sums(position, 1)
    else:
        entries = max(weights.size for weights in jax.eval_shape(lambda: rows(0, 1)).values())
        count = max(c for c in range(1, tokens + 1) if tokens % c == 0 and (c == 1 or c * entries <= _ENTRIES))
        first = sums(0, count)

        def add(total, start):
            return jax.tree.map(jnp.add, total, sums(start, count)), None

        total, _ = jax.lax.scan(add, first, jnp.arange(count, tokens, count))
    return jax.tree.map(lambda a: a.reshape(images.shape[0], -1, *a.shape[1:]), total)


def _summed(weights: jax.Array) -> _Sums:
    entropy, seen = row_entropy(weights)  # (B', h, m) each
    return _Sums(jnp.sum(weights, axis=2), jnp.sum(entropy, axis=-1), jnp.sum(seen, axis=-1))


def members_of(block: ResidualBlock, grid: Grid) -> np.ndarray:
    """(windows, tokens of a window): the index of each token in the image. Raises a UserError for padded windows."""
    if not isinstance(block, SwinBlock):
        return np.arange(grid[0] * grid[1])[None]
    if (windows := block.windows(grid)).is_padded:
        raise UserError(
            f"windows of {block.window}x{block.window} tokens do not divide the {grid[0]}x{grid[1]} of their stage, and"
            " padded windows have no maps: choose another block, or another img_size"
        )
    return windows.members


def _placed(sums: _Sums, members: np.ndarray, window: int | None, *, queries: int) -> Stream:
    """A stream on the whole grid: the row of one query token, which is in `window`, or the mean of all rows."""
    rows, entropy, counted = sums
    batch, _, heads, _ = rows.shape
    here = slice(None) if window is None else slice(window, window + 1)
    weights = np.zeros((batch, heads, members.size), rows.dtype)
    weights[:, :, members[here]] = rows[:, here].transpose(0, 2, 1, 3)  # (B, h, windows, n)
    if window is None:
        weights /= queries
    entropy, counted = entropy[:, here].sum(axis=1), counted[:, here].sum(axis=1)  # (B, h)
    side = math.isqrt(members.size)
    return Stream(
        weights=weights.reshape(batch, heads, side, side),
        entropy=np.where(counted > 0, entropy / np.maximum(counted, 1), np.nan).astype(rows.dtype),
    )
