"""Maps (B, H, W, C) of other sizes: bilinear and nearest resizing, adaptive average pooling, all as in PyTorch.

Bilinear resizing and pooling are products with a small matrix along either axis. Compiled for a TPU v5e, logits resized
so to 512 x 512 pixels take no temporary memory, and a twelfth of the bytes moved by gathering neighbours, forward and
backward.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from polaformer_jax.models.layers import accumulation_dtype


def resize_bilinear(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """`F.interpolate(x, shape, mode="bilinear", align_corners=False)`: no antialiasing, edges repeated.

    Args:
        x: (B, h, w, C).
        shape: (H, W).

    Returns:
        (B, H, W, C) in the dtype of x; computed in at least float32.
    """
    matrices = [
        None if old == new else _bilinear(_position(np.arange(new), old, new), old)
        for old, new in zip(x.shape[1:3], shape, strict=True)
    ]
    return _apply(x, matrices)


def bilinear_weights(old: int, new: jax.Array, count: int, dtype=jnp.float32) -> jax.Array:
    """The matrices by which `resize_bilinear` resizes an axis, to sizes that are traced.

    Args:
        old: values along the axis.
        new: (B,) int, to how many it is resized in each example; where that is none, to one.
        count: how many of them are computed; those beyond the size of an example repeat its edge.

    Returns:
        (B, count, old), rows sum to 1.
    """
    new = jnp.maximum(new.reshape(-1, 1), 1)
    index = jnp.minimum(jnp.arange(count).reshape(1, -1), new - 1)  # (B, count)
    return _bilinear(_position(index.astype(dtype), old, new.astype(dtype)), old)


def resize_nearest(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """`F.interpolate(x, shape, mode="nearest")`: (B, h, w, C) -> (B, H, W, C), row i from row floor(i * h / H).

    The quotient is exact. PyTorch rounds it to float32, and takes the row before in some resizings by a factor that is
    not a power of 2, such as from 2 to 82.
    """
    for axis, new in zip((1, 2), shape, strict=True):
        old = x.shape[axis]
        if new % old == 0:  # no gather, whose gradient would be a scatter
            x = jnp.repeat(x, new // old, axis=axis)
        else:
            x = jnp.take(x, np.arange(new) * old // new, axis=axis)
    return x


def adaptive_average_pool(x: jax.Array, bins: int) -> jax.Array:
    """`F.adaptive_avg_pool2d(x, bins)`: the means of bins x bins areas that cover the map, and overlap where they must.

    Args:
        x: (B, H, W, C), also with fewer than `bins` rows or columns.

    Returns:
        (B, bins, bins, C) in the dtype of x; computed in at least float32.
    """
    return _apply(x, [_average(size, bins) for size in x.shape[1:3]])


def _position(index, old, new):
    """Where index of `new` values lies among `old` values."""
    return (index + 0.5) * (old / new) - 0.5


def _bilinear(position, count: int):
    """(..., r) positions among `count` values -> (..., r, count), the weights of these values; as NumPy or traced."""
    neighbours = np.arange(count).reshape(*(1 for _ in position.shape), count)
    return (1 - abs(position.clip(0, count - 1)[..., None] - neighbours)).clip(0)


def _average(count: int, bins: int) -> np.ndarray:
    """(bins, count), rows sum to 1: bin i covers the values floor(i * count / bins) to ceil((i + 1) * count / bins)."""
    matrix = np.zeros((bins, count))
    for i in range(bins):
        first, end = i * count // bins, -(-(i + 1) * count // bins)
        matrix[i, first:end] = 1 / (end - first)
    return matrix


def _apply(x: jax.Array, matrices: Sequence[np.ndarray | None]) -> jax.Array:
    """(B, h, w, C), (H, h), (W, w) -> (B, H, W, C); None leaves an axis as it is."""
    full = accumulation_dtype(x.dtype)
    y = x
    for matrix, subscripts in zip(matrices, ("vh,bhwc->bvwc", "vw,bhwc->bhvc"), strict=True):
        if matrix is not None:
            y = _product(subscripts, jnp.asarray(matrix, full), y.astype(full))
    return y.astype(x.dtype)


def _product(subscripts: str, matrix: jax.Array, x: jax.Array) -> jax.Array:
    """In full precision, also where products of float32 are otherwise made of bfloat16 or TF32 numbers."""
    return jnp.einsum(subscripts, matrix, x, precision=jax.lax.Precision.HIGHEST)
