"""The depthwise convolution of the attention's values, in the best form for each back end, and their upsampling."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from polaformer_jax.models.layers import accumulation_dtype


def upsample_tokens(v: jax.Array, tokens: int) -> jax.Array:
    """Linear interpolation along the token axis to `tokens` tokens, a multiple r of v's n (align_corners false).

    The official model interpolates spatially reduced values along the flattened token axis, not on the 2-D grid; that
    is odd, but kept here. Token m*r + t is at m + (t + 1/2)/r - 1/2, so its weights depend only on t.
    """
    batch, keys, channels = v.shape
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


def depthwise_conv(x: jax.Array, kernel: jax.Array, bias: jax.Array, *, grid: tuple[int, ...]) -> jax.Array:
    """Depthwise convolution with zero padding that keeps the size, one kernel shared by all heads.

    Args:
        x: (B, N, C).
        kernel: (size, ..., 1, d) with one spatial axis for each axis of `grid`.
        bias: (d,).

    Returns:
        (B, N, C), at least float32.
    """
    batch, _, channels = x.shape
    full = accumulation_dtype(x.dtype)
    heads = channels // kernel.shape[-1]
    kernel = jnp.tile(kernel.reshape(*kernel.shape[: len(grid)], -1).astype(full), heads)  # (size, ..., C)
    bias = jnp.tile(bias.astype(full), heads).reshape(1, 1, channels)
    return _depthwise(x.reshape(batch, *grid, channels).astype(full), kernel).reshape(x.shape) + bias


@jax.custom_vjp
def _depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves x (B, *grid, C) with kernel (*sizes, C).

    Each back end uses the method that moves the fewest bytes or is fastest there. TPU programs of a grouped convolution
    move 0.75 of the bytes of shifted products, also with gradients.
    """
    return jax.lax.platform_dependent(x, kernel, tpu=grouped_convolution, default=shifted_products)


def _depthwise_bwd(residuals, gradient):
    return jax.lax.platform_dependent(
        *residuals,
        gradient,
        tpu=grouped_convolution_gradients,
        cuda=functools.partial(shifted_products_gradients, loop=False),
        default=shifted_products_gradients,
    )


_depthwise.defvjp(lambda x, kernel: (_depthwise(x, kernel), (x, kernel)), _depthwise_bwd)


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


def grouped_convolution_gradients(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of x and kernel, without the convolution itself, which `jax.vjp` would compute too."""
    (x_gradient,) = jax.linear_transpose(lambda x: grouped_convolution(x, kernel), x)(gradient)
    (kernel_gradient,) = jax.linear_transpose(lambda kernel: grouped_convolution(x, kernel), kernel)(gradient)
    return x_gradient, kernel_gradient


def shifted_products(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A sum of shifted products, which XLA fuses into one pass over x.

    On a CPU a grouped convolution of `lax` takes 4 to 39 times as long, and 6 to 7 times with its gradients (2 cores,
    5x5 kernel; 14x14 tokens of 320 channels, and 56x56 of 64: `docs/development.md`).
    """
    padded, grid, sizes = _padded(x, kernel), x.shape[1:-1], kernel.shape[:-1]
    total = 0
    for leading in itertools.product(*(range(size) for size in sizes[:-1])):
        row = 0  # summed row by row: this compiles to faster code than one chain
        for tap in ((*leading, last) for last in range(sizes[-1])):
            weight = kernel[tuple(slice(o, o + 1) for o in tap)].reshape(*(1 for _ in x.shape[:-1]), -1)
            row = row + padded[:, *(slice(o, o + side) for o, side in zip(tap, grid, strict=True))] * weight
        total = total + row
    return total


def shifted_products_gradients(
    x: jax.Array, kernel: jax.Array, gradient: jax.Array, *, loop: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Gradients of x and kernel.

    On a CPU that of the kernel is a loop over its taps, 2 to 3 times as fast as differentiating the sum, and takes half
    the time to compile. Without the loop XLA's programs for GPUs compute several taps in one pass, directly from
    bfloat16: for an H100 they move a quarter of the bytes.
    """
    padded, sizes, axes = _padded(x, kernel), kernel.shape[:-1], tuple(range(x.ndim - 1))
    corners = [(0, *tap, 0) for tap in np.ndindex(*sizes)]  # where each tap's shifted x starts

    def tap_gradient(shifted):
        return jnp.sum(shifted * gradient, axis=axes)  # (C,)

    if loop:
        starts = jnp.asarray(np.array(corners, np.int32))
        taps = jax.lax.map(lambda start: tap_gradient(jax.lax.dynamic_slice(padded, list(start), x.shape)), starts)
    else:
        ends = [tuple(np.add(corner, x.shape)) for corner in corners]
        taps = jnp.stack([tap_gradient(jax.lax.slice(padded, *at)) for at in zip(corners, ends, strict=True)])
    return shifted_products(gradient, jnp.flip(kernel, range(len(sizes)))), taps.reshape(kernel.shape)


def _padded(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.pad(x, [(0, 0), *((size // 2, size // 2) for size in kernel.shape[:-1]), (0, 0)])
