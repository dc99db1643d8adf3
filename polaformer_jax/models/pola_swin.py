"""Pola-Swin: the Swin Transformer with polarity-aware linear attention in (some of) its windows.

Source: PolaFormer (ICLR 2025, arXiv 2501.15061) and its code, https://github.com/ZacharyMeng/PolaFormer; windows,
shifts and merging are Liu et al., "Swin Transformer", ICCV 2021, arXiv 2103.14030.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from polaformer_jax.models.attention import PolarityAttention
from polaformer_jax.models.backbone import STRIDES, Arguments, Backbone, classifier
from polaformer_jax.models.initializers import Keys, table
from polaformer_jax.models.layers import (
    Block,
    PatchEmbed,
    drop_path_rates,
    dropout,
    layer_norm,
    linear,
    merge_windows,
    partition_windows,
    product,
    wide,
)

EPSILON = 1e-5


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
        """(B * windows, n, C) -> the same, n = window². mask: (windows, n, n), True where a pair is kept apart."""
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
        """What is added to the scores: (1, 1, h, n, n), or with a mask (1, windows, h, n, n)."""
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
        # Linear attention takes no mask: in a shifted window it also mixes what the shift brought together, in the
        # official code too.
        x = self.attn(x, key) if self.mask is None else self.attn(x, key, mask=self.mask)
        return self._roll(merge_windows(x, self.window, grid=self.grid), self.shift)

    def to_windows(self, x: jax.Array) -> jax.Array:
        """Tokens (B, grid², C) of the image -> (B * windows, window², C), those of the shifted windows."""
        return partition_windows(self._roll(x, -self.shift), self.window, grid=self.grid)

    @property
    def mask(self) -> np.ndarray | None:
        """(windows, n, n) True where a pair is kept apart; None where the attention takes no mask."""
        if isinstance(self.attn, PolarityAttention) or not self.shift:
            return None
        return shift_mask(self.grid, self.window, self.shift)

    def _roll(self, x: jax.Array, by: int) -> jax.Array:
        if by == 0:
            return x
        image = x.reshape(x.shape[0], self.grid, self.grid, -1)
        return jnp.roll(image, (by, by), axis=(1, 2)).reshape(x.shape)


class PatchMerging(nnx.Module):
    """Four neighbouring tokens become one of twice the channels."""

    def __init__(self, dim: int, *, grid: int, **types):
        self.norm = layer_norm(4 * dim, epsilon=EPSILON, **types)
        self.reduction = linear(4 * dim, 2 * dim, use_bias=False, **types)
        self.grid = grid

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, grid², C) -> (B, grid²/4, 2C)"""
        batch, _, dim = x.shape
        half = self.grid // 2
        x = x.reshape(batch, half, 2, half, 2, dim)
        # Official order of the four (row, column) offsets: (0, 0), (1, 0), (0, 1), (1, 1), the column being major.
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(batch, half**2, 4 * dim)
        return self.reduction(self.norm(x))


class Stage(nnx.Module):
    """The blocks of one resolution, and the patch merging after all but the last (None there)."""

    def __init__(self, blocks: list[SwinBlock], downsample: PatchMerging | None):
        self.blocks = nnx.List(blocks)
        self.downsample = downsample


class PolaSwin(Backbone):
    """Pola-Swin. Arguments have the official names and defaults; the zoo holds the published combinations.

    Args:
        img_size: side of the square images, a multiple of 32 whose grids the windows divide.
        num_classes: 0 leaves the classifier out.
        embed_dim: channels of the first stage; each next one has twice as many.
        depths, num_heads: one value a stage.
        window_size: side of the windows of L blocks, in tokens. A window as large as the grid becomes the grid.
        mlp_ratio: hidden channels of the MLPs, relative.
        qkv_bias: whether the layers that make queries, keys, values and gates have a bias.
        ape: add a learned absolute position embedding to the patches. patch_norm: LayerNorm after the patch embedding.
        drop_rate: dropout after the position embedding, the attention's projection and in the MLP.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
        alpha, kernel_size: of the polarity-aware attention. attention_impl: how to compute it: "auto", "xla", "pallas"
            (see `polarity_attention`).
        attn_type: one letter a stage: L (polarity-aware linear), S (softmax windows), or M (mixed), whose first k
            blocks are L and the rest S; k follows the four letters, as in "LMSL1".
        softmax_window_size: side of the windows of S blocks; None is the official rule, 7 if window_size <= 56,
            else 12.
        dtype: of the computation: bfloat16, float32, float64. param_dtype: of the stored parameters.

    Raises:
        ValueError: with everything that does not fit.
    """

    def __init__(
        self,
        img_size: int = 224,
        num_classes: int = 1000,
        *,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        ape: bool = False,
        patch_norm: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        alpha: float = 4,
        kernel_size: int = 5,
        attention_impl: str = "auto",
        attn_type: str = "LLLL",
        softmax_window_size: int | None = None,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        given = Arguments("PolaSwin", locals())
        img_size = given.image_size(img_size)
        num_classes = given.integer("num_classes", num_classes, least=0)
        embed_dim = given.integer("embed_dim", embed_dim)
        depths = given.integers("depths", depths)
        num_heads = given.integers("num_heads", num_heads)
        window_size = given.integer("window_size", window_size)
        mlp_ratio = given.number("mlp_ratio", mlp_ratio, least=0)
        drop_rate = given.number("drop_rate", drop_rate, least=0, below=1)
        drop_path_rate = given.number("drop_path_rate", drop_path_rate, least=0, below=1)
        alpha, kernel_size = given.attention(alpha, kernel_size, attention_impl)
        softmax_window_size = softmax_window(window_size, softmax_window_size)
        windows = {"L": window_size, "S": given.integer("softmax_window_size", softmax_window_size)}
        kinds = _block_types(given, attn_type, depths)
        given.heads(tuple(embed_dim * 2**i for i in range(4)), num_heads, kinds)
        _check_windows(given, img_size, kinds, windows)
        dtype, param_dtype = given.types(dtype, param_dtype)
        given.check()
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": Keys.of(rngs)}

        def block(i: int, j: int, drop_path: float) -> SwinBlock:
            grid, dim, kind = img_size // STRIDES[i], embed_dim * 2**i, kinds[i][j]
            window, shift = windows[kind], windows[kind] // 2 if j % 2 else 0
            if grid <= window:
                window, shift = grid, 0
            common = {"qkv_bias": qkv_bias, "drop_rate": drop_rate, **types}
            if kind == "S":
                attn = WindowAttention(dim, num_heads[i], window=window, **common)
            else:
                attn = PolarityAttention(
                    dim,
                    num_heads[i],
                    grid=(window, window),
                    projections="qkvg",
                    alpha=alpha,
                    kernel_size=kernel_size,
                    attention_impl=attention_impl,
                    **common,
                )
            return SwinBlock(
                attn,
                dim,
                grid=grid,
                window=window,
                shift=shift,
                mlp_ratio=mlp_ratio,
                epsilon=EPSILON,
                drop_rate=drop_rate,
                drop_path=drop_path,
                **types,
            )

        self.patch_embed = PatchEmbed(4, 3, embed_dim, patch_norm=patch_norm, **types)
        tokens = (img_size // STRIDES[0]) ** 2
        shape = (1, tokens, embed_dim)
        self.absolute_pos_embed = table(shape, param_dtype=param_dtype, rngs=types["rngs"]) if ape else None
        stages = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            merging = PatchMerging(embed_dim * 2**i, grid=img_size // STRIDES[i], **types) if i < 3 else None
            stages.append(Stage([block(i, j, rate) for j, rate in enumerate(rates)], merging))
        self.layers = nnx.List(stages)
        self.norm = layer_norm(embed_dim * 8, epsilon=EPSILON, **types)
        self.head = classifier(embed_dim * 8, num_classes, **types)
        self.img_size, self.drop_rates, self.dtype = img_size, (drop_rate, drop_path_rate), dtype
        self.arguments = given.record()

    def blocks(self, stage: int) -> Sequence[Block]:
        return self.layers[stage].blocks

    def _enter(self, stage: int, x: jax.Array, next_key: Callable[[], jax.Array | None]) -> jax.Array:
        if stage > 0:
            return self.layers[stage - 1].downsample(x)
        x = self.patch_embed(x.astype(self.dtype))  # (B, N, C)
        if self.absolute_pos_embed is not None:
            x = x + self.absolute_pos_embed[...].astype(self.dtype)
        return dropout(x, self.drop_rates[0], next_key())

    def _pool(self, tokens: jax.Array) -> jax.Array:
        return jnp.mean(self.norm(tokens), axis=1, dtype=wide(tokens.dtype))


def relative_position_index(window: int) -> np.ndarray:
    """(n, n) row of the bias table for each pair (query, key) of a window, n = window²."""
    row, column = np.divmod(np.arange(window**2), window)
    rows = row[:, None] - row[None, :] + window - 1
    columns = column[:, None] - column[None, :] + window - 1
    return rows * (2 * window - 1) + columns


def shift_mask(grid: int, window: int, shift: int) -> np.ndarray:
    """(windows, n, n) True where a cyclic shift brought two tokens of a window together that lie apart in the image."""
    # Along one axis only the last window holds tokens from both ends: the last `shift` of it came around the edge.
    edge = np.arange(grid) >= grid - shift
    region = 2 * edge[:, None] + edge[None, :]  # (grid, grid)
    count = grid // window
    region = region.reshape(count, window, count, window).transpose(0, 2, 1, 3).reshape(count**2, window**2)
    return region[:, :, None] != region[:, None, :]


def _block_types(given: Arguments, attn_type, depths: tuple[int, ...]) -> tuple[str, ...]:
    """One string of L and S a stage, one letter a block."""
    letters = given.letters("attn_type", attn_type, "LSM", suffix=True)
    suffix = attn_type[4:] if isinstance(attn_type, str) else ""
    if ("M" in letters) != suffix.isdecimal() or (suffix and not suffix.isdecimal()):
        given.problems.append(
            f"attn_type={attn_type!r}: a number after the four letters says how many blocks of a stage of type M are "
            "linear, as in 'LMSL1'; it is needed with M, and has no meaning without"
        )
        return tuple("L" * depth for depth in depths)
    linear_blocks = int(suffix or 0)
    return tuple(
        letter * depth if letter != "M" else ("L" * linear_blocks + "S" * depth)[:depth]
        for letter, depth in zip(letters, depths, strict=True)
    )


def softmax_window(window_size: int, softmax_window_size: int | None) -> int:
    """The window of S blocks: as given, or by the official rule."""
    return softmax_window_size if softmax_window_size is not None else 7 if window_size <= 56 else 12


def _check_windows(given: Arguments, img_size: int, kinds: tuple[str, ...], windows: dict[str, int]) -> None:
    """Every grid is as large as its windows at most, or a multiple of them."""
    names = {"L": "window_size", "S": "softmax_window_size"}

    def misfits(size: int, kind: str, window: int) -> list[str]:
        grids = [(i, size // stride) for i, stride in enumerate(STRIDES) if kind in kinds[i]]
        return [
            f"stage {i} has {grid}x{grid} tokens and {names[kind]}={window}"
            for i, grid in grids
            if grid > window and grid % window
        ]

    found = {kind: misfits(img_size, kind, window) for kind, window in windows.items()}
    if not any(found.values()):
        return
    sizes = [
        size
        for size in range(STRIDES[-1], 4 * max(img_size, 512), STRIDES[-1])
        if not any(misfits(size, kind, window) for kind, window in windows.items())
    ]
    nearest = sorted(sorted(sizes, key=lambda size: abs(size - img_size))[:6])
    ways = [f"img_size {', '.join(map(str, nearest))}"]
    for kind in (kind for kind, lines in found.items() if lines):
        largest = max(img_size // stride for i, stride in enumerate(STRIDES) if kind in kinds[i])
        possible = [w for w in range(2, largest + 1) if not misfits(img_size, kind, w)]
        ways.append(f"{names[kind]} {', '.join(map(str, possible))}")
    given.problems.append(
        f"img_size={img_size} does not fit the windows, which must divide each grid larger than they are: "
        f"{'; '.join(line for lines in found.values() for line in lines)}. What would fit: {'; or '.join(ways)}"
    )
