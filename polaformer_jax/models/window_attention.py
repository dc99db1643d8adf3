"""Blocks whose attention acts within windows of the image, shifted from block to block, as in Swin Transformer.

Source: Liu et al., "Swin Transformer", ICCV 2021, arXiv 2103.14030; names as in the official code of PolaFormer.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from polaformer_jax.models.attention import PolarityAttention
from polaformer_jax.models.initializers import table
from polaformer_jax.models.layers import Block, Grid, dropout, linear, product
from polaformer_jax.models.windows import Windows


class WindowAttention(nnx.Module):
    """Softmax attention (type S) within windows, with relative position bias, as in Swin Transformer."""

    def __init__(self, dim: int, num_heads: int, *, window: int, qkv_bias: bool, drop_rate: float, **types):
        self.qkv = linear(dim, 3 * dim, use_bias=qkv_bias, **types)
        self.proj = linear(dim, dim, **types)
        self.relative_position_bias_table = table(
            ((2 * window - 1) ** 2, num_heads), param_dtype=types["param_dtype"], rngs=types["rngs"]
        )
        self.num_heads, self.window, self.drop_rate = num_heads, window, drop_rate

    @jax.named_scope("attention")
    def __call__(self, x: jax.Array, key: jax.Array | None = None, *, windows: Windows) -> jax.Array:
        """(B * windows, n, C) -> the same, n = window². Pairs that only a shift brought together are masked out.

        So is padding, whose own results are to be ignored.
        """
        batch, n, dim = x.shape
        q, k, v = self.project(x)
        with jax.named_scope("softmax_attention"):
            scores = product("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
            bias = self.bias(windows, scores.dtype)
            scores = scores.reshape(-1, bias.shape[1], self.num_heads, n, n) + bias
            weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(batch, self.num_heads, n, n)
            y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, n, dim)
        return dropout(self.proj(y), self.drop_rate, key)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tokens (B', n, C) of windows -> queries, keys and values (B', n, h, d)."""
        batch, n, _ = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(batch, n, 3, self.num_heads, -1), 2, 0)
        return q, k, v

    def bias(self, windows: Windows, dtype) -> jax.Array:
        """The bias added to the scores: (1, 1, h, n, n), or of shifted or padded windows (1, windows, h, n, n)."""
        bias = self.relative_position_bias_table[...].astype(dtype)[relative_position_index(self.window)]
        bias = bias.transpose(2, 0, 1)[None, None]
        if (apart := windows.apart) is not None:
            bias = bias + jnp.where(apart, -100, 0).astype(dtype)[None, :, None]
        if (valid := windows.valid) is not None:
            bias = jnp.where(valid[None, :, None, None, :], bias, -jnp.inf)
        return bias


class SwinBlock(Block):
    """A block whose attention acts within windows, shifted by half a window if `shifted`.

    Windows that do not divide the map are padded, as `models.windows` explains.
    """

    def __init__(self, attn: nnx.Module, dim: int, *, window: int, shifted: bool, **arguments):
        super().__init__(attn, dim, **arguments)
        self.window, self.shifted = window, shifted

    def windows(self, grid: Grid) -> Windows:
        """The block's windows on a map of tokens."""
        return Windows.on(grid, self.window, shifted=self.shifted)

    def mix(self, x: jax.Array, key: jax.Array | None, *, grid: Grid) -> jax.Array:
        windows, batch = self.windows(grid), x.shape[0]
        x = windows.cut(x)
        if isinstance(self.attn, PolarityAttention):
            # Linear attention takes no mask of pairs: in a shifted window it also mixes tokens that only the cyclic
            # shift brought together, as the official code does.
            mask = windows.valid
            if mask is not None:
                mask = jnp.broadcast_to(mask[None], (batch, *mask.shape)).reshape(x.shape[:2])  # (B * windows, n)
            y = self.attn(x, key, mask=mask)
        else:
            y = self.attn(x, key, windows=windows)
        return windows.join(y)

    def attention_input(self, x: jax.Array, grid: Grid) -> jax.Array:
        return self.windows(grid).cut(self.norm1(x))


def relative_position_index(window: int) -> np.ndarray:
    """(n, n) row of the bias table for each pair (query, key) of a window, n = window²."""
    row, column = np.divmod(np.arange(window**2), window)
    rows = row[:, None] - row[None, :] + window - 1
    columns = column[:, None] - column[None, :] + window - 1
    return rows * (2 * window - 1) + columns
