"""Blocks whose attention acts within windows of the image, shifted from block to block, as in Swin Transformer.

Source: Liu et al., "Swin Transformer", ICCV 2021, arXiv 2103.14030; names as in the official code of PolaFormer.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from polaformer_jax.models.attention_layers import AttentionLayers
from polaformer_jax.models.initializers import table
from polaformer_jax.models.kernels import placement
from polaformer_jax.models.kernels import windows as kernel
from polaformer_jax.models.layers import Block, Grid, accumulation_dtype, check_implementation, dropout, linear, product
from polaformer_jax.models.windows import Windows


class WindowAttention(nnx.Module):
    """Softmax attention (type S) within windows, with relative position bias, as in Swin Transformer.

    `attention_impl` is the `implementation` of `softmax_in_windows`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int,
        qkv_bias: bool,
        drop_rate: float,
        attention_impl: str = "auto",
        **types,
    ):
        self.qkv = linear(dim, 3 * dim, use_bias=qkv_bias, **types)
        self.proj = linear(dim, dim, **types)
        self.relative_position_bias_table = table(
            ((2 * window - 1) ** 2, num_heads), param_dtype=types["param_dtype"], rngs=types["rngs"]
        )
        self.num_heads, self.window, self.drop_rate = num_heads, window, drop_rate
        self.attention_impl = attention_impl

    @jax.named_scope("attention")
    def __call__(self, x: jax.Array, key: jax.Array | None = None, *, windows: Windows) -> jax.Array:
        """(B * windows, n, C) -> the same, n = window². Results of padding are to be ignored."""
        of_images = x.reshape(-1, windows.count, *x.shape[1:])
        qkv = self.qkv(of_images)
        with jax.named_scope("softmax_attention"):
            bias = self.relative_bias(accumulation_dtype(x.dtype))
            y = softmax_in_windows(qkv, bias, windows=windows, implementation=self.attention_impl)
        return dropout(self.proj(y).reshape(x.shape), self.drop_rate, key)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tokens (B', n, C) of windows -> queries, keys and values (B', n, h, d)."""
        return _by_heads(self.qkv(x), self.num_heads)

    def relative_bias(self, dtype) -> jax.Array:
        """What the relative position of a query and a key adds to their score, (h, n, n)."""
        bias = self.relative_position_bias_table[...].astype(dtype)[relative_position_index(self.window)]
        return bias.transpose(2, 0, 1)

    def bias(self, windows: Windows, dtype) -> jax.Array:
        """All that is added to the scores: (1, 1, h, n, n), or of shifted or padded windows (1, windows, h, n, n)."""
        return _masked(self.relative_bias(dtype), windows)


@functools.partial(jax.jit, static_argnames=("windows", "implementation"))  # traced once for all blocks of one shape
def softmax_in_windows(qkv: jax.Array, bias: jax.Array, *, windows: Windows, implementation: str = "auto") -> jax.Array:
    """softmax(q k^T / √d + bias) v within windows, for h heads of width d = C/h.

    Pairs of tokens that only a shift brought together have 100 subtracted from their scores; padding is no key.

    Args:
        qkv: (B, windows, n, 3C), the queries, keys and values of windows as `windows.cut` orders them.
        bias: (h, n, n) in the dtype of sums, see `WindowAttention.relative_bias`.
        windows: how they lie on the map.
        implementation: "xla", operations that XLA compiles; "pallas", one kernel (`models.kernels.windows`), which TPUs
            have, and which is interpreted, slowly, on CPUs, otherwise XLA; "auto", the kernel on TPUs, otherwise XLA.
            The kernel has gradients only; forward-mode differentiation and gradients of gradients take "xla".

    Returns:
        (B, windows, n, C) in the dtype of `qkv`.
    """
    check_implementation(implementation)
    by_operations = functools.partial(_by_operations, windows=windows)
    by_kernel = functools.partial(kernel.window_attention, mask=windows.score_mask)
    heads = bias.shape[0]
    if implementation == "pallas" and kernel.supports(qkv, heads):
        return by_kernel(qkv, bias, on_tpu=placement.for_tpu())
    if implementation == "auto" and kernel.usable(qkv, heads):
        return jax.lax.platform_dependent(
            qkv, bias, tpu=functools.partial(by_kernel, on_tpu=True), default=by_operations
        )
    return by_operations(qkv, bias)


def _by_operations(qkv: jax.Array, bias: jax.Array, *, windows: Windows) -> jax.Array:
    heads, n, _ = bias.shape
    q, k, v = _by_heads(qkv.reshape(-1, *qkv.shape[2:]), heads)
    scores = product("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    bias = _masked(bias, windows)
    scores = scores.reshape(-1, bias.shape[1], heads, n, n) + bias
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(-1, heads, n, n)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*qkv.shape[:3], -1)


def _by_heads(qkv: jax.Array, heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(B', n, 3C) -> queries, keys and values (B', n, h, d)."""
    # Split before heads are formed, which on a TPU would pad the array of all three.
    q, k, v = (part.reshape(*part.shape[:2], heads, -1) for part in jnp.split(qkv, 3, axis=-1))
    return q, k, v


def _masked(bias: jax.Array, windows: Windows) -> jax.Array:
    """Bias (h, n, n) and the windows' mask together: (1, 1 or windows, h, n, n)."""
    bias = bias[None, None]
    if (mask := windows.score_mask) is not None:
        bias = bias + mask.astype(bias.dtype)[None, :, None]
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
        if isinstance(self.attn, AttentionLayers):
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
