"""Pola-Swin: the Swin Transformer with polarity-aware linear attention in (some of) its windows.

Source: PolaFormer (ICLR 2025, arXiv 2501.15061) and its code, https://github.com/ZacharyMeng/PolaFormer; windows,
shifts and merging are from Liu et al., "Swin Transformer", ICCV 2021, arXiv 2103.14030.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from polaformer_jax.models.backbone import Backbone, classifier
from polaformer_jax.models.initializers import Keys, table
from polaformer_jax.models.interpolation import table_on
from polaformer_jax.models.layers import (
    Block,
    Grid,
    PatchEmbed,
    accumulation_dtype,
    drop_path_rates,
    dropout,
    layer_norm,
    linear,
)
from polaformer_jax.models.model_config import (
    FREE_FIELDS,
    STRIDES,
    Checks,
    ModelConfig,
    check_computation,
    resolve_config,
)
from polaformer_jax.models.model_info import ModelInfo
from polaformer_jax.models.token_attention import check_token_attention, token_attention, used_token_attention
from polaformer_jax.models.window_attention import SwinBlock, WindowAttention

EPSILON = 1e-5


class PatchMerging(nnx.Module):
    """Merges four neighbouring tokens into one with twice the channels."""

    def __init__(self, dim: int, **types):
        self.norm = layer_norm(4 * dim, epsilon=EPSILON, **types)
        self.reduction = linear(4 * dim, 2 * dim, use_bias=False, **types)

    @jax.named_scope("patch_merging")
    def __call__(self, x: jax.Array, grid: Grid) -> jax.Array:
        """(B, N, C) -> (B, N/4, 2C); `grid` is that of the N tokens."""
        batch, _, dim = x.shape
        rows, columns = grid[0] // 2, grid[1] // 2
        x = x.reshape(batch, rows, 2, columns, 2, dim)
        # Official order of the four (row, column) offsets: (0, 0), (1, 0), (0, 1), (1, 1), the column being major.
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(batch, rows * columns, 4 * dim)
        return self.reduction(self.norm(x))


class Stage(nnx.Module):
    """The blocks of one resolution, and the patch merging after them (None in the last stage)."""

    def __init__(self, blocks: list[SwinBlock], downsample: PatchMerging | None):
        self.blocks = nnx.List(blocks)
        self.downsample = downsample


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolaSwinConfig(ModelConfig):
    """Hyper-parameters of a `PolaSwin`, with the official names and defaults; `registry` holds the published models.

    Attributes:
        img_size: side of the square images in pixels, a multiple of 32 such that the windows divide the grids, unless
            `padded_windows`.
        num_classes: 0 omits the classifier.
        embed_dim: channels of the first stage; they double from stage to stage.
        depths, num_heads: one value for each stage.
        window_size: side of the windows of L blocks, in tokens. A window larger than the grid is reduced to the grid.
        mlp_ratio: hidden channels of the MLPs, relative to the channels of the block.
        qkv_bias: whether the layers that compute queries, keys, values and gates have a bias.
        ape: add a learned absolute position embedding to the patches.
        patch_norm: LayerNorm after the patch embedding.
        drop_rate: dropout after the position embedding, after the attention's projection and in the MLP.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
        alpha, kernel_size: of the polarity-aware attention.
        attn_type: one letter for each stage: L (polarity-aware linear attention), S (softmax windows), or M (mixed),
            whose first k blocks are L and the rest S; k follows the four letters, as in "LMSL1".
        softmax_window_size: side of the windows of S blocks; None is the official rule, 7 if window_size <= 56,
            else 12.
        attention, convolution, gate: what blocks of type L compute, see `token_attention`.
        padded_windows: allow windows that do not divide the grids. Those at the bottom and the right are padded (see
            `models.windows`). The weights are those of any other model.

    Raises:
        UserError: lists everything that does not fit.
    """

    family: ClassVar[str] = "PolaSwin"

    img_size: int = 224
    num_classes: int = 1000
    embed_dim: int = 96
    depths: Sequence[int] = (2, 2, 6, 2)
    num_heads: Sequence[int] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    ape: bool = False
    patch_norm: bool = True
    drop_rate: float = 0.0
    drop_path_rate: float = 0.1
    alpha: float = 4.0
    kernel_size: int = 5
    attn_type: str = "LLLL"
    softmax_window_size: int | None = None
    attention: str = "polarity"
    convolution: bool = True
    gate: bool = True
    padded_windows: bool = False

    def _normalised(self, checks: Checks) -> dict[str, object]:
        values = {
            "img_size": checks.image_size(self.img_size),
            "num_classes": checks.integer("num_classes", self.num_classes, least=0),
            "embed_dim": checks.integer("embed_dim", self.embed_dim),
            "depths": checks.integers("depths", self.depths),
            "num_heads": checks.integers("num_heads", self.num_heads),
            "window_size": checks.integer("window_size", self.window_size),
            "mlp_ratio": checks.number("mlp_ratio", self.mlp_ratio, least=0),
            "qkv_bias": checks.boolean("qkv_bias", self.qkv_bias),
            "ape": checks.boolean("ape", self.ape),
            "patch_norm": checks.boolean("patch_norm", self.patch_norm),
            "drop_rate": checks.number("drop_rate", self.drop_rate, least=0, below=1),
            "drop_path_rate": checks.number("drop_path_rate", self.drop_path_rate, least=0, below=1),
            "alpha": checks.alpha(self.alpha),
            "kernel_size": checks.kernel_size(self.kernel_size),
            "attn_type": _attention_types(checks, self.attn_type),
            "padded_windows": checks.boolean("padded_windows", self.padded_windows),
            **check_token_attention(self, checks),
        }
        if self.softmax_window_size is not None:
            values["softmax_window_size"] = checks.integer("softmax_window_size", self.softmax_window_size)
        softmax_window = _softmax_window(values["window_size"], values.get("softmax_window_size"))
        kinds = _block_types(values["attn_type"], values["depths"])
        checks.heads(
            *(tuple(values["embed_dim"] * 2**i for i in range(4)), values["num_heads"], kinds),
            streams=values["attention"] == "polarity",
        )
        if not values["padded_windows"]:
            _check_windows(checks, values["img_size"], kinds, {"L": values["window_size"], "S": softmax_window})
        return values

    @property
    def block_types(self) -> tuple[str, ...]:
        """One string for each stage, one letter, L or S, for each of its blocks."""
        return _block_types(self.attn_type, self.depths)

    @property
    def windows(self) -> dict[str, int]:
        """The sides of the windows of L and of S blocks, in tokens."""
        return {"L": self.window_size, "S": _softmax_window(self.window_size, self.softmax_window_size)}

    @property
    def stage_channels(self) -> tuple[int, int, int, int]:
        """Channels of each stage's map."""
        return tuple(self.embed_dim * 2**i for i in range(len(STRIDES)))

    @property
    def num_features(self) -> int:
        """Channels of the classifier's input."""
        return self.stage_channels[-1]

    def architecture(self) -> dict[str, object]:
        free = (*FREE_FIELDS, "padded_windows")
        used = {name: value for name, value in self.to_dict().items() if name not in free}
        mixed = "M" in self.attn_type
        used["window_size"] = self.windows["L"] if mixed or "L" in self.attn_type else None
        used["softmax_window_size"] = self.windows["S"] if mixed or "S" in self.attn_type else None
        return used | used_token_attention(self, mixed or "L" in self.attn_type)


class PolaSwin(Backbone):
    """Pola-Swin, an image classifier.

    On images of another size (`features`) windows keep their sides, and are padded where these do not divide the grid.
    Absolute positions are interpolated bicubically.

    Args:
        config: the hyper-parameters; None: `PolaSwinConfig(**hyperparameters)`.
        dtype: of activations and matrix products: bfloat16, float32 or float64.
        param_dtype: of the stored parameters: float32 or float64.
        attention_impl: how attention and the MLPs are computed: "auto", "xla" or "pallas" (see `polarity_attention`,
            `Block` and, for softmax within windows, `softmax_in_windows`).
        rngs: source of the keys for initial parameters, by `rngs.params()`.
        hyperparameters: fields of `PolaSwinConfig`, if no config is given.

    Raises:
        UserError: lists everything that does not fit.
    """

    Config = PolaSwinConfig
    epsilon = EPSILON

    def __init__(
        self,
        config: PolaSwinConfig | None = None,
        *,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        attention_impl: str = "auto",
        rngs: nnx.Rngs,
        **hyperparameters,
    ):
        config = resolve_config(PolaSwinConfig, config, hyperparameters)
        dtype, param_dtype = check_computation(
            config.family, dtype=dtype, param_dtype=param_dtype, attention_impl=attention_impl
        )
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": Keys.of(rngs)}
        kinds, windows = config.block_types, config.windows

        def block(i: int, j: int, drop_path: float) -> SwinBlock:
            grid, dim, kind = config.img_size // STRIDES[i], config.embed_dim * 2**i, kinds[i][j]
            window = min(windows[kind], grid)
            common = {"qkv_bias": config.qkv_bias, "drop_rate": config.drop_rate, "attention_impl": attention_impl}
            if kind == "S":
                attn = WindowAttention(dim, config.num_heads[i], window=window, **common, **types)
            else:
                layers = {"grid": (window, window), "projections": "qkvg", **common, **types}
                attn = token_attention(config, dim, config.num_heads[i], **layers)
            return SwinBlock(
                attn,
                dim,
                window=window,
                shifted=j % 2 == 1,
                mlp_ratio=config.mlp_ratio,
                epsilon=EPSILON,
                drop_rate=config.drop_rate,
                drop_path=drop_path,
                implementation=attention_impl,
                **types,
            )

        self.patch_embed = PatchEmbed(4, 3, config.embed_dim, patch_norm=config.patch_norm, **types)
        shape = (1, (config.img_size // STRIDES[0]) ** 2, config.embed_dim)
        self.absolute_pos_embed = table(shape, param_dtype=param_dtype, rngs=types["rngs"]) if config.ape else None
        stages = []
        for i, rates in enumerate(drop_path_rates(config.drop_path_rate, config.depths)):
            merging = PatchMerging(config.embed_dim * 2**i, **types) if i < 3 else None
            stages.append(Stage([block(i, j, rate) for j, rate in enumerate(rates)], merging))
        self.layers = nnx.List(stages)
        self.norm = layer_norm(config.embed_dim * 8, epsilon=EPSILON, **types)
        self.head = classifier(config.num_features, config.num_classes, **types)
        self.config, self.dtype, self.info = config, dtype, ModelInfo()

    def blocks(self, stage: int) -> Sequence[Block]:
        return self.layers[stage].blocks

    def is_padded(self) -> bool:
        """Whether there are padded windows at the model's own image size."""
        sides = [self.config.img_size // stride for stride in STRIDES]
        return any(block.windows((side, side)).is_padded for i, side in enumerate(sides) for block in self.blocks(i))

    def _enter(self, stage: int, x: jax.Array, grid: Grid, next_key: Callable[[], jax.Array | None]) -> jax.Array:
        if stage > 0:
            return self.layers[stage - 1].downsample(x, (2 * grid[0], 2 * grid[1]))
        x = self.patch_embed(x.astype(self.dtype))  # (B, N, C)
        if self.absolute_pos_embed is not None:
            side = self.config.img_size // STRIDES[0]
            x = x + table_on(self.absolute_pos_embed[...], (side, side), grid, "bicubic").astype(self.dtype)
        return dropout(x, self.config.drop_rate, next_key())

    def _pool(self, tokens: jax.Array) -> jax.Array:
        return jnp.mean(self.norm(tokens), axis=1, dtype=accumulation_dtype(tokens.dtype))


def _attention_types(checks: Checks, attn_type) -> str:
    """The four letters, and for mixed stages the number of their linear blocks."""
    letters = checks.letters("attn_type", attn_type, "LSM", suffix=True)
    letters, suffix = letters[:4], letters[4:]
    given = suffix.isdecimal() and len(suffix) <= 4
    if ("M" in letters) != given or (suffix and not given):
        checks.problems.append(
            f"attn_type={attn_type!r}: a number after the four letters sets how many blocks of a stage of type M are "
            "linear, as in 'LMSL1'; it is required with M, and not allowed without"
        )
        return "LLLL"
    return letters + (str(int(suffix)) if given else "")


def _block_types(attn_type: str, depths: tuple[int, ...]) -> tuple[str, ...]:
    linear_blocks = int(attn_type[4:] or 0)
    return tuple(
        letter * depth if letter != "M" else ("L" * linear_blocks + "S" * depth)[:depth]
        for letter, depth in zip(attn_type[:4], depths, strict=True)
    )


def _softmax_window(window_size: int, softmax_window_size: int | None) -> int:
    """The window of S blocks: the one given, or that of the official rule."""
    return softmax_window_size if softmax_window_size is not None else 7 if window_size <= 56 else 12


def _check_windows(checks: Checks, img_size: int, kinds: tuple[str, ...], windows: dict[str, int]) -> None:
    """Checks that every grid is at most as large as its windows, or a multiple of them."""
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
    checks.problems.append(
        f"img_size={img_size} does not fit the windows, which must divide each grid larger than they are: "
        f"{'; '.join(line for lines in found.values() for line in lines)}. Windows are padded with padded_windows=True."
        f" What would fit: {'; or '.join(ways)}"
    )
