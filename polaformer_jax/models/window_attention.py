"""Blocks whose attention acts within windows of the image, shifted from block to block, as in Swin Transformer.

Source: Liu et al., "Swin Transformer", ICCV 2021, arXiv 2103.14030; names as in the official code of PolaFormer.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from polaformer_jax.models.attention import PolarityAttention
from polaformer_jax.models.initializers import table
from polaformer_jax.models.layers import Block, dropout, linear, product


class WindowAttention(nnx.Module):
    """Softmax attention (type S) within windows, with relative position bias, as in Swin Transformer."""

    def __init__(self, dim: int, num_heads: int, *, window: int, qkv_bias: bool, drop_rate: float, **types):
        self.qkv = linear(dim, 3 * dim, use_bias=qkv_bias, **types)
        self.proj = linear(dim, dim, **types)
        self.relative_position_bias_table = table(
            ((2 * window - 1) ** 2, num_heads), param_dtype=types["param_dtype"], rngs=types["rngs"]
        )
        self.num_heads, self.window, self.drop_rate = num_heads, window, drop_rate

    def __call__(self, x: jax.Array, key: jax.Array | None = None, mask: np.ndarray | None = None) -> jax.Array:
        """(B * windows, n, C) -> the same, n = window². mask: (windows, n, n), True for pairs to mask out."""
        batch, n, dim = x.shape
        q, k, v = self.project(x)
        scores = product("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        bias = self.bias(mask, scores.dtype)
        scores = scores.reshape(-1, bias.shape[1], self.num_heads, n, n) + bias
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(batch, self.num_heads, n, n)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, n, dim)
        return dropout(self.proj(y), self.drop_rate, key)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tokens (B', n, C) of windows -> queries, keys and values (B', n, h, d)."""
        batch, n, _ = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(batch, n, 3, self.num_heads, -1), 2, 0)
        return q, k, v

    def bias(self, mask: np.ndarray | None, dtype) -> jax.Array:
        """The bias added to the scores: (1, 1, h, n, n), or with a mask (1, windows, h, n, n)."""
        bias = self.relative_position_bias_table[...].astype(dtype)[relative_position_index(self.window)]
        bias = bias.transpose(2, 0, 1)[None, None]
        if mask is None:
            return bias
        return bias + jnp.where(mask, -100, 0).astype(dtype)[None, :, None]


class SwinBlock(Block):
    """A block whose attention acts within windows, after a cyclic shift by `shift` rows and columns."""

    def __init__(self, attn: nnx.Module, dim: int, *, grid: int, window: int, shift: int, **arguments):
        super().__init__(attn, dim, **arguments)
        self.grid, self.window, self.shift = grid, window, shift

    def mix(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        x = self.to_windows(x)
        # Linear attention takes no mask: in a shifted window it also mixes tokens that only the cyclic shift brought
        # together, as the official code does.
        x = self.attn(x, key) if self.mask is None else self.attn(x, key, mask=self.mask)
        return self._roll(merge_windows(x, self.window, grid=self.grid), self.shift)

    def attention_input(self, x: jax.Array) -> jax.Array:
        return self.to_windows(self.norm1(x))

    def to_windows(self, x: jax.Array) -> jax.Array:
        """Tokens (B, grid², C) of the image -> tokens (B * windows, window², C) of the shifted windows."""
        return partition_windows(self._roll(x, -self.shift), self.window, grid=self.grid)

    @property
    def mask(self) -> np.ndarray | None:
        """(windows, n, n) True for pairs that must not attend to each other; None where the attention takes no mask."""
        if isinstance(self.attn, PolarityAttention) or not self.shift:
            return None
        return shift_mask(self.grid, self.window, self.shift)

    def _roll(self, x: jax.Array, by: int) -> jax.Array:
        if by == 0:
            return x
        image = x.reshape(x.shape[0], self.grid, self.grid, -1)
        return jnp.roll(image, (by, by), axis=(1, 2)).reshape(x.shape)


def relative_position_index(window: int) -> np.ndarray:
    """(n, n) row of the bias table for each pair (query, key) of a window, n = window²."""
    row, column = np.divmod(np.arange(window**2), window)
    rows = row[:, None] - row[None, :] + window - 1
    columns = column[:, None] - column[None, :] + window - 1
    return rows * (2 * window - 1) + columns


def shift_mask(grid: int, window: int, shift: int) -> np.ndarray:
    """(windows, n, n) True where a cyclic shift brought two tokens of a window together that are apart in the image."""
    # Along one axis only the last window holds tokens from both ends: its last `shift` tokens wrapped around the edge.
    edge = np.arange(grid) >= grid - shift
    region = 2 * edge[:, None] + edge[None, :]  # (grid, grid)
    count = grid // window
    region = region.reshape(count, window, count, window).transpose(0, 2, 1, 3).reshape(count**2, window**2)
    return region[:, :, None] != region[:, None, :]


def partition_windows(x: jax.Array, window: int, *, grid: int) -> jax.Array:
    """(B, grid², C) -> (B * windows, window², C); the windows of an image are adjacent, row by row."""
    batch, _, channels = x.shape
    if window == grid:
        return x
    count = grid // window
    x = x.reshape(batch, count, window, count, window, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch * count**2, window**2, channels)


def merge_windows(x: jax.Array, window: int, *, grid: int) -> jax.Array:
    """The inverse of `partition_windows`."""
    channels = x.shape[-1]
    if window == grid:
        return x
    count = grid // window
    x = x.reshape(-1, count, count, window, window, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, grid**2, channels)
