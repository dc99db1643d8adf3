"""The attentions of PolaFormer++: linear and softmax, with rotary positions, a convolution of the values and a gate.

Source: the authors' code, https://github.com/ZacharyMeng/PolaFormerPP. Tokens are (B, N, C), row by row of their grid.
Queries, keys and values are (B, h, N, d).
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from polaformer_jax.models.depthwise import depthwise_conv
from polaformer_jax.models.initializers import normal_init, zeros
from polaformer_jax.models.kernels import placement
from polaformer_jax.models.layers import ConvParams, Grid, accumulation_dtype, linear, product
from polaformer_jax.models.rotary import rotary_tables, rotated

NORMALISER_EPS = 1e-6


def exponential_features(x: jax.Array, exponents: jax.Array | None, *, swapped: bool = False) -> jax.Array:
    """exp([relu(x), relu(-x)] * s) - 1, or with the halves swapped exp([relu(-x), relu(x)] * s) - 1.

    Of the two halves one is zero in each channel, so that one exponential serves both.

    Args:
        x: (..., d), at least float32: the exponential of a number of 16 bits would be wrong by percents.
        exponents: s, (..., 2d), to be broadcast; None: ones.

    Returns:
        (..., 2d) in the dtype of x.
    """
    positive = x > 0
    if swapped:
        positive = ~positive
    size = jnp.abs(x)
    if exponents is not None:
        first, second = jnp.split(exponents.astype(x.dtype), 2, axis=-1)
        size = size * jnp.where(positive, first, second)
    value = jnp.expm1(size)
    return jnp.concatenate([jnp.where(positive, value, 0), jnp.where(positive, 0, value)], axis=-1)


class LinearAttention(nnx.Module):
    """Linear attention of PolaFormer++ (type l), with rotary positions and a gate.

    With s = sigmoid(s1), o = sigmoid(s2), per head, R the rotation of 2d channels by a token's position::

        Qs = exp([q+, q-] * s) - 1     Qo = exp([q-, q+] * o) - 1     K = exp([k+, k-]) - 1       q± = relu(±q)
        y1 = R(Qs) (R(K)^T v1 / N) / (Qs mean_N(K) + 1e-6)            y2: the same of Qo and v2
        y  = proj(([y1, y2] + lepe(v)) * g)                           v1, v2: first and last d/2 channels of v

    One product R(K)^T [v1, v2] serves both streams.
    """

    def __init__(self, dim: int, num_heads: int, *, dtype, param_dtype, rngs):
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.qkvg = linear(dim, 4 * dim, uniform=True, **types)
        self.lepe = ConvParams((5, 5), 1, dim, init=normal_init, param_dtype=param_dtype, rngs=rngs)
        self.proj = linear(dim, dim, uniform=True, **types)
        shape = (1, num_heads, 1, 2 * dim // num_heads)
        self.s1, self.s2 = (zeros(shape, param_dtype=param_dtype, rngs=rngs) for _ in range(2))
        self.num_heads = num_heads

    def features(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Qs, Qo and K of tokens (B, N, C), not rotated: (B, h, N, 2d), at least float32."""
        q, k, _, _ = jnp.split(self.qkvg(x), 4, axis=-1)
        return linear_features(_heads(q, self.num_heads), _heads(k, self.num_heads), self.s1[...], self.s2[...])

    @jax.named_scope("attention")
    def __call__(self, x: jax.Array, grid: Grid) -> jax.Array:
        """(B, N, C) -> (B, N, C)"""
        q, k, v, g = jnp.split(self.qkvg(x), 4, axis=-1)
        heads = (_heads(t, self.num_heads) for t in (q, k, v))
        y = _merged(rotary_linear_attention(*heads, self.s1[...], self.s2[...], grid=grid))
        y = y + depthwise_conv(v, self.lepe.kernel[...], self.lepe.bias[...], grid=grid)
        return self.proj((y * g).astype(x.dtype))


@functools.partial(jax.jit, static_argnames="grid")
def rotary_linear_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, s1: jax.Array, s2: jax.Array, *, grid: Grid
) -> jax.Array:
    """[y1, y2] of `LinearAttention`, before the convolution and the gate.

    Args:
        q, k, v: (B, h, N, d).
        s1, s2: (1, h, 1, 2d).

    Returns:
        (B, h, N, d), at least float32. Zeros give zeros; gradients are finite there.
    """
    narrow, half, shape = q.dtype, q.shape[-1] // 2, q.shape
    # Either way the tokens are axis 1. XLA's CPU back end would transpose for products of each head, a third of the
    # time, where the batch and the heads are not one first axis. On a TPU programs with the tokens before the heads
    # move fewer bytes: 2,154 instead of 3,350 MiB with gradients in stage 2 of `pola_pp_b1`, 64 images.
    on_tpu = placement.for_tpu()
    if on_tpu:
        axes = "bnh"
        q, k, v, s1, s2 = (jnp.swapaxes(x, 1, 2) for x in (q, k, v, s1, s2))
    else:
        axes = "hn"  # h: the heads of all examples
        s1, s2 = (jnp.broadcast_to(s, (shape[0], *s.shape[1:])) for s in (s1, s2))
        q, k, v, s1, s2 = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v, s1, s2))
    each = axes.replace("n", "")

    same, opposite, keys = linear_features(q, k, s1, s2)
    tables = rotary_tables(grid, keys.shape[-1])
    turned = rotated(keys, tables, axis=1).astype(narrow)
    kv = (product(f"{axes}k,{axes}e->{each}ke", turned, v) / shape[2]).astype(narrow)  # 2d x d for each head
    mean = jnp.mean(keys, axis=1)

    def stream(queries, values):
        normaliser = product(f"{axes}k,{each}k->{axes}", queries, mean)[..., None] + NORMALISER_EPS
        turned = rotated(queries, tables, axis=1).astype(narrow)
        return product(f"{axes}k,{each}ke->{axes}e", turned, values) / normaliser

    y = jnp.concatenate([stream(same, kv[..., :half]), stream(opposite, kv[..., half:])], axis=-1)
    return jnp.swapaxes(y, 1, 2) if on_tpu else y.reshape(shape)


def linear_features(q: jax.Array, k: jax.Array, s1: jax.Array, s2: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Qs, Qo and K of `LinearAttention`, not rotated: of (..., d) each (..., 2d), at least float32."""
    full = accumulation_dtype(q.dtype)
    q, k = q.astype(full), k.astype(full)
    same = exponential_features(q, jax.nn.sigmoid(s1))
    return same, exponential_features(q, jax.nn.sigmoid(s2), swapped=True), exponential_features(k, None)


class SoftmaxAttention(nnx.Module):
    """Softmax attention of PolaFormer++ (type v), with rotary positions and a gate."""

    def __init__(self, dim: int, num_heads: int, *, dtype, param_dtype, rngs):
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.qkvo = linear(dim, 4 * dim, uniform=True, **types)
        self.lepe = ConvParams((5, 5), 1, dim, init=normal_init, param_dtype=param_dtype, rngs=rngs)
        self.proj = linear(dim, dim, uniform=True, **types)
        self.num_heads = num_heads

    @jax.named_scope("attention")
    def __call__(self, x: jax.Array, grid: Grid) -> jax.Array:
        """(B, N, C) -> (B, N, C)"""
        q, k, v, g = jnp.split(self.qkvo(x), 4, axis=-1)
        y = _merged(softmax_attention(self.turned(q, grid), self.turned(k, grid), _heads(v, self.num_heads)))
        y = y + depthwise_conv(v, self.lepe.kernel[...], self.lepe.bias[...], grid=grid)
        return self.proj((y * g).astype(x.dtype))

    @jax.named_scope("softmax_attention")
    def turned(self, x: jax.Array, grid: Grid) -> jax.Array:
        """Queries or keys (B, N, C) with rotary positions, (B, h, N, d)."""
        heads = _heads(x, self.num_heads)
        tables = rotary_tables(grid, heads.shape[-1])
        return rotated(heads.astype(accumulation_dtype(x.dtype)), tables).astype(x.dtype)


@jax.jit
def softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(d^-1/2 q k^T) v of each head, (B, h, N, d) each; (B, h, N, d), at least float32."""
    shape = q.shape
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q * shape[-1] ** -0.5, k, v))  # one axis of heads: see above
    scores = product("hqd,hkd->hqk", q, k)
    if placement.for_tpu():  # there gradients of this move fewer bytes
        return product("hqk,hkd->hqd", jax.nn.softmax(scores, axis=-1).astype(q.dtype), v).reshape(shape)
    # Divided after the product: by N d instead of N² numbers.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    y = product("hqk,hkd->hqd", weights.astype(q.dtype), v) / jnp.sum(weights, axis=-1, keepdims=True)
    return y.reshape(shape)


def _heads(x: jax.Array, count: int) -> jax.Array:
    return jnp.swapaxes(x.reshape(*x.shape[:2], count, -1), 1, 2)  # (B, N, C) -> (B, h, N, d)


def _merged(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 1, 2).reshape(x.shape[0], x.shape[2], -1)  # (B, h, N, d) -> (B, N, C)


ATTENTIONS = {"l": LinearAttention, "v": SoftmaxAttention}
