"""The feature maps of polarity-aware attention, [relu(z)^p, relu(-z)^p] of rescaled queries and keys, as arrays."""

import jax
import jax.numpy as jnp

from polaformer_jax.models.layers import accumulation_dtype, keeping_arguments
from polaformer_jax.models.powers import signed_powers


def signed_features(
    q: jax.Array,
    k: jax.Array,
    *,
    power: jax.Array,
    scale: jax.Array,
    positional_encoding: jax.Array,
    alpha: float,
) -> tuple[jax.Array, jax.Array]:
    """[q+, q-] (B, N, h, 2d) and [k+, k-] (B, n, h, 2d) of `polarity_attention`, in the dtype of `q`."""
    s, p = rescaling(power, scale, alpha, accumulation_dtype(q.dtype))
    return signed_feature_map(q, None, s, p), signed_feature_map(k, positional_encoding, s, p)


def rescaling(power: jax.Array, scale: jax.Array, alpha: float, full) -> tuple[jax.Array, jax.Array]:
    """s and p, (h, d)."""
    _, heads, _, width = power.shape
    s = jax.nn.softplus(scale.astype(full)).reshape(heads, width)
    return s, (1 + alpha * jax.nn.sigmoid(power.astype(full))).reshape(heads, width)


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    return x.reshape(*x.shape[:2], heads, -1)  # (B, N, C) -> (B, N, h, d)


@keeping_arguments
def signed_feature_map(x: jax.Array, offset: jax.Array | None, s: jax.Array, p: jax.Array) -> jax.Array:
    """[relu(z)^p, relu(-z)^p] of z = (x + offset) / s, in the dtype of x.

    At z = 0 both are zero, and so are their gradients, as p >= 1. Where z is NaN, both are.

    Args:
        x: (B, N, C).
        offset: (1, N, C), None for zeros.
        s, p: (h, d).

    Returns:
        (B, N, h, 2d)
    """
    z = _rescaled(x, offset, s)
    return jnp.concatenate(signed_powers(z, p[None, None]), axis=-1).astype(x.dtype)


def _rescaled(x: jax.Array, offset: jax.Array | None, s: jax.Array) -> jax.Array:
    """(B, N, C) -> (B, N, h, d), at least float32."""
    x = x.astype(s.dtype)
    if offset is not None:
        x = x + offset.astype(s.dtype)
    return split_heads(x, s.shape[0]) / s[None, None]
