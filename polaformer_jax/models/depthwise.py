"""The depthwise convolution of the attention's values, in the best form for each back end, and their upsampling."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from polaformer_jax.models.layers import accumulation_dtype, keeping_arguments


def upsample_tokens(v: jax.Array, tokens: int) -> jax.Array:
    """Linear interpolation along the token axis to `tokens` tokens, at least v's n (align_corners false).

    The official model interpolates spatially reduced values along the flattened token axis, not on the 2-D grid; that
    is odd, but kept here. Where there are r n tokens, token m*r + t is at m + (t + 1/2)/r - 1/2, so that its weights
    depend only on t.
    """
    batch, keys, channels = v.shape
    if tokens % keys:
        return _upsample_by_index(v, tokens)
    ratio = tokens // keys
    if ratio == 1:
        return v
    offset = (np.arange(ratio) + 0.5) / ratio - 0.5
    weight = [
        jnp.asarray(w, v.dtype).reshape(1, 1, ratio, 1)
        for w in (np.maximum(-offset, 0), 1 - np.abs(offset), np.maximum(offset, 0))
    ]
    edges = jnp.concatenate([v[:, :1], v, v[:, -1:]], axis=1)[:, :, None]  # (B, n + 2, 1, C)
    upsampled = sum(edges[:, i : i + keys] * w for i, w in enumerate(weight))  # (B, n, r, C)
    return upsampled.reshape(batch, tokens, channels)


def _upsample_by_index(v: jax.Array, tokens: int) -> jax.Array:
    """`upsample_tokens` to any number of tokens."""
    keys = v.shape[1]
    position = np.clip((np.arange(tokens) + 0.5) * keys / tokens - 0.5, 0, keys - 1)
    before = np.floor(position).astype(int)
    weight = jnp.asarray(position - before, v.dtype).reshape(1, -1, 1)
    return v[:, before] * (1 - weight) + v[:, np.minimum(before + 1, keys - 1)] * weight


@jax.named_scope("depthwise_conv")
def depthwise_conv(x: jax.Array, kernel: jax.Array, bias: jax.Array, *, grid: tuple[int, ...]) -> jax.Array:
    """Depthwise convolution with zero padding that keeps the size, one kernel shared by all heads.

    Args:
        x: (B, N, C).
        kernel: (size, ..., 1, d) with one spatial axis for each axis of `grid`.
        bias: (d,).

    Returns:
        (B, N, C), at least float32.
    """
    kernel, bias = of_all_heads(x, kernel, bias)
    return _depthwise(_on_grid(x, grid).astype(kernel.dtype), kernel).reshape(x.shape) + bias


def of_all_heads(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Kernel (size, ..., C) and bias (1, 1, C) for all channels of x, at least float32."""
    full, heads = accumulation_dtype(x.dtype), x.shape[-1] // kernel.shape[-1]
    kernel = kernel.reshape(*kernel.shape[:-2], -1)
    return jnp.tile(kernel.astype(full), heads), jnp.tile(bias.astype(full), heads).reshape(1, 1, -1)


def _on_grid(x: jax.Array, grid: tuple[int, ...]) -> jax.Array:
    return x.reshape(x.shape[0], *grid, x.shape[-1])  # (B, N, C) -> (B, *grid, C)


@functools.partial(jax.jit, static_argnames="grid")
@jax.named_scope("depthwise_conv")
def rounded_depthwise_conv(x: jax.Array, kernel: jax.Array, bias: jax.Array, *, grid: tuple[int, ...]) -> jax.Array:
    """`depthwise_conv` rounded to the dtype of x, which has gradients only: for kernels, which take it so.

    On TPUs the result and the gradient of x are rounded before they go to memory. Without being told, XLA writes what
    its convolutions return, at least float32, and rounds in the next operation: more than twice the bytes.
    """
    return _rounded(_on_grid(x, grid), *of_all_heads(x, kernel, bias)).reshape(x.shape)


@jax.custom_vjp
def _rounded(x, kernel, bias):
    # On the grid, not on tokens: XLA would change the layout between the two before it rounds.
    bias = bias.reshape(*(1 for _ in x.shape[1:]), -1)
    return _in_memory((_depthwise(x.astype(kernel.dtype), kernel) + bias).astype(x.dtype))


def _rounded_fwd(x, kernel, bias):
    return _rounded(x, kernel, bias), (x, kernel)


def _rounded_bwd(residuals, gradient):
    x, kernel = residuals
    gradient = gradient.astype(kernel.dtype)
    x_bar, kernel_bar = jax.vjp(_depthwise, x.astype(kernel.dtype), kernel)[1](gradient)
    bias_bar = jnp.sum(gradient, axis=tuple(range(gradient.ndim - 1))).reshape(1, 1, -1)
    return _in_memory(x_bar.astype(x.dtype)), kernel_bar, bias_bar


_rounded.defvjp(_rounded_fwd, _rounded_bwd)


def _in_memory(x: jax.Array) -> jax.Array:
    """x, which programs for TPUs write to memory in this very dtype."""
    return jax.lax.platform_dependent(x, tpu=jax.lax.optimization_barrier, default=lambda x: x)


@jax.custom_jvp
def _depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves x (B, *grid, C) with kernel (*sizes, C).

    Each back end uses the method that moves the fewest bytes or is fastest there. TPU programs of a grouped convolution
    move 0.75 of the bytes of shifted products, also with gradients.
    """
    return jax.lax.platform_dependent(x, kernel, tpu=grouped_convolution, default=shifted_products)


@_depthwise.defjvp
def _depthwise_jvp(primals, tangents):
    return _depthwise(*primals), _depthwise_tangent(*primals, *tangents)


@keeping_arguments
def _depthwise_tangent(x, kernel, x_tangent, kernel_tangent):
    """What the tangents add to the result, computed so that the transpose is the fastest form of the gradients."""

    def by(of_x, of_kernel):
        return lambda x, kernel, x_tangent, kernel_tangent: of_x(x_tangent, kernel) + of_kernel(x, kernel_tangent)

    return jax.lax.platform_dependent(
        x,
        kernel,
        x_tangent,
        kernel_tangent,
        tpu=by(grouped_convolution, grouped_convolution),
        cuda=by(spread_products, shifted_products),
        default=by(spread_products, looped_products),
    )


def grouped_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution of `lax`, with one group for each channel."""
    spatial = "DHW"[3 - len(x.shape[1:-1]) :]
    return jax.lax.conv_general_dilated(
        x,
        jnp.expand_dims(kernel, -2),
        window_strides=(1,) * len(spatial),
        padding="SAME",
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=x.shape[-1],
        precision=jax.lax.Precision.HIGHEST,  # a TPU would round the operands to bfloat16
    )


def shifted_products(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A sum of shifted products, which XLA fuses into one pass over x.

    On a CPU a grouped convolution of `lax` takes 4 to 39 times as long, and 6 to 7 times with its gradients (2 cores,
    5x5 kernel; 14x14 tokens of 320 channels, and 56x56 of 64: `docs/development.md`).
    """
    padded = _padded(x, kernel.shape[:-1])
    # Summed row by row: this compiles to faster code than one chain.
    return sum(sum(_window(padded, tap, x.shape) * weight for tap, weight in row) for row in _rows(kernel))


def spread_products(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`shifted_products`, summed from what each element of x adds to its neighbours.

    Its transpose in x is a sum of shifted products; that of `shifted_products` pads and adds an array for each tap.
    """
    sizes = kernel.shape[:-1]

    def spread(row, x):
        sides = [[(size - 1 - start, start) for start, size in zip(tap, sizes, strict=True)] for tap, _ in row]
        return sum(_pad(x * weight, around) for (_, weight), around in zip(row, sides, strict=True))

    # Each row is a function by itself, so that the transpose is summed row by row as well.
    total = sum(jax.jit(functools.partial(spread, row))(x) for row in _rows(kernel))
    return _window(total, [size - 1 - size // 2 for size in sizes], x.shape)


def looped_products(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`shifted_products` in a loop over the taps: its transpose in the kernel is a loop as well.

    On a CPU that takes a half to a third of the time of the sum's transpose, and half the time to compile. A tap's
    gradient is a sum over all tokens: parts of the grid are added to each other where they are multiplied, and what is
    left is summed by a matrix product with ones, which takes a third to two thirds of the time of a plain sum. Without
    the loop XLA's programs for GPUs compute several taps in one pass, directly from bfloat16: for an H100 they move a
    quarter of the bytes.
    """
    sizes = kernel.shape[:-1]
    padded = _padded(x, sizes)
    starts = np.array([(0, *tap, 0) for tap in np.ndindex(*sizes)], np.int32)
    parts = _parts(x.shape[1])
    shape = (x.shape[0], x.shape[1] // parts, *x.shape[2:])
    firsts = np.zeros((parts, x.ndim), np.int32)  # where each part begins
    firsts[:, 1] = np.arange(parts) * shape[1]
    ones = jnp.ones((math.prod(shape[:-1]), 1), x.dtype)

    @keeping_arguments  # and not a shifted x for each tap
    def add(totals, tap):
        start, weight = tap
        spread = (ones @ weight[None]).reshape(shape)
        shifted = (jax.lax.dynamic_slice(padded, list(start + first), shape) for first in firsts)
        return [total + part * spread for total, part in zip(totals, shifted, strict=True)], None

    totals = [jnp.zeros(shape, x.dtype)] * parts
    totals, _ = jax.lax.scan(add, totals, (jnp.asarray(starts), kernel.reshape(len(starts), -1)))
    return jnp.concatenate(totals, axis=1)


def _parts(length: int) -> int:
    """Into how many equal parts an axis is cut: the divisor next to 6, at most 16; more take longer to compile."""
    divisors = [n for n in range(1, min(length, 16) + 1) if length % n == 0]
    return min(divisors, key=lambda n: abs(n - 6))


def _rows(kernel: jax.Array) -> list[list[tuple[tuple[int, ...], jax.Array]]]:
    """The taps of each row of the kernel: their indices, and their weights (1, ..., 1, C)."""
    sizes = kernel.shape[:-1]
    taps, row = list(np.ndindex(*sizes)), sizes[-1]
    weights = jax.lax.split(kernel.reshape(len(taps), *(1 for _ in sizes), -1), [1] * len(taps))
    weighted = list(zip(taps, weights, strict=True))
    return [weighted[start : start + row] for start in range(0, len(taps), row)]


def _pad(x: jax.Array, around: Sequence[tuple[int, int]]) -> jax.Array:
    """Zeros before and after each axis of the grid."""
    return jax.lax.pad(x, np.zeros((), x.dtype), [(0, 0, 0), *((*sides, 0) for sides in around), (0, 0, 0)])


def _padded(x: jax.Array, sizes: Sequence[int]) -> jax.Array:
    return _pad(x, [(size // 2, size // 2) for size in sizes])


def _window(x: jax.Array, start: Sequence[int], shape: tuple[int, ...]) -> jax.Array:
    """The part of x that has this shape and begins, along the axes of the grid, at `start`."""
    corner = (0, *start, 0)
    return jax.lax.slice(x, corner, np.add(corner, shape))
