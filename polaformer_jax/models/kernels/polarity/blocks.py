"""The arithmetic of the fused attention on blocks of tokens: plain functions of arrays, the same for all kernels.

A block is (tokens, G): G channels of one example, which are whole heads of `width` channels. Heads are not an axis of
their own: products are of G with G channels, and entries between two heads are set to zero. The sums over keys,
(4, G, G), are

    k+^T v, k-^T v,  and  k+^T 1, k-^T 1, in whose columns the sums of k+ and k- are repeated,

so that numerators and denominators are computed by the same products, each value channel with its own denominator.

Blocks may also be (G, tokens): with `tokens=1`, the axis of tokens, all arrays and products are the transposed ones,
also the (G, G) matrices, and what is (1, G) for each channel is (G, 1). Nothing is transposed in doing so.
Notation is that of `polaformer_jax.models.attention`; `x_bar` is the gradient of x.
"""

import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from polaformer_jax.models.kernels.polarity.taps import Taps
from polaformer_jax.models.layers import accumulation_dtype
from polaformer_jax.models.powers import signed_powers, signed_powers_gradients


class Plan(NamedTuple):
    """How a kernel cuts its arrays into blocks: everything that is static when it is compiled.

    Attributes:
        queries, keys: tokens of an example.
        channels: C.
        group: channels of a block, G, which are whole heads.
        width: channels of a head.
        query_block, key_block: tokens of a block; the last one may end beyond the arrays.
        eps: added to the denominators.
        tokens: the axis of tokens in a block: 0, or 1.
        whole: whether all tokens of an example are in the core's memory at once, and blocks are parts of them.
        taps: those of the values' convolution, if the kernel computes it.
        packs: the gradients that belong together, those of one linear layer: a kernel may leave them in one array.
    """

    queries: int
    keys: int
    channels: int
    group: int
    width: int
    query_block: int
    key_block: int
    eps: float
    tokens: int = 0
    whole: bool = False
    taps: Taps | None = None
    packs: tuple[str, ...] = ("qkvg",)

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array, **cut) -> "Plan":
        """For queries (B, N, C) and keys (B, n, C); `cut` holds the other attributes."""
        _, queries, channels = q.shape
        return cls(queries=queries, keys=k.shape[1], channels=channels, **cut)

    @property
    def query_blocks(self) -> int:
        return pl.cdiv(self.queries, self.query_block)

    @property
    def key_blocks(self) -> int:
        return pl.cdiv(self.keys, self.key_block)


def named(names, refs) -> tuple[types.SimpleNamespace, tuple]:
    """A kernel's inputs by name, and its other references."""
    return types.SimpleNamespace(**dict(zip(names, refs, strict=False))), refs[len(names) :]


def dot(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    """Contracts axis `over[0]` of a with axis `over[1]` of b, both of two axes; at least float32."""
    full = accumulation_dtype(a.dtype)
    exact = jax.lax.Precision.HIGHEST if a.dtype == full else None
    axes = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=full, precision=exact)


def _product(a: jax.Array, b: jax.Array, over: tuple[int, int], tokens: int) -> jax.Array:
    """`dot` where the axis of tokens is 0; where it is 1, of the transposed arrays, (a b)^T = b^T a^T."""
    return dot(b, a, (1 - over[1], 1 - over[0])) if tokens else dot(a, b, over)


def signed(z: jax.Array, p: jax.Array, narrow) -> tuple[jax.Array, jax.Array]:
    """relu(z)^p and relu(-z)^p in the dtype `narrow`."""
    plus, minus = signed_powers(z, p)
    return plus.astype(narrow), minus.astype(narrow)


def matrices(sums, count: jax.Array, width: int, narrow, tokens: int = 0) -> list[jax.Array]:
    """The matrices that q+ and q- are multiplied with: two for the numerators, two for the denominators, each (G, G).

    In the columns of the opposite-signed stream the two are exchanged. The map is its own transpose: applied to
    gradients of its results it gives gradients of the sums.
    """
    row, column = (jax.lax.broadcasted_iota(jnp.int32, sums[0].shape, axis) for axis in (tokens, 1 - tokens))
    one_head = jax.lax.div(row, np.int32(width)) == jax.lax.div(column, np.int32(width))
    same = jax.lax.rem(column, np.int32(width)) < width // 2
    pairs = ((sums[0], sums[1]), (sums[1], sums[0]), (sums[2], sums[3]), (sums[3], sums[2]))
    return [(jnp.where(one_head, jnp.where(same, a, b), 0) / count).astype(narrow) for a, b in pairs]


def key_sums(z, values, there, p, tokens: int = 0) -> list[jax.Array]:
    """What a block adds to the sums over keys. `there`: (tokens, G), ones, and zeros at masked keys, where z is 0."""
    plus, minus = signed(z, p, values.dtype)
    return [_product(keys, columns, (0, 0), tokens) for columns in (values, there) for keys in (plus, minus)]


def streams(plus, minus, m, eps: float, tokens: int = 0) -> tuple[jax.Array, jax.Array]:
    """The outputs of both streams for queries (q+, q-), and the reciprocals of their denominators."""

    def by(of_plus, of_minus):
        return _product(plus, of_plus, (1, 0), tokens) + _product(minus, of_minus, (1, 0), tokens)

    inverse = 1 / (by(m[2], m[3]) + eps)
    return by(m[0], m[1]) * inverse, inverse


def output(z, p, g, u, m, eps: float, tokens: int = 0) -> jax.Array:
    """(o + u) * g of a block of queries, at least float32."""
    full = z.dtype
    return (streams(*signed(z, p, g.dtype), m, eps, tokens)[0] + u.astype(full)) * g.astype(full)


def query_bars(z, s, p, g, u, y_bar, m, eps: float, tokens: int = 0):
    """Gradients of q, g and u of a block, of s and p (1, G), and of `m`, a list."""
    full, narrow = z.dtype, g.dtype
    plus, minus = signed(z, p, narrow)
    o, inverse = streams(plus, minus, m, eps, tokens)
    y_bar = y_bar.astype(full)
    o_bar = y_bar * g.astype(full)
    g_bar = y_bar * (o + u.astype(full))
    numerator_bar, denominator_bar = (o_bar * inverse).astype(narrow), (-o_bar * o * inverse).astype(narrow)

    def by(of_numerator, of_denominator):
        numerators = _product(numerator_bar, of_numerator, (1, 1), tokens)
        return numerators + _product(denominator_bar, of_denominator, (1, 1), tokens)

    bars = by(m[0], m[2]), by(m[1], m[3])
    m_bar = [
        _product(queries, bar, (0, 0), tokens) for bar in (numerator_bar, denominator_bar) for queries in (plus, minus)
    ]
    q_bar, s_bar, p_bar = signed_powers_gradients(z, s, p, *bars, axes=(tokens,))
    return q_bar, g_bar, o_bar, s_bar, p_bar, m_bar


def key_bars(z, s, p, values, there, sums_bar, tokens: int = 0):
    """Gradients of k and v of a block, and of s and p (1, G), from those of the sums over keys."""
    plus, minus = signed(z, p, values.dtype)
    v_bar = _product(plus, sums_bar[0], (1, 0), tokens) + _product(minus, sums_bar[1], (1, 0), tokens)

    def by(of_values, of_ones):
        return _product(values, of_values, (1, 1), tokens) + _product(there, of_ones, (1, 1), tokens)

    bars = by(sums_bar[0], sums_bar[2]), by(sums_bar[1], sums_bar[3])
    k_bar, s_bar, p_bar = signed_powers_gradients(z, s, p, *bars, axes=(tokens,))
    return k_bar, v_bar, s_bar, p_bar
