"""The two products of linear attention, of each head of each example, in a layout that suits the back end.

Programs of TPUs multiply with the tokens before the heads: in PolaFormer++ that moves fewer bytes (`rotary_attention`).
Others have one axis for the heads of all examples: XLA's CPU back end would otherwise transpose for products of heads.
"""

import jax
import jax.numpy as jnp

from polaformer_jax.models.kernels import placement
from polaformer_jax.models.layers import product


def keys_by_values(k: jax.Array, v: jax.Array) -> jax.Array:
    """k^T v of each head, summed over the tokens: (B, n, h, c) and (B, n, h, e) give (B, h, c, e), at least float32."""
    if placement.for_tpu():
        return product("bnhc,bnhe->bhce", k, v)
    batch, _, heads, channels = k.shape
    return product("xnc,xne->xce", _joined(k), _joined(v)).reshape(batch, heads, channels, v.shape[3])


def queries_by_matrices(q: jax.Array, m: jax.Array) -> jax.Array:
    """q m of each head: (B, N, h, c) and (B, h, c, e) give (B, N, h, e), at least float32."""
    if placement.for_tpu():
        return product("bnhc,bhce->bnhe", q, m)
    batch, tokens, heads, _ = q.shape
    y = product("xnc,xce->xne", _joined(q), m.reshape(batch * heads, *m.shape[2:]))
    return jnp.swapaxes(y.reshape(batch, heads, tokens, m.shape[3]), 1, 2)


def _joined(x: jax.Array) -> jax.Array:
    """(B, n, h, c) -> (B h, n, c)"""
    batch, tokens, heads, channels = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(batch * heads, tokens, channels)
