"""Pola-PVT: the Pyramid Vision Transformer with polarity-aware linear attention in place of its own.

Source: PolaFormer (ICLR 2025, arXiv 2501.15061) and its code, https://github.com/ZacharyMeng/PolaFormer; the pyramid is
Wang et al., "Pyramid Vision Transformer", ICCV 2021, arXiv 2102.12122.
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
    PatchConv,
    PatchEmbed,
    accumulation_dtype,
    drop_path_rates,
    dropout,
    layer_norm,
    linear,
    product,
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

EPSILON = 1e-6  # of the blocks' LayerNorm; those after patch embedding and spatial reduction use 1e-5


class SpatialReductionAttention(nnx.Module):
    """Softmax attention (type S) whose keys and values are reduced by a strided convolution where sr_ratio > 1."""

    def __init__(self, dim: int, num_heads: int, *, sr_ratio: int, qkv_bias: bool, drop_rate: float, **types):
        self.q = linear(dim, dim, use_bias=qkv_bias, **types)
        self.kv = linear(dim, 2 * dim, use_bias=qkv_bias, **types)
        if sr_ratio > 1:
            self.sr = PatchConv(sr_ratio, dim, dim, **types)
            self.norm = layer_norm(dim, epsilon=1e-5, **types)
        self.proj = linear(dim, dim, **types)
        self.num_heads, self.sr_ratio, self.drop_rate = num_heads, sr_ratio, drop_rate

    @jax.named_scope("attention")
    def __call__(self, x: jax.Array, key: jax.Array | None = None, *, grid: Grid) -> jax.Array:
        """(B, N, C) -> (B, N, C)"""
        q, k, v = self.project(x, grid)
        with jax.named_scope("softmax_attention"):
            scores = product("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
            weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
            y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        return dropout(self.proj(y), self.drop_rate, key)

    def project(self, x: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tokens (B, N, C) -> queries (B, N, h, d), keys and values (B, n, h, d)."""
        batch, tokens, dim = x.shape
        source = x
        if self.sr_ratio > 1:
            source = self.norm(self.sr(x.reshape(batch, *grid, dim)))  # (B, n, C)
        q = self.q(x).reshape(batch, tokens, self.num_heads, -1)
        k, v = jnp.moveaxis(self.kv(source).reshape(batch, -1, 2, self.num_heads, q.shape[-1]), 2, 0)
        return q, k, v


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolaPVTConfig(ModelConfig):
    """Hyper-parameters of a `PolaPVT`, with the official names and defaults; `registry` holds the published models.

    Attributes:
        img_size: side of the square images in pixels, a multiple of 32.
        num_classes: 0 omits the classifier.
        embed_dims, num_heads, mlp_ratios, depths: one value for each stage.
        qkv_bias: whether the layers that compute queries, keys, values and gates have a bias.
        sr_ratios: spatial reduction of keys and values, one value for each stage; used in stages of type S.
        la_sr_ratios: the same for stages of type L, one digit for each stage: "1111".
        drop_rate: dropout after the position embedding, after the attention's projection and in the MLP.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
        alpha, kernel_size: of the polarity-aware attention.
        attn_type: one letter for each stage, L (polarity-aware linear attention) or S (softmax attention).
        attention, convolution, gate: what stages of type L compute, see `token_attention`.

    Raises:
        UserError: lists everything that does not fit.
    """

    family: ClassVar[str] = "PolaPVT"

    img_size: int = 224
    num_classes: int = 1000
    embed_dims: Sequence[int] = (64, 128, 256, 512)
    num_heads: Sequence[int] = (1, 2, 4, 8)
    mlp_ratios: Sequence[float] = (4, 4, 4, 4)
    qkv_bias: bool = False
    depths: Sequence[int] = (3, 4, 6, 3)
    sr_ratios: Sequence[int] = (8, 4, 2, 1)
    la_sr_ratios: str = "8421"
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    alpha: float = 4.0
    kernel_size: int = 5
    attn_type: str = "LLLL"
    attention: str = "polarity"
    convolution: bool = True
    gate: bool = True

    def _normalised(self, checks: Checks) -> dict[str, object]:
        values = {
            "img_size": checks.image_size(self.img_size),
            "num_classes": checks.integer("num_classes", self.num_classes, least=0),
            "embed_dims": checks.integers("embed_dims", self.embed_dims),
            "num_heads": checks.integers("num_heads", self.num_heads),
            "mlp_ratios": checks.numbers("mlp_ratios", self.mlp_ratios, least=0),
            "qkv_bias": checks.boolean("qkv_bias", self.qkv_bias),
            "depths": checks.integers("depths", self.depths),
            "sr_ratios": checks.integers("sr_ratios", self.sr_ratios),
            "la_sr_ratios": _digits(checks, self.la_sr_ratios),
            "drop_rate": checks.number("drop_rate", self.drop_rate, least=0, below=1),
            "drop_path_rate": checks.number("drop_path_rate", self.drop_path_rate, least=0, below=1),
            "alpha": checks.alpha(self.alpha),
            "kernel_size": checks.kernel_size(self.kernel_size),
            "attn_type": checks.letters("attn_type", self.attn_type, "LS"),
            **check_token_attention(self, checks),
        }
        checks.heads(
            *(values["embed_dims"], values["num_heads"], tuple(values["attn_type"])),
            streams=values["attention"] == "polarity",
        )
        _check_reductions(checks, values)
        return values

    @property
    def reductions(self) -> tuple[int, ...]:
        """The spatial reduction of keys and values in each stage."""
        return _reductions(self.attn_type, self.sr_ratios, self.la_sr_ratios)

    @property
    def stage_channels(self) -> tuple[int, int, int, int]:
        """Channels of each stage's map."""
        return self.embed_dims

    @property
    def num_features(self) -> int:
        """Channels of the classifier's input."""
        return self.embed_dims[-1]

    def architecture(self) -> dict[str, object]:
        used = {name: value for name, value in self.to_dict().items() if name not in FREE_FIELDS}
        ratios = list(zip(self.attn_type, self.reductions, strict=True))
        used["sr_ratios"] = tuple(ratio if kind == "S" else None for kind, ratio in ratios)
        used["la_sr_ratios"] = tuple(ratio if kind == "L" else None for kind, ratio in ratios)
        return used | used_token_attention(self, "L" in self.attn_type)


class PolaPVT(Backbone):
    """Pola-PVT, an image classifier.

    On images of another size (`features`) position embeddings are interpolated bilinearly, as in the official code, and
    the tables of the keys bicubically. A spatial reduction leaves out the rest that fills no whole patch.

    Args:
        config: the hyper-parameters; None: `PolaPVTConfig(**hyperparameters)`.
        dtype: of activations and matrix products: bfloat16, float32 or float64.
        param_dtype: of the stored parameters: float32 or float64.
        attention_impl: how polarity-aware attention and the MLPs are computed: "auto", "xla" or "pallas" (see
            `polarity_attention` and `Block`).
        rngs: source of the keys for initial parameters, by `rngs.params()`.
        hyperparameters: fields of `PolaPVTConfig`, if no config is given.

    Raises:
        UserError: lists everything that does not fit.
    """

    Config = PolaPVTConfig
    epsilon = EPSILON

    def __init__(
        self,
        config: PolaPVTConfig | None = None,
        *,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        attention_impl: str = "auto",
        rngs: nnx.Rngs,
        **hyperparameters,
    ):
        config = resolve_config(PolaPVTConfig, config, hyperparameters)
        dtype, param_dtype = check_computation(
            config.family, dtype=dtype, param_dtype=param_dtype, attention_impl=attention_impl
        )
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": Keys.of(rngs)}

        for i, rates in enumerate(drop_path_rates(config.drop_path_rate, config.depths)):
            grid, dim = config.img_size // STRIDES[i], config.embed_dims[i]
            size, features_in = (4, 3) if i == 0 else (2, config.embed_dims[i - 1])
            common = {"qkv_bias": config.qkv_bias, "sr_ratio": config.reductions[i], "drop_rate": config.drop_rate}

            def attention(heads=config.num_heads[i], kind=config.attn_type[i], grid=grid, dim=dim, common=common):
                if kind == "S":
                    return SpatialReductionAttention(dim, heads, **common, **types)
                layers = {"grid": (grid, grid), "projections": "qg_kv", **common, **types}
                return token_attention(config, dim, heads, attention_impl=attention_impl, **layers)

            setattr(self, f"patch_embed{i + 1}", PatchEmbed(size, features_in, dim, **types))
            setattr(self, f"pos_embed{i + 1}", table((1, grid**2, dim), param_dtype=param_dtype, rngs=types["rngs"]))
            setattr(
                self,
                f"block{i + 1}",
                nnx.List(
                    [
                        Block(
                            attention(),
                            dim,
                            mlp_ratio=config.mlp_ratios[i],
                            epsilon=EPSILON,
                            drop_rate=config.drop_rate,
                            drop_path=rate,
                            implementation=attention_impl,
                            **types,
                        )
                        for rate in rates
                    ]
                ),
            )
        self.head = classifier(config.num_features, config.num_classes, **types)
        self.config, self.dtype, self.info = config, dtype, ModelInfo()

    def blocks(self, stage: int) -> Sequence[Block]:
        return getattr(self, f"block{stage + 1}")

    def _enter(self, stage: int, x: jax.Array, grid: Grid, next_key: Callable[[], jax.Array | None]) -> jax.Array:
        if stage == 0:
            x = x.astype(self.dtype)
        else:
            x = x.reshape(x.shape[0], 2 * grid[0], 2 * grid[1], x.shape[-1])  # (B, H, W, C)
        x = getattr(self, f"patch_embed{stage + 1}")(x)  # (B, N, C')
        side = self.config.img_size // STRIDES[stage]
        table = table_on(getattr(self, f"pos_embed{stage + 1}")[...], (side, side), grid, "bilinear")
        x = x + table.astype(self.dtype)
        return dropout(x, self.config.drop_rate, next_key())

    def _pool(self, tokens: jax.Array) -> jax.Array:
        # No normalisation: the official model has a final `norm`, but never calls it.
        return jnp.mean(tokens, axis=1, dtype=accumulation_dtype(tokens.dtype))


def _digits(checks: Checks, la_sr_ratios) -> str:
    digits = str(la_sr_ratios)
    if len(digits) != 4 or any(digit not in "123456789" for digit in digits):
        checks.problems.append(
            f"la_sr_ratios={la_sr_ratios!r}: expected one digit from 1 to 9 for each of the four stages"
        )
        return "1111"
    return digits


def _reductions(attn_type: str, sr_ratios: Sequence[int], la_sr_ratios: str) -> tuple[int, ...]:
    return tuple(sr_ratios[i] if kind == "S" else int(la_sr_ratios[i]) for i, kind in enumerate(attn_type))


def _check_reductions(checks: Checks, values: dict) -> None:
    """Checks that the reduction of each stage divides its grid."""
    ratios = _reductions(values["attn_type"], values["sr_ratios"], values["la_sr_ratios"])
    for stage, (ratio, stride) in enumerate(zip(ratios, STRIDES, strict=True)):
        grid = values["img_size"] // stride
        if grid % ratio:
            name = "sr_ratios" if values["attn_type"][stage] == "S" else "la_sr_ratios"
            divisors = ", ".join(str(r) for r in range(1, grid + 1) if grid % r == 0)
            checks.problems.append(
                f"{name}[{stage}]={ratio} does not divide the stage's grid of {grid}x{grid} tokens: choose one of "
                f"{divisors}, or another img_size"
            )
