"""The attentions that polarity-aware attention is compared with: softmax, and linear attention with relu features."""

import jax
import jax.numpy as jnp
from flax import nnx

from polaformer_jax.models.attention import NORMALISER_EPS
from polaformer_jax.models.attention_layers import AttentionLayers, finished
from polaformer_jax.models.head_products import keys_by_values, queries_by_matrices
from polaformer_jax.models.layers import accumulation_dtype, dropout, linear
from polaformer_jax.models.model_config import Checks


class BaselineAttention(AttentionLayers):
    """Softmax or relu attention in the place of the polarity-aware one: all layers around it are the same.

    With queries q, keys k, values v, gates g, and the keys' table of positions E, per head of width d::

        softmax:  o = softmax(q (k + E)^T / √d) v
        relu:     o = relu(q) (relu(k + E)^T v / n) / (relu(q) mean_n(relu(k + E))^T + 1e-6)
        y = (o + conv(v)) * g

    Args:
        kind: "softmax" or "relu".
        layers: see `AttentionLayers`.
    """

    def __init__(self, dim: int, num_heads: int, *, kind: str, **layers):
        checks = Checks("BaselineAttention cannot be built")
        self.kind, self.num_heads = checks.choice("kind", kind, tuple(_KINDS)), num_heads
        super().__init__(dim, num_heads, checks=checks, **layers)

    def _attend(self, x: jax.Array, table: jax.Array, grid: tuple[int, ...], mask: jax.Array | None) -> jax.Array:
        q, k, v, g = self.by_heads(x, table, grid)
        if mask is not None:
            v = jnp.where(mask[:, :, None, None], v, 0)
        o = _KINDS[self.kind](q, k, v, mask=mask).reshape(x.shape).astype(accumulation_dtype(v.dtype))
        kernel, bias = (None, None) if self.dwc is None else (self.dwc.kernel[...], self.dwc.bias[...])
        v = v.reshape(*v.shape[:2], -1)
        return finished(o, v, g, kernel=kernel, bias=bias, grid=grid).astype(v.dtype)

    def by_heads(
        self, x: jax.Array, table: jax.Array, grid: tuple[int, ...] | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """Tokens (B, N, C) -> q (B, N, h, d), k + E and v (B, n, h, d), g (B, N, C)."""
        q, k, v, g = self.project(x, grid)
        k = k + table.astype(k.dtype)
        q, k, v = (part.reshape(*part.shape[:2], self.num_heads, -1) for part in (q, k, v))
        return q, k, v, g


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
        y = _KINDS[self.kind](q, k, v, mask=mask)
        return dropout(self.proj(y.reshape(x.shape)), self.drop_rate, key)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(B, N, C) -> queries, keys and values, (B, N, h, d) each."""
        q, k, v = (part.reshape(*x.shape[:2], self.num_heads, -1) for part in jnp.split(self.qkv(x), 3, axis=-1))
        return q, k, v


@jax.named_scope("softmax_attention")
def softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array | None) -> jax.Array:
    """Softmax attention: q (B, N, h, d), k and v (B, n, h, d); `mask` (B, n) is True at valid keys, None: all are."""
    mask = None if mask is None else mask[:, None, None, :]
    if q.dtype != jnp.float64:
        return jax.nn.dot_product_attention(q, k, v, mask=mask)
    # `jax.nn.dot_product_attention` rounds to float32.
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(q.dtype).min)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)


def _relu(x: jax.Array) -> jax.Array:
    """max(x, 0). The gradient of `jax.nn.relu` is 0 at NaN, and would hide it."""
    return jnp.where(x <= 0, 0, x)


@jax.named_scope("relu_attention")
def relu_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array | None) -> jax.Array:
    """Linear attention with the feature map relu: q (B, N, h, d), k and v (B, n, h, d).

    `mask` (B, n) is True at valid keys; None: all are.
    """
    full = accumulation_dtype(q.dtype)
    q, k = _relu(q), _relu(k)
    if mask is None:
        n = k.shape[1]
    else:
        k = jnp.where(mask[:, :, None, None], k, 0)
        n = jnp.maximum(jnp.sum(mask, axis=1), 1).astype(full).reshape(-1, 1, 1, 1)
    k_mean = jnp.sum(k, axis=1, dtype=full)[..., None] / n  # (B, h, d, 1)
    kv = keys_by_values(k, v) / n  # (B, h, d, d)
    m = jnp.concatenate([kv, k_mean], axis=-1).astype(q.dtype)
    qm = queries_by_matrices(q, m)  # (B, N, h, d + 1)
    return (qm[..., :-1] / (qm[..., -1:] + NORMALISER_EPS)).astype(q.dtype)


_KINDS = {"softmax": softmax_attention, "relu": relu_attention}
