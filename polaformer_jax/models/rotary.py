"""Rotary position embedding of tokens on a grid (Su et al., arXiv 2104.09864; two axes as in PolaFormer++)."""

import jax
import jax.numpy as jnp
import numpy as np

BASE = 10_000.0


def frequencies(width: int) -> np.ndarray:
    """(width / 4,) float64: from 1 down to 1 / BASE, both included."""
    count = width // 4
    return BASE ** -np.linspace(0.0, 1.0, count) if count > 1 else np.ones(count)


def rotary_tables(grid: tuple[int, int], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines (N, width / 2) of the angles of pairs of channels, float64, for tokens row by row.

    The first half of the pairs turns with the row, the second with the column.
    """
    w = frequencies(width)
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    angles = np.concatenate([row[:, None] * w, column[:, None] * w], axis=1)
    return np.cos(angles), np.sin(angles)


def rotated(x: jax.Array, tables: tuple[np.ndarray, np.ndarray], *, axis: int = -2) -> jax.Array:
    """Turns each pair of neighbouring channels by its token's angle.

    Args:
        x: (..., width), the N tokens along `axis`.
        tables: what `rotary_tables` returned.
    """
    shape = [1] * x.ndim
    shape[axis], shape[-1] = tables[0].shape
    cos, sin = (jnp.asarray(table, x.dtype).reshape(shape) for table in tables)
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
