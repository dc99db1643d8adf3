"""The attention matrices of a block, row by row, from its own queries and keys.

Linear attention never forms its weights, but they are well defined: each stream of `polarity_attention` is A v, and row
i of A says how much query token i takes from each key token.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from polaformer_jax.models.attention import NORMALISER_EPS, PolarityAttention
from polaformer_jax.models.attention_layers import AttentionLayers
from polaformer_jax.models.layers import Grid, ResidualBlock, accumulation_dtype, product
from polaformer_jax.models.plain_attention import BaselineAttention
from polaformer_jax.models.rotary import rotary_tables, rotated
from polaformer_jax.models.rotary_attention import LinearAttention, SoftmaxAttention
from polaformer_jax.models.signed_features import signed_features
from polaformer_jax.models.window_attention import SwinBlock

WITHOUT_POWER = ", p = 1"  # what the name of a stream gets where it is measured with the power p = 1


def polarity_weights(q_signed: jax.Array, k_signed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The weights of the same-signed and of the opposite-signed stream.

    Args:
        q_signed: [q+, q-] (B, m, h, 2d) of any m query tokens, as `signed_features` returns them.
        k_signed: [k+, k-] (B, n, h, 2d) of all key tokens.

    Returns:
        Two arrays (B, h, m, n), at least float32.
    """
    width = q_signed.shape[-1] // 2
    k_mean = jnp.mean(k_signed, axis=1, dtype=accumulation_dtype(k_signed.dtype)).astype(k_signed.dtype)  # (B, h, 2d)

    def weights(q):
        normaliser = product("bmhk,bhk->bhm", q, k_mean) + NORMALISER_EPS
        return product("bmhk,bnhk->bhmn", q, k_signed) / k_signed.shape[1] / normaliser[..., None]

    return weights(q_signed), weights(jnp.roll(q_signed, width, axis=-1))  # the halves exchanged: [q-, q+]


def baseline_weights(q: jax.Array, k: jax.Array, kind: str, *, mask: jax.Array | None = None) -> jax.Array:
    """The weights of softmax or relu attention: q (B, m, h, d), k (B, n, h, d) -> (B, h, m, n).

    `mask` (B, n) is True at valid keys, and None if all are; other keys have no weight.
    """
    if kind == "softmax":
        scores = product("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        return jax.nn.softmax(scores, axis=-1, where=None if mask is None else mask[:, None, None, :])
    q, k = jax.nn.relu(q), jax.nn.relu(k)
    if mask is not None:
        k = jnp.where(mask[:, :, None, None], k, 0)
    normaliser = product("bqhd,bhd->bhq", q, jnp.mean(k, axis=1)) + NORMALISER_EPS
    return product("bqhd,bkhd->bhqk", q, k) / k.shape[1] / normaliser[..., None]


def is_linear(block: ResidualBlock) -> bool:
    """Whether a block is of type L, of PolaFormer++ of type l, whatever attention was chosen for these."""
    return isinstance(block.attn, AttentionLayers | LinearAttention)


def has_streams(block: ResidualBlock) -> bool:
    """Whether a block has polarity-aware attention, with its two streams."""
    return isinstance(block.attn, PolarityAttention | LinearAttention)


def rows_of(block: ResidualBlock, x: jax.Array, grid: Grid) -> Callable:
    """A function from the first query token and their number to the rows of the attention matrices, by stream."""
    attn = block.attn
    if isinstance(attn, PolarityAttention):
        return _linear_rows(attn, x)
    if isinstance(attn, BaselineAttention):
        return _baseline_rows(attn, x)
    if isinstance(attn, LinearAttention):
        return _rotary_linear_rows(attn, x, grid)
    if isinstance(attn, SoftmaxAttention):
        return _rotary_softmax_rows(attn, x, grid)
    return _softmax_rows(block, x, grid)


def _rotary_linear_rows(attn: LinearAttention, x: jax.Array, grid: Grid) -> Callable:
    same, opposite, k = attn.features(x)
    tables = rotary_tables(grid, k.shape[-1])
    mean, keys = jnp.mean(k, axis=2), rotated(k, tables)

    def weights(q, start, count):
        turned = jax.lax.dynamic_slice_in_dim(rotated(q, tables), start, count, axis=2)
        q = jax.lax.dynamic_slice_in_dim(q, start, count, axis=2)
        normaliser = product("bhmk,bhk->bhm", q, mean) + NORMALISER_EPS
        return product("bhmk,bhnk->bhmn", turned, keys) / k.shape[2] / normaliser[..., None]

    return lambda start, count: {
        "same": weights(same, start, count),
        "opposite": weights(opposite, start, count),
    }  # (B, h, count, n)


def _rotary_softmax_rows(attn: SoftmaxAttention, x: jax.Array, grid: Grid) -> Callable:
    q, k, _, _ = jnp.split(attn.qkvo(x), 4, axis=-1)
    q, k = (attn.turned(t, grid) for t in (q, k))

    def rows(start, count):
        own = jax.lax.dynamic_slice_in_dim(q, start, count, axis=2)
        return {"softmax": jax.nn.softmax(product("bhqd,bhkd->bhqk", own, k) * q.shape[-1] ** -0.5, axis=-1)}

    return rows


def _linear_rows(attn: PolarityAttention, x: jax.Array) -> Callable:
    q, k = signed_features(
        *attn.project(x)[:2],
        power=attn.power[...],
        scale=attn.scale[...],
        positional_encoding=attn.positional_encoding[...],
        alpha=attn.alpha,
    )

    def rows(start, count):
        same, opposite = polarity_weights(jax.lax.dynamic_slice_in_dim(q, start, count, axis=1), k)
        return {"same": same, "opposite": opposite}  # (B', h, count, n)

    return rows


def _baseline_rows(attn: BaselineAttention, x: jax.Array) -> Callable:
    q, k, _, _ = attn.by_heads(x, attn.positional_encoding[...])

    def rows(start, count):
        own = jax.lax.dynamic_slice_in_dim(q, start, count, axis=1)
        return {attn.kind: baseline_weights(own, k, attn.kind)}  # (B', h, count, n)

    return rows


def _softmax_rows(block: ResidualBlock, x: jax.Array, grid: Grid) -> Callable:
    bias = None
    if isinstance(block, SwinBlock):
        q, k, _ = block.attn.project(x)
        bias = block.attn.bias(block.windows(grid), accumulation_dtype(q.dtype))  # (1, W or 1, h, n, n)
    else:
        q, k, _ = block.attn.project(x, grid)

    def rows(start, count):
        own = jax.lax.dynamic_slice_in_dim(q, start, count, axis=1)
        scores = product("bqhd,bkhd->bhqk", own, k) * q.shape[-1] ** -0.5
        if bias is not None:
            own = jax.lax.dynamic_slice_in_dim(bias, start, count, axis=3)
            scores = (scores.reshape(-1, *own.shape[1:]) + own).reshape(scores.shape)
        return {"softmax": jax.nn.softmax(scores, axis=-1)}  # (B', h, count, n)

    return rows


def row_entropy(weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Entropy, in nats, of rows of non-negative weights, each divided by its sum.

    Args:
        weights: (..., n). Those of PolaFormer++'s linear blocks may be negative, as rotations turn them.

    Returns:
        (...) entropies, 0 for a row of zeros or with negative weights, and whether a row has an entropy.
    """
    total = jnp.sum(weights, axis=-1, keepdims=True)
    seen = (total > 0) & (jnp.min(weights, axis=-1, keepdims=True) >= 0)
    shares = jnp.where(seen, weights / jnp.where(seen, total, 1), 0)
    return jnp.sum(jax.scipy.special.entr(shares), axis=-1), seen[..., 0]
