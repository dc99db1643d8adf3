"""Heads for semantic segmentation: Semantic FPN, UPerNet and FCN, which turn the maps of a backbone into logits.

Sources: https://arxiv.org/abs/1901.02446 (Semantic FPN), https://arxiv.org/abs/1807.10221 (UPerNet), as MMSegmentation
1.2.2 builds them (https://github.com/open-mmlab/mmsegmentation). Attribute names are those of its modules, so that a
path in the parameter tree reads like a key of its `state_dict`.

Heads are called with `mask` and `key`. `mask` (B,) bool means training: batch normalisations use the statistics of the
valid examples, which the running ones take up; None means evaluation by the running statistics. A key means dropout.
Maps are (B, H, W, C), the finest first.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from polaformer_jax.models.batch_norm import BatchNorm, Conv, conv_norm
from polaformer_jax.models.initializers import Keys, kaiming_normal_init, normal_init, xavier_uniform_init
from polaformer_jax.models.layers import accumulation_dtype
from polaformer_jax.models.maps import adaptive_average_pool, resize_bilinear, resize_nearest


class ConvModule(nnx.Module):
    """A convolution without bias, batch normalisation and ReLU."""

    def __init__(self, size: int, features_in: int, features_out: int, **types):
        self.conv = Conv(size, features_in, features_out, init=kaiming_normal_init, use_bias=False, **types)
        self.bn = BatchNorm(features_out, param_dtype=types["param_dtype"], rngs=types["rngs"])

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """(B, H, W, in) -> (B, H, W, out)"""
        return jax.nn.relu(conv_norm(self.conv, self.bn, x, mask))


class PlainConv(nnx.Module):
    """A convolution with bias and nothing after it, under MMSegmentation's name `conv`."""

    def __init__(self, size: int, features_in: int, features_out: int, **types):
        self.conv = Conv(size, features_in, features_out, init=xavier_uniform_init, **types)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, in) -> (B, H, W, out)"""
        return self.conv(x)


class Upsample(nnx.Module):
    """Twice the height and width, in its place among the layers of a list."""

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        return resize_bilinear(x, (2 * x.shape[1], 2 * x.shape[2]))


class Pool(nnx.Module):
    """Adaptive average pooling, in its place among the layers of a list."""

    def __init__(self, bins: int):
        self.bins = bins

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        return adaptive_average_pool(x, self.bins)


class FPN(nnx.Module):
    """A feature pyramid: adds to each map the coarser ones, upsampled to its size, all with `width` channels.

    Args:
        channels_in: of the maps, the finest first.
        dtype: of activations and products.
        param_dtype: of the stored parameters.
        rngs: source of the keys for initial parameters, by `rngs.params()`.
    """

    def __init__(self, channels_in: Sequence[int], width: int = 256, *, dtype, param_dtype, rngs):
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": Keys.of(rngs)}
        self.channels_in = tuple(channels_in)
        self.lateral_convs = nnx.List([PlainConv(1, channels, width, **types) for channels in channels_in])
        self.fpn_convs = nnx.List([PlainConv(3, width, width, **types) for _ in channels_in])

    def __call__(self, maps: Sequence[jax.Array]) -> list[jax.Array]:
        """Maps (B, H_i, W_i, C_i) -> maps (B, H_i, W_i, width).

        Raises:
            ValueError: not the maps that it was built for.
        """
        _check(maps, self.channels_in)
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for i in reversed(range(len(laterals) - 1)):
            laterals[i] = laterals[i] + resize_nearest(laterals[i + 1], laterals[i].shape[1:3])
        return [conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=True)]


class Head(nnx.Module):
    """What all heads end with: dropout of channels, and a 1x1 convolution to logits."""

    def __init__(self, width: int, num_classes: int, dropout: float, **types):
        full = accumulation_dtype(types["dtype"])  # as of the classifier of images: the loss needs accurate logits
        init = functools.partial(normal_init, std=0.01)
        self.conv_seg = Conv(1, width, num_classes, init=init, **{**types, "dtype": full})
        self.dropout = dropout

    def _classify(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """(B, H, W, width) -> (B, H, W, classes), at least float32."""
        return self.conv_seg(_channel_dropout(x, self.dropout, key))


class SemanticFPNHead(Head):
    """Convolves and upsamples the maps of an `FPN` step by step to the finest one's size, and classifies their sum.

    Args:
        channels_in: of the maps, the finest first; each has half the height and width of the one before.
        width: channels of its own maps.
        dropout: the share of channels that are dropped before the last convolution.
        dtype, param_dtype, rngs: as for `FPN`.
    """

    def __init__(
        self,
        channels_in: Sequence[int],
        width: int = 128,
        *,
        num_classes: int,
        dropout: float = 0.1,
        dtype,
        param_dtype,
        rngs,
    ):
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": Keys.of(rngs)}
        super().__init__(width, num_classes, dropout, **types)
        self.channels_in = tuple(channels_in)
        heads = []
        for i, channels in enumerate(channels_in):
            layers = []
            for features_in in (channels, *[width] * (i - 1)):
                layers += [ConvModule(3, features_in, width, **types), Upsample()]
            heads.append(nnx.List(layers if i else layers[:1]))
        self.scale_heads = nnx.List(heads)

    def __call__(
        self, maps: Sequence[jax.Array], *, mask: jax.Array | None = None, key: jax.Array | None = None
    ) -> jax.Array:
        """Maps (B, H_i, W_i, C_i) -> logits (B, H_0, W_0, classes), at least float32.

        Raises:
            ValueError: not the maps that it was built for.
        """
        _check(maps, self.channels_in)
        total = None
        for layers, x in zip(self.scale_heads, maps, strict=True):
            for layer in layers:
                x = layer(x, mask)
            total = x if total is None else total + resize_bilinear(x, total.shape[1:3])
        return self._classify(total, key)


class UPerHead(Head):
    """Pools the last map in pyramids, adds it to the finer ones from the top down, and classifies all maps together.

    Args:
        channels_in: of the maps, the finest first.
        width: channels of its own maps.
        bins: into how many rows and columns the last map is pooled, for each part of the pyramid.
        dropout: the share of channels that are dropped before the last convolution.
        dtype, param_dtype, rngs: as for `FPN`.
    """

    def __init__(
        self,
        channels_in: Sequence[int],
        width: int = 512,
        bins: Sequence[int] = (1, 2, 3, 6),
        *,
        num_classes: int,
        dropout: float = 0.1,
        dtype,
        param_dtype,
        rngs,
    ):
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": Keys.of(rngs)}
        super().__init__(width, num_classes, dropout, **types)
        self.channels_in = tuple(channels_in)
        *finer, last = channels_in
        self.psp_modules = nnx.List([nnx.List([Pool(k), ConvModule(1, last, width, **types)]) for k in bins])
        self.bottleneck = ConvModule(3, last + len(bins) * width, width, **types)
        self.lateral_convs = nnx.List([ConvModule(1, channels, width, **types) for channels in finer])
        self.fpn_convs = nnx.List([ConvModule(3, width, width, **types) for _ in finer])
        self.fpn_bottleneck = ConvModule(3, len(channels_in) * width, width, **types)

    def __call__(
        self, maps: Sequence[jax.Array], *, mask: jax.Array | None = None, key: jax.Array | None = None
    ) -> jax.Array:
        """Maps (B, H_i, W_i, C_i) -> logits (B, H_0, W_0, classes), at least float32.

        Raises:
            ValueError: not the maps that it was built for.
        """
        _check(maps, self.channels_in)
        *finer, last = maps
        laterals = [conv(x, mask) for conv, x in zip(self.lateral_convs, finer, strict=True)]
        laterals.append(self._pooled(last, mask))
        for i in reversed(range(len(finer))):
            laterals[i] = laterals[i] + resize_bilinear(laterals[i + 1], laterals[i].shape[1:3])
        outputs = [conv(x, mask) for conv, x in zip(self.fpn_convs, laterals[:-1], strict=True)]
        outputs.append(laterals[-1])
        shape = outputs[0].shape[1:3]
        joined = jnp.concatenate([resize_bilinear(x, shape) for x in outputs], axis=-1)
        return self._classify(self.fpn_bottleneck(joined, mask), key)

    def _pooled(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """The last map with what each part of the pyramid makes of it: (B, H, W, C) -> (B, H, W, width)."""
        parts = [x]
        for layers in self.psp_modules:
            y = x
            for layer in layers:
                y = layer(y, mask)
            parts.append(resize_bilinear(y, x.shape[1:3]))
        return self.bottleneck(jnp.concatenate(parts, axis=-1), mask)


class FCNHead(Head):
    """One convolution of one map, then the classifier: the auxiliary head beside an `UPerHead`.

    Args:
        channels_in: of the map.
        width: channels after the convolution.
        dropout: the share of channels that are dropped before the last convolution.
        dtype, param_dtype, rngs: as for `FPN`.
    """

    def __init__(
        self, channels_in: int, width: int = 256, *, num_classes: int, dropout: float = 0.1, dtype, param_dtype, rngs
    ):
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": Keys.of(rngs)}
        super().__init__(width, num_classes, dropout, **types)
        self.channels_in = channels_in
        self.convs = nnx.List([ConvModule(3, channels_in, width, **types)])

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None, key: jax.Array | None = None) -> jax.Array:
        """(B, H, W, C) -> logits (B, H, W, classes), at least float32.

        Raises:
            ValueError: not the map that it was built for.
        """
        _check([x], (self.channels_in,))
        for conv in self.convs:
            x = conv(x, mask)
        return self._classify(x, key)


def _channel_dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Drops whole channels of each example with probability `rate`; kept ones are scaled by 1 / (1 - rate)."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, (x.shape[0], 1, 1, x.shape[-1]))
    return jnp.where(kept, x / (1 - rate), 0)


def _check(maps: Sequence[jax.Array], channels: tuple[int, ...]) -> None:
    """Raises a ValueError unless the maps are (B, H, W, C) with these channels."""
    if [x.ndim for x in maps] != [4] * len(channels) or tuple(x.shape[-1] for x in maps) != channels:
        raise ValueError(
            f"maps of shapes {[tuple(x.shape) for x in maps]}, expected (batch, height, width, channels) with"
            f" {', '.join(map(str, channels))} channels: give the stages of the backbone that the head was built for"
        )
