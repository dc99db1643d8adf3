"""Pola-PVT: the Pyramid Vision Transformer with polarity-aware linear attention in place of its own.

Source: PolaFormer (ICLR 2025, arXiv 2501.15061) and its code, https://github.com/ZacharyMeng/PolaFormer; the pyramid is
Wang et al., "Pyramid Vision Transformer", ICCV 2021, arXiv 2102.12122.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from polaformer_jax.models.attention import PolarityAttention
from polaformer_jax.models.backbone import STRIDES, Arguments, Backbone, classifier
from polaformer_jax.models.initializers import Keys, table
from polaformer_jax.models.layers import (
    Block,
    PatchConv,
    PatchEmbed,
    drop_path_rates,
    dropout,
    layer_norm,
    linear,
    product,
    wide,
)

EPSILON = 1e-6  # of the blocks' LayerNorm; those after patch embedding and spatial reduction have 1e-5


class SpatialReductionAttention(nnx.Module):
    """Softmax attention (type S) whose keys and values are reduced by a strided convolution where sr_ratio > 1."""

    def __init__(
        self, dim: int, num_heads: int, *, grid: int, sr_ratio: int, qkv_bias: bool, drop_rate: float, **types
    ):
        self.q = linear(dim, dim, use_bias=qkv_bias, **types)
        self.kv = linear(dim, 2 * dim, use_bias=qkv_bias, **types)
        if sr_ratio > 1:
            self.sr = PatchConv(sr_ratio, dim, dim, **types)
            self.norm = layer_norm(dim, epsilon=1e-5, **types)
        self.proj = linear(dim, dim, **types)
        self.num_heads, self.grid, self.sr_ratio, self.drop_rate = num_heads, grid, sr_ratio, drop_rate

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """(B, N, C) -> (B, N, C)"""
        q, k, v = self.project(x)
        scores = product("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        return dropout(self.proj(y), self.drop_rate, key)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tokens (B, N, C) -> queries (B, N, h, d), keys and values (B, n, h, d)."""
        batch, tokens, dim = x.shape
        source = x
        if self.sr_ratio > 1:
            source = self.norm(self.sr(x.reshape(batch, self.grid, self.grid, dim)))  # (B, n, C)
        q = self.q(x).reshape(batch, tokens, self.num_heads, -1)
        k, v = jnp.moveaxis(self.kv(source).reshape(batch, -1, 2, self.num_heads, q.shape[-1]), 2, 0)
        return q, k, v


class PolaPVT(Backbone):
    """Pola-PVT. Arguments have the official names and defaults; the zoo holds the published combinations.

    Args:
        img_size: side of the square images, a multiple of 32.
        num_classes: 0 leaves the classifier out.
        embed_dims, num_heads, mlp_ratios, depths: one value a stage.
        qkv_bias: whether the layers that make queries, keys, values and gates have a bias.
        sr_ratios: spatial reduction of keys and values, one value a stage; acts in stages of type S.
        la_sr_ratios: the same for stages of type L, as one digit a stage: "1111".
        drop_rate: dropout after the position embedding, the attention's projection and in the MLP.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
        alpha, kernel_size: of the polarity-aware attention. attention_impl: how to compute it: "auto", "xla", "pallas"
            (see `polarity_attention`).
        attn_type: one letter a stage, L (polarity-aware linear) or S (softmax).
        dtype: of the computation: bfloat16, float32, float64. param_dtype: of the stored parameters.

    Raises:
        ValueError: with everything that does not fit.
    """

    def __init__(
        self,
        img_size: int = 224,
        num_classes: int = 1000,
        *,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        qkv_bias: bool = False,
        depths: Sequence[int] = (3, 4, 6, 3),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        la_sr_ratios: str = "8421",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        alpha: float = 4,
        kernel_size: int = 5,
        attention_impl: str = "auto",
        attn_type: str = "LLLL",
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        given = Arguments("PolaPVT", locals())
        img_size = given.image_size(img_size)
        num_classes = given.integer("num_classes", num_classes, least=0)
        embed_dims = given.integers("embed_dims", embed_dims)
        num_heads = given.integers("num_heads", num_heads)
        mlp_ratios = given.numbers("mlp_ratios", mlp_ratios, least=0)
        depths = given.integers("depths", depths)
        drop_rate = given.number("drop_rate", drop_rate, least=0, below=1)
        drop_path_rate = given.number("drop_path_rate", drop_path_rate, least=0, below=1)
        alpha, kernel_size = given.attention(alpha, kernel_size, attention_impl)
        kinds = given.letters("attn_type", attn_type, "LS", suffix=False)
        given.heads(embed_dims, num_heads, tuple(kinds))
        ratios = _reductions(given, img_size, kinds, sr_ratios, la_sr_ratios)
        dtype, param_dtype = given.types(dtype, param_dtype)
        given.check()
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": Keys.of(rngs)}

        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            grid, dim = img_size // STRIDES[i], embed_dims[i]
            size, features_in = (4, 3) if i == 0 else (2, embed_dims[i - 1])
            common = {"qkv_bias": qkv_bias, "sr_ratio": ratios[i], "drop_rate": drop_rate, **types}

            def attention(i=i, grid=grid, dim=dim, common=common):
                if kinds[i] == "S":
                    return SpatialReductionAttention(dim, num_heads[i], grid=grid, **common)
                return PolarityAttention(
                    dim,
                    num_heads[i],
                    grid=(grid, grid),
                    projections="qg_kv",
                    alpha=alpha,
                    kernel_size=kernel_size,
                    attention_impl=attention_impl,
                    **common,
                )

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
                            mlp_ratio=mlp_ratios[i],
                            epsilon=EPSILON,
                            drop_rate=drop_rate,
                            drop_path=rate,
                            **types,
                        )
                        for rate in rates
                    ]
                ),
            )
        self.head = classifier(embed_dims[-1], num_classes, **types)
        self.img_size, self.drop_rates, self.dtype = img_size, (drop_rate, drop_path_rate), dtype
        self.arguments = given.record()

    def blocks(self, stage: int) -> Sequence[Block]:
        return getattr(self, f"block{stage + 1}")

    def _enter(self, stage: int, x: jax.Array, next_key: Callable[[], jax.Array | None]) -> jax.Array:
        if stage == 0:
            x = x.astype(self.dtype)
        else:
            x = x.reshape(x.shape[0], self.img_size // STRIDES[stage - 1], -1, x.shape[-1])  # (B, H, W, C)
        x = getattr(self, f"patch_embed{stage + 1}")(x)  # (B, N, C')
        x = x + getattr(self, f"pos_embed{stage + 1}")[...].astype(self.dtype)
        return dropout(x, self.drop_rates[0], next_key())

    def _pool(self, tokens: jax.Array) -> jax.Array:
        # No normalisation: the official model has a final `norm`, and never calls it.
        return jnp.mean(tokens, axis=1, dtype=wide(tokens.dtype))


def _reductions(given: Arguments, img_size: int, kinds: str, sr_ratios, la_sr_ratios) -> tuple[int, ...]:
    """The spatial reduction that acts in each stage."""
    softmax = given.integers("sr_ratios", sr_ratios)
    digits = str(la_sr_ratios)
    if len(digits) != 4 or any(digit not in "123456789" for digit in digits):
        given.problems.append(
            f"la_sr_ratios={la_sr_ratios!r}: expected one digit from 1 to 9 for each of the four stages"
        )
        digits = "1111"
    ratios = tuple(softmax[i] if kind == "S" else int(digits[i]) for i, kind in enumerate(kinds))
    for stage, (ratio, stride) in enumerate(zip(ratios, STRIDES, strict=True)):
        grid = img_size // stride
        if grid % ratio:
            name = "sr_ratios" if kinds[stage] == "S" else "la_sr_ratios"
            divisors = ", ".join(str(r) for r in range(1, grid + 1) if grid % r == 0)
            given.problems.append(
                f"{name}[{stage}]={ratio} does not divide the stage's grid of {grid}x{grid} tokens: choose one of "
                f"{divisors}, or another img_size"
            )
    return ratios
