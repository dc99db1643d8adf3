"""The arithmetic of the fused MLP on blocks of tokens: plain functions of arrays, the same for all kernels.

A block is (tokens, C) if its channels are on `axis` 1, and (C, tokens) if they are on axis 0. Vectors of parameters
have an axis of size 1 for the tokens: gamma, beta and b2 are (1, C) or (C, 1), b1 is (1, H) or (H, 1). The matrices are
always w1 (C, H) and w2 (H, C). The hidden channels are computed a chunk at a time: functions of w1, b1 and w2 take
those of some hidden channels, and what they return for different chunks is added.

Matrices and blocks of tokens are in the dtype of the products; vectors, keep, and all results of products are at least
float32. `x_bar` is the gradient of x.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from polaformer_jax.models.dtypes import accumulation_dtype


class Plan(NamedTuple):
    """How a kernel cuts its arrays into blocks: everything that is static when it is compiled.

    Attributes:
        tokens: of an example, N.
        channels, hidden: C and H.
        block: tokens of a block; the last one may end beyond the arrays.
        chunk: hidden channels that are computed at a time; the last chunk may be smaller.
        axis: of a block's channels: 1, or 0 where tokens are along the last axis.
        eps: added to the variance.
        parts: into which the batch is cut, one for each core.
    """

    tokens: int
    channels: int
    hidden: int
    block: int
    chunk: int
    axis: int
    eps: float
    parts: int = 1

    @property
    def blocks(self) -> int:
        """Blocks of an example."""
        return -(-self.tokens // self.block)

    @property
    def chunks(self) -> list[slice]:
        """The hidden channels of each chunk."""
        return [slice(start, min(start + self.chunk, self.hidden)) for start in range(0, self.hidden, self.chunk)]


def normalised(
    x, gamma, beta, eps: float, axis: int, channels: int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """LayerNorm of x in its dtype, and at least in float32 x without mean, over its deviation, and 1 / deviation.

    `channels`: how many there are, if blocks are larger, with zeros in place of others, in parameters as well.
    """
    full = x.astype(gamma.dtype)
    centred = full - _mean(full, axis, channels)
    if channels is not None:
        centred = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < channels, centred, 0)
    inverse = jax.lax.rsqrt(_mean(centred * centred, axis, channels) + eps)
    standard = centred * inverse
    return (standard * gamma + beta).astype(x.dtype), standard, inverse


def branch(normed, w1, b1, w2, axis: int, erf: Callable = jax.lax.erf) -> jax.Array:
    """gelu(normed w1 + b1) w2, as large as `normed`: what a chunk adds to fc2's product."""
    h = _through(normed, w1, axis) + b1
    return _through((h * _cdf(h, erf)).astype(normed.dtype), w2, axis)


def output(x, branch_sum, b2, keep) -> jax.Array:
    """y from the sum of all chunks."""
    return x.astype(keep.dtype) + scaled(branch_sum + b2, keep)


def scaled(array, keep) -> jax.Array:
    """keep * array, which is zero where keep is: NaN does not go through a dropped branch."""
    return jnp.where(keep == 0, 0, keep * array)


def branch_bars(
    normed, branch_bar, w1, b1, w2, axis: int, erf: Callable = jax.lax.erf
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What a chunk adds to the gradient of `normed`, and its gradients of w1, b1 and w2."""
    narrow = normed.dtype
    h = _through(normed, w1, axis) + b1
    cdf = _cdf(h, erf)
    w2_bar = _outer((h * cdf).astype(narrow), branch_bar, axis)
    density = jnp.exp(-0.5 * h * h) * (1 / math.sqrt(2 * math.pi))
    h_bar = (cdf + h * density) * _back_through(branch_bar, w2, axis)
    b1_bar = jnp.sum(h_bar, axis=1 - axis, keepdims=True)
    h_bar = h_bar.astype(narrow)
    return _back_through(h_bar, w1, axis), _outer(normed, h_bar, axis), b1_bar, w2_bar


def input_bars(
    y_bar, normed_bar, standard, inverse, gamma, axis: int, channels: int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of x, gamma and beta, from that of y and of `normalised`'s results."""
    gamma_bar, beta_bar = (jnp.sum(bar, axis=1 - axis, keepdims=True) for bar in (normed_bar * standard, normed_bar))
    standard_bar = normed_bar * gamma
    along = _mean(standard_bar * standard, axis, channels)
    centred_bar = standard_bar - _mean(standard_bar, axis, channels) - standard * along
    return y_bar.astype(gamma.dtype) + inverse * centred_bar, gamma_bar, beta_bar


def _mean(x, axis: int, channels: int | None) -> jax.Array:
    return jnp.sum(x, axis=axis, keepdims=True) / (channels or x.shape[axis])


def _cdf(h, erf: Callable):
    """Of the normal distribution: gelu(h) = h * cdf(h)."""
    return 0.5 * (1 + erf(h * math.sqrt(0.5)))


def _through(x, w, axis: int) -> jax.Array:
    """x w: from the channels of w's first axis to those of its second."""
    return _dot(x, w, (1, 0)) if axis else _dot(w, x, (0, 0))


def _back_through(y_bar, w, axis: int) -> jax.Array:
    """The gradient of x in x w."""
    return _dot(y_bar, w, (1, 1)) if axis else _dot(w, y_bar, (1, 0))


def _outer(x, y_bar, axis: int) -> jax.Array:
    """The gradient of w in x w: a sum over tokens."""
    return _dot(x, y_bar, (1 - axis, 1 - axis))


def _dot(a, b, over: tuple[int, int]) -> jax.Array:
    """Contracts axis `over[0]` of a with axis `over[1]` of b; at least float32."""
    full = accumulation_dtype(a.dtype)
    exact = jax.lax.Precision.HIGHEST if a.dtype == full else None
    axes = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=full, precision=exact)
