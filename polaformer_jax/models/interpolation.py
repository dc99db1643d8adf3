"""Tables of positions for another grid, interpolated as PyTorch's `interpolate` does it.

Neither method antialiases when shrinking, corners are not aligned, and edges are repeated; bicubic uses the coefficient
a = -0.75. `jax.image.resize` differs in all of these.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from polaformer_jax.models.layers import Grid, accumulation_dtype

Method = Literal["bilinear", "bicubic"]


def interpolation_weights(size: int, new_size: int, method: Method) -> np.ndarray:
    """(new_size, size) the weight of each old position in a new one; beyond the edge, the edge's value is repeated."""
    kernel = {"bilinear": _linear, "bicubic": _cubic}[method]
    centre = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    weights = np.zeros((new_size, size))
    for offset in (-1, 0, 1, 2):
        position = np.floor(centre).astype(int) + offset
        np.add.at(weights, (np.arange(new_size), np.clip(position, 0, size - 1)), kernel(centre - position))
    return weights


def table_on(table: jax.Array, own: Grid, grid: Grid, method: Method) -> jax.Array:
    """A table (1, N, C) of the grid `own` on another grid, (1, N', C); the table itself where the grids are equal.

    Computed in at least float32; the result has the dtype of the table.
    """
    if grid == own:
        return table
    full = accumulation_dtype(table.dtype)
    rows, columns = (
        jnp.asarray(interpolation_weights(size, new_size, method), full)
        for size, new_size in zip(own, grid, strict=True)
    )
    plane = table.reshape(*own, table.shape[-1]).astype(full)
    # A TPU would round the operands to bfloat16 without the precision.
    resized = jnp.einsum("ai,bj,ijc->abc", rows, columns, plane, precision=jax.lax.Precision.HIGHEST)
    return resized.reshape(1, -1, table.shape[-1]).astype(table.dtype)


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    x = np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _linear(distance: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, 1 - np.abs(distance))
