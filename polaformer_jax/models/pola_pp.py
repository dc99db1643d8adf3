"""PolaFormer++: convolutional stem, linear and softmax blocks with rotary positions and gates, batch normalisation.

Source: the authors' code, https://github.com/ZacharyMeng/PolaFormerPP (of their paper on it nothing was used). The
family is not purely linear: the published models have linear blocks in their first two stages, softmax blocks in the
others. Maps are (B, H, W, C), tokens (B, H * W, C), row by row.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from polaformer_jax.errors import UserError
from polaformer_jax.models.backbone import Backbone
from polaformer_jax.models.batch_norm import BatchNorm, Conv, conv_norm
from polaformer_jax.models.conv_stem import Downsample, Stem
from polaformer_jax.models.depthwise import depthwise_conv
from polaformer_jax.models.initializers import Keys, constant, normal_init
from polaformer_jax.models.layers import (
    ConvParams,
    Grid,
    ResidualBlock,
    accumulation_dtype,
    drop_path_rates,
    gelu,
    layer_norm,
    linear,
    rematerialised,
    split_key,
    stochastic_depth,
)
from polaformer_jax.models.model_config import Checks, ModelConfig, check_computation, resolve_config
from polaformer_jax.models.model_info import ModelInfo
from polaformer_jax.models.rotary_attention import ATTENTIONS

EPSILON = 1e-6  # of LayerNorm


class FeedForward(nnx.Module):
    """fc1, exact GELU, a depthwise 3x3 convolution added, fc2."""

    def __init__(self, dim: int, hidden: int, *, dtype, param_dtype, rngs):
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.fc1 = linear(dim, hidden, uniform=True, **types)
        self.dwconv = ConvParams((3, 3), 1, hidden, init=normal_init, param_dtype=param_dtype, rngs=rngs)
        self.fc2 = linear(hidden, dim, uniform=True, **types)

    @jax.named_scope("mlp")
    def __call__(self, x: jax.Array, grid: Grid) -> jax.Array:
        u = gelu(self.fc1(x))
        y = depthwise_conv(u, self.dwconv.kernel[...], self.dwconv.bias[...], grid=grid)
        return self.fc2((u + y).astype(x.dtype))


class Norm(nnx.Module):
    """A LayerNorm over channels, under the official name `norm.norm`."""

    def __init__(self, dim: int, **types):
        self.norm = layer_norm(dim, epsilon=EPSILON, **types)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(x)


class PPBlock(ResidualBlock):
    """A depthwise convolution, attention and MLP, each added; the last two scaled by `gamma` where there is one."""

    def __init__(
        self,
        kind: str,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        layer_scale: float | None,
        drop_path: float,
        **types,
    ):
        rngs, param_dtype = types["rngs"], types["param_dtype"]
        self.pos = ConvParams((3, 3), 1, dim, init=normal_init, param_dtype=param_dtype, rngs=rngs)
        self.norm1 = Norm(dim, **types)
        self.attn = ATTENTIONS[kind](dim, num_heads, **types)
        self.norm2 = Norm(dim, **types)
        self.ffn = FeedForward(dim, int(mlp_ratio * dim), **types)
        shape = {"param_dtype": param_dtype, "rngs": rngs}
        scaled = layer_scale is not None
        self.gamma_1 = constant(layer_scale, (1, 1, 1, dim), **shape) if scaled else None
        self.gamma_2 = constant(layer_scale, (1, 1, 1, dim), **shape) if scaled else None
        self.drop_path = drop_path

    @jax.named_scope("block")
    def __call__(self, x: jax.Array, key: jax.Array | None = None, *, grid: Grid) -> jax.Array:
        """(B, N, C) -> (B, N, C)"""
        key1, key2 = split_key(key, 2)
        x = self._with_positions(x, grid)
        x = x + stochastic_depth(_scaled(self.attn(self.norm1(x), grid), self.gamma_1), self.drop_path, key1)
        return x + stochastic_depth(_scaled(self.ffn(self.norm2(x), grid), self.gamma_2), self.drop_path, key2)

    def _with_positions(self, x: jax.Array, grid: Grid) -> jax.Array:
        return x + depthwise_conv(x, self.pos.kernel[...], self.pos.bias[...], grid=grid).astype(x.dtype)

    def attention_input(self, x: jax.Array, grid: Grid) -> jax.Array:
        """What the attention takes of the tokens (B, N, C) that enter the block."""
        return self.norm1(self._with_positions(x, grid))


def _scaled(x: jax.Array, gamma: nnx.Param | None) -> jax.Array:
    return x if gamma is None else x * gamma[...].astype(x.dtype).reshape(1, 1, -1)


class Stage(nnx.Module):
    """The blocks of one resolution, and the layers that lead to the next (None after the last stage)."""

    def __init__(self, blocks: Sequence[PPBlock], downsample: Downsample | None):
        self.blocks, self.downsample = nnx.List(blocks), downsample


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolaPPConfig(ModelConfig):
    """Hyper-parameters of a `PolaPP`, with the official names; `registry` holds the published models.

    Attributes:
        img_size: side of the images in pixels that the model is meant for, a multiple of 32. It takes any others too.
        num_classes: 0 omits the classifier.
        embed_dims, depths, num_heads, mlp_ratios: one value for each stage.
        flags: one word for each stage, with a letter for each block: l (linear attention) or v (softmax attention).
            In a stage with one kind of block a single letter is enough.
        projection: channels of the classifier's input.
        layerscales: for each stage, whether its blocks scale what they add.
        layer_init_values: the initial value of that scale, for each stage.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.

    Raises:
        UserError: lists everything that does not fit.
    """

    family: ClassVar[str] = "PolaPP"

    img_size: int = 224
    num_classes: int = 1000
    embed_dims: Sequence[int] = (64, 128, 256, 512)
    depths: Sequence[int] = (2, 2, 6, 2)
    num_heads: Sequence[int] = (1, 2, 4, 8)
    mlp_ratios: Sequence[float] = (3.5, 3.5, 3.5, 3.5)
    flags: Sequence[str] = ("l", "l", "v", "v")
    projection: int = 2048
    layerscales: Sequence[bool] = (True, True, True, True)
    layer_init_values: Sequence[float] = (1.0, 1.0, 1.0, 1.0)
    drop_path_rate: float = 0.0

    def _normalised(self, checks: Checks) -> dict[str, object]:
        values = {
            "img_size": checks.image_size(self.img_size),
            "num_classes": checks.integer("num_classes", self.num_classes, least=0),
            "embed_dims": checks.integers("embed_dims", self.embed_dims),
            "depths": checks.integers("depths", self.depths),
            "num_heads": checks.integers("num_heads", self.num_heads),
            "mlp_ratios": checks.numbers("mlp_ratios", self.mlp_ratios, least=0),
            "projection": checks.integer("projection", self.projection),
            "layerscales": checks.booleans("layerscales", self.layerscales),
            "layer_init_values": checks.numbers("layer_init_values", self.layer_init_values, least=0),
            "drop_path_rate": checks.number("drop_path_rate", self.drop_path_rate, least=0, below=1),
        }
        values["flags"] = checks.words("flags", self.flags, "lv", values["depths"])
        for stage, (dim, heads) in enumerate(zip(values["embed_dims"], values["num_heads"], strict=True)):
            if dim % heads or dim // heads % 4:
                checks.problems.append(
                    f"num_heads[{stage}]={heads} over {dim} channels: heads must divide them into widths that are"
                    " multiples of 4, since rotary positions turn pairs of channels along two axes"
                )
        if values["embed_dims"][0] % 2:
            checks.problems.append(f"embed_dims[0]={values['embed_dims'][0]}: expected an even number")
        return values

    @property
    def stage_channels(self) -> tuple[int, int, int, int]:
        """Channels of each stage's map."""
        return self.embed_dims

    @property
    def num_features(self) -> int:
        """Channels of the classifier's input."""
        return self.projection if self.num_classes else self.embed_dims[-1]

    def architecture(self) -> dict[str, object]:
        free = ("img_size", "num_classes", "drop_path_rate", "layer_init_values")
        return {name: value for name, value in self.to_dict().items() if name not in free}


class PolaPP(Backbone):
    """PolaFormer++, an image classifier for images of any size that is a multiple of 32, not square ones too.

    Its batch normalisations have running statistics, which are part of its state (`nnx.BatchStat`). In training they
    normalise by the statistics of the batch, and take them up; evaluation folds the running ones into the convolutions
    before them.

    Args:
        config: the hyper-parameters; None: `PolaPPConfig(**hyperparameters)`.
        dtype: of activations and matrix products: bfloat16, float32 or float64.
        param_dtype: of the stored parameters: float32 or float64.
        attention_impl: "auto" or "xla": this family has no kernel of its own.
        rngs: source of the keys for initial parameters, by `rngs.params()`.
        hyperparameters: fields of `PolaPPConfig`, if no config is given.

    Raises:
        UserError: lists everything that does not fit.
    """

    Config = PolaPPConfig
    epsilon = EPSILON
    any_image_size = True

    def __init__(
        self,
        config: PolaPPConfig | None = None,
        *,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        attention_impl: str = "auto",
        rngs: nnx.Rngs,
        **hyperparameters,
    ):
        config = resolve_config(PolaPPConfig, config, hyperparameters)
        dtype, param_dtype = check_computation(
            config.family, dtype=dtype, param_dtype=param_dtype, attention_impl=attention_impl
        )
        if attention_impl == "pallas":
            raise UserError("attention_impl='pallas': PolaFormer++ has no kernel of its own; give 'auto' or 'xla'")
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": Keys.of(rngs)}
        dims = config.embed_dims
        self.patch_embed = Stem(dims[0], **types)
        stages = []
        for i, rates in enumerate(drop_path_rates(config.drop_path_rate, config.depths)):
            blocks = [
                PPBlock(
                    kind,
                    dims[i],
                    config.num_heads[i],
                    mlp_ratio=config.mlp_ratios[i],
                    layer_scale=config.layer_init_values[i] if config.layerscales[i] else None,
                    drop_path=rate,
                    **types,
                )
                for kind, rate in zip(config.flags[i], rates, strict=True)
            ]
            stages.append(Stage(blocks, Downsample(dims[i], dims[i + 1], **types) if i + 1 < len(dims) else None))
        self.layers = nnx.List(stages)
        width, full = config.projection, {**types, "dtype": accumulation_dtype(dtype)}
        classifies = config.num_classes > 0
        self.proj = Conv(1, dims[-1], width, **types) if classifies else None
        self.norm = BatchNorm(width, param_dtype=param_dtype, rngs=types["rngs"]) if classifies else None
        self.head = Classifier(width, config.num_classes, **full) if classifies else None
        self.config, self.dtype, self.info = config, dtype, ModelInfo()

    def __call__(
        self, images: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None, *, mask: jax.Array | None = None
    ) -> jax.Array:
        """Logits of normalised images.

        Args:
            images: (batch, height, width, 3), of a float dtype; height and width multiples of 32.
            train: normalise by the statistics of the batch, which the running ones take up; apply stochastic depth.
            rngs: source of the keys for `train`, by `rngs.dropout()`.
            mask: (batch,) bool, in training: the others do not count in the statistics. None: all are valid.

        Returns:
            (batch, num_classes), at least float32; without a classifier (num_classes 0) the result of `pooled`.
        """
        pooled = self.pooled(images, train=train, rngs=rngs, mask=mask)
        return pooled if self.head is None else self.head(pooled)

    def pooled(self, images, train=False, rngs=None, *, mask=None) -> jax.Array:
        """The classifier's input, (batch, projection); without a classifier the mean of the last stage's map."""
        mask = self._mask(images, train, mask)
        *_, x = self._maps(images, self._key_source(images, train, rngs), mask)
        with jax.named_scope("head"):
            if self.head is None:
                return jnp.mean(x, axis=(1, 2), dtype=accumulation_dtype(x.dtype))
            x = conv_norm(self.proj, self.norm, x, mask)
            x = x.astype(accumulation_dtype(x.dtype))
            return jnp.mean(jax.nn.silu(x), axis=(1, 2))

    def features(self, images, train=False, rngs=None, *, mask=None) -> list[jax.Array]:
        """The output of each stage before the layers between stages: (batch, H / s, W / s, C), s = 4, 8, 16, 32."""
        return list(self._maps(images, self._key_source(images, train, rngs), self._mask(images, train, mask)))

    def tokens_before(self, images: jax.Array, *, stage: int, block: int) -> jax.Array:
        """The tokens (batch, tokens, channels) that enter a block in evaluation; stage and block are counted from 0."""
        x = self.patch_embed(images.astype(self.dtype), None)
        for i in range(stage):
            x = self._downsampled(i, self._through(i, x, len(self.layers[i].blocks), lambda: None), None)
        return _tokens(self._through(stage, x, block, lambda: None))

    def _maps(
        self, images: jax.Array, next_key: Callable[[], jax.Array | None], mask: jax.Array | None
    ) -> Iterator[jax.Array]:
        x = self.patch_embed(images.astype(self.dtype), mask)
        for i, stage in enumerate(self.layers):
            x = self._through(i, x, len(stage.blocks), next_key)
            yield x
            x = self._downsampled(i, x, mask)

    def _through(self, stage: int, x: jax.Array, count: int, next_key: Callable[[], jax.Array | None]) -> jax.Array:
        """A map through the first `count` blocks of a stage."""
        shape = x.shape
        x = _tokens(x)
        for block in self.blocks(stage)[:count]:
            key, static = next_key(), {"grid": shape[1:3]}
            x = rematerialised(block, x, key, static=static) if self.remat else block(x, key, **static)
        return x.reshape(shape)

    def _downsampled(self, stage: int, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        downsample = self.layers[stage].downsample
        return x if downsample is None else downsample(x, mask)

    def blocks(self, stage: int) -> Sequence[PPBlock]:
        return self.layers[stage].blocks

    def _mask(self, images: jax.Array, train: bool, mask: jax.Array | None) -> jax.Array | None:
        """The examples whose statistics normalise the batch; None where the running ones do."""
        if not train or self.frozen_statistics:
            return None
        return jnp.ones(images.shape[0], bool) if mask is None else mask


class Classifier(Conv):
    """The head, a 1x1 convolution of the pooled map: a linear layer with the official layout."""

    def __init__(self, features_in: int, features_out: int, **types):
        super().__init__(1, features_in, features_out, **types)
        self.out_features = features_out

    @jax.named_scope("head")
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, in) -> (B, out)"""
        return self.apply(x[:, None, None, :], self.kernel[...], self.bias[...])[:, 0, 0]


def _tokens(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1, x.shape[-1])  # (B, H, W, C) -> (B, N, C)
