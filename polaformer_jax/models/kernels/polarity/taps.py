"""The taps of a depthwise convolution that a kernel computes in blocks of tokens: which token each of them reads."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Taps(NamedTuple):
    """Taps on a map whose tokens lie row by row; a sequence is a map of one row.

    Attributes:
        grid: height and width of the map.
        sizes: rows and columns of the convolution's kernel, odd; tap t is in its row t // columns.
    """

    grid: tuple[int, int]
    sizes: tuple[int, int]

    @classmethod
    def on(cls, grid: tuple[int, ...], sizes: tuple[int, ...]) -> "Taps":
        """For a grid of one or two axes, and a kernel with as many."""
        return cls((1, *grid)[-2:], (1, *sizes)[-2:])

    @property
    def count(self) -> int:
        return self.sizes[0] * self.sizes[1]

    def neighbours(self, tap: jax.Array, tokens: jax.Array, *, transposed: bool = False) -> tuple[jax.Array, jax.Array]:
        """For `tokens` (T,) the tokens that `tap` reads, and whether they are on the map; others are token 0.

        `transposed`: the tokens that read these by this tap.
        """
        (height, width), (rows, columns) = self.grid, self.sizes
        down, right = _div(tap, columns) - rows // 2, _rem(tap, columns) - columns // 2
        if transposed:
            down, right = -down, -right
        row, column = _div(tokens, width) + down, _rem(tokens, width) + right
        there = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        return jnp.where(there, row * width + column, 0), there


def _div(x: jax.Array, by: int) -> jax.Array:
    return jax.lax.div(x, x.dtype.type(by))


def _rem(x: jax.Array, by: int) -> jax.Array:
    return jax.lax.rem(x, x.dtype.type(by))
