"""How the windows of a block lie on a map of tokens: padded, shifted cyclically and cut, as in Swin Transformer.

Where windows do not divide a map, it is padded at the bottom and the right to whole windows, before the shift, as in
Swin's code for dense prediction (https://github.com/SwinTransformer). Unlike there, padding takes no part in attention:
zeros are not attended to, and `valid` says which tokens may be.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from polaformer_jax.models.layers import Grid


class Windows(NamedTuple):
    """Square windows on a map of tokens.

    Attributes:
        grid: height and width of the map, in tokens.
        window: side of the windows, in tokens.
        shift: rows and columns by which the padded map is shifted cyclically, up and to the left, before it is cut.
    """

    grid: Grid
    window: int
    shift: Grid = (0, 0)

    @classmethod
    def on(cls, grid: Grid, window: int, *, shifted: bool) -> "Windows":
        """Windows that, if `shifted`, are moved by half their side along each axis that has more than one."""
        shift = window // 2 if shifted else 0
        height, width = (shift if side > window else 0 for side in grid)
        return cls(grid, window, (height, width))

    @jax.named_scope("windows")
    def cut(self, x: jax.Array) -> jax.Array:
        """Tokens (B, N, C) of maps -> (B * windows, n, C), n = window²; those of one map are adjacent, row by row.

        Padding is zeros.
        """
        batch, _, channels = x.shape
        if self.is_padded:
            sides = [(0, after) for after in np.subtract(self._padded, self.grid).tolist()]
            x = jnp.pad(x.reshape(batch, *self.grid, channels), [(0, 0), *sides, (0, 0)]).reshape(batch, -1, channels)
        x = self._rolled(x, (-self.shift[0], -self.shift[1]))
        if self._counts == (1, 1):
            return x
        rows, columns = self._counts
        x = x.reshape(batch, rows, self.window, columns, self.window, channels).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(batch * rows * columns, self.window**2, channels)

    @jax.named_scope("windows")
    def join(self, x: jax.Array) -> jax.Array:
        """The inverse of `cut`; padding is cut off."""
        channels = x.shape[-1]
        rows, columns = self._counts
        if self._counts != (1, 1):
            x = x.reshape(-1, rows, columns, self.window, self.window, channels).transpose(0, 1, 3, 2, 4, 5)
            x = x.reshape(-1, rows * columns * self.window**2, channels)
        x = self._rolled(x, self.shift)
        if not self.is_padded:
            return x
        height, width = self.grid
        return x.reshape(-1, *self._padded, channels)[:, :height, :width].reshape(-1, height * width, channels)

    @property
    def is_padded(self) -> bool:
        """Whether there are windows that reach beyond the map."""
        return self._padded != self.grid

    @property
    def members(self) -> np.ndarray:
        """(windows, n) the index in the map of each token of each window, -1 for padding."""
        index = np.full(self._padded, -1)
        index[: self.grid[0], : self.grid[1]] = np.arange(self.grid[0] * self.grid[1]).reshape(self.grid)
        return self._cut_plane(np.roll(index, (-self.shift[0], -self.shift[1]), axis=(0, 1)))

    @property
    def valid(self) -> np.ndarray | None:
        """(windows, n) False at padding; None where there is none. At least one token of each window is valid."""
        return self.members >= 0 if self.is_padded else None

    @property
    def apart(self) -> np.ndarray | None:
        """(windows, n, n) True where the shift brought two tokens of a window together; None without a shift."""
        if self.shift == (0, 0):
            return None
        # Along one axis only the last window holds tokens from both ends: its last `shift` tokens wrapped around.
        below, right = (np.arange(side) >= side - by for side, by in zip(self._padded, self.shift, strict=True))
        region = self._cut_plane(2 * below[:, None] + right[None, :])
        return region[:, :, None] != region[:, None, :]

    @property
    def _counts(self) -> tuple[int, int]:
        return -(-self.grid[0] // self.window), -(-self.grid[1] // self.window)

    @property
    def _padded(self) -> Grid:
        return self._counts[0] * self.window, self._counts[1] * self.window

    def _cut_plane(self, plane: np.ndarray) -> np.ndarray:
        """(height, width) of a padded and shifted map -> (windows, n)"""
        rows, columns = self._counts
        plane = plane.reshape(rows, self.window, columns, self.window).transpose(0, 2, 1, 3)
        return plane.reshape(rows * columns, self.window**2)

    def _rolled(self, x: jax.Array, by: tuple[int, int]) -> jax.Array:
        if by == (0, 0):
            return x
        return jnp.roll(x.reshape(x.shape[0], *self._padded, -1), by, axis=(1, 2)).reshape(x.shape)
