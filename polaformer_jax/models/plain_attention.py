"""The attentions that polarity-aware attention is compared with: softmax, and linear attention with relu features."""

import jax
import jax.numpy as jnp
from flax import nnx

from polaformer_jax.models.attention import NORMALISER_EPS
from polaformer_jax.models.layers import accumulation_dtype, dropout, linear, product


class PlainAttention(nnx.Module):
    """Attention of the kind "softmax", or "relu": linear attention with one feature map.

    With relu, o = relu(q) (relu(k)^T v / n) / (relu(q) mean(relu(k))^T + 1e-6), without polarity, power, gate or
    convolution.
    """

    def __init__(self, dim: int, num_heads: int, *, kind: str, drop_rate: float, **types):
        self.qkv = linear(dim, 3 * dim, **types)
        self.proj = linear(dim, dim, **types)
        self.kind, self.num_heads, self.drop_rate = kind, num_heads, drop_rate

    @jax.named_scope("attention")
    def __call__(self, x: jax.Array, key: jax.Array | None = None, *, mask: jax.Array) -> jax.Array:
        """(B, N, C) -> (B, N, C); `mask` (B, N) is True at valid tokens."""
        q, k, v = self.project(x)
        if self.kind == "softmax":
            y = softmax_attention(q, k, v, mask=mask)
        else:
            y = relu_attention(q, k, v, mask=mask)
        return dropout(self.proj(y.reshape(x.shape)), self.drop_rate, key)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(B, N, C) -> queries, keys and values, (B, N, h, d) each."""
        q, k, v = (part.reshape(*x.shape[:2], self.num_heads, -1) for part in jnp.split(self.qkv(x), 3, axis=-1))
        return q, k, v


@jax.named_scope("softmax_attention")
def softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array) -> jax.Array:
    """Softmax attention, (B, N, h, d) each; `mask` (B, N) is True at valid keys."""
    mask = mask[:, None, None, :]
    if q.dtype != jnp.float64:
        return jax.nn.dot_product_attention(q, k, v, mask=mask)
    # `jax.nn.dot_product_attention` rounds to float32.
    scores = jnp.where(mask, jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5, jnp.finfo(q.dtype).min)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)


def _relu(x: jax.Array) -> jax.Array:
    """max(x, 0). The gradient of `jax.nn.relu` is 0 at NaN, and would hide it."""
    return jnp.where(x <= 0, 0, x)


@jax.named_scope("relu_attention")
def relu_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array) -> jax.Array:
    """Linear attention with the feature map relu, (B, N, h, d) each; `mask` (B, N) is True at valid keys."""
    full = accumulation_dtype(q.dtype)
    q, k = _relu(q), jnp.where(mask[:, :, None, None], _relu(k), 0)
    n = jnp.maximum(jnp.sum(mask, axis=1), 1).astype(full).reshape(-1, 1, 1, 1)
    k_mean = jnp.sum(k, axis=1, dtype=full)[..., None] / n  # (B, h, d, 1)
    kv = product("bnhk,bnhe->bhke", k, v) / n  # (B, h, d, d)
    m = jnp.concatenate([kv, k_mean], axis=-1).astype(q.dtype)
    qm = product("bnhk,bhke->bnhe", q, m)  # (B, N, h, d + 1)
    return (qm[..., :-1] / (qm[..., -1:] + NORMALISER_EPS)).astype(q.dtype)
