"""What Pola-PVT and Pola-Swin share: four stages, and the ways to call a model."""

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from polaformer_jax.models.initializers import Keys
from polaformer_jax.models.layers import Block, Grid, accumulation_dtype, linear, rematerialised
from polaformer_jax.models.model_config import STRIDES, ModelConfig
from polaformer_jax.models.model_info import ModelInfo


class Backbone(nnx.Module):
    """An image classifier of four stages with strides 4, 8, 16 and 32.

    Its only state is parameters: everything else that the official code stores (relative position indices, attention
    masks) is computed from static integers in the forward pass, so that a pure dict of arrays is a complete model.

    A model is made for square images of `config.img_size`. `features` takes those of other sizes too; tables of
    positions are then interpolated in the forward pass.

    A family implements `blocks`, `_enter` and `_pool`.

    Attributes:
        config: the hyper-parameters, a `PolaPVTConfig` or `PolaSwinConfig`.
        dtype: of activations and matrix products.
        head: the classifier, or None.
        epsilon: of the LayerNorms of its blocks.
        remat: recompute each block's activations in the backward pass instead of storing them.
        info: what is known of the model besides its function, such as the names of its classes.
    """

    config: ModelConfig
    remat: bool = False
    frozen_statistics: bool = False  # batch normalisations use their running statistics in training too, and keep them
    epsilon: ClassVar[float]
    any_image_size: bool = False  # `__call__` and `pooled` too take images that are not of `config.img_size`
    info: ModelInfo

    def __call__(self, images: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Logits of normalised images.

        Args:
            images: (batch, img_size, img_size, 3), of a float dtype.
            train: apply dropout and stochastic depth, where their rates are not zero.
            rngs: source of the keys for `train`, by `rngs.dropout()`.

        Returns:
            (batch, num_classes), at least float32; without a classifier (num_classes 0) the result of `pooled`.

        Raises:
            ValueError: the images' shape or dtype does not fit, or random numbers are needed and rngs is None.
        """
        pooled = self.pooled(images, train=train, rngs=rngs)
        with jax.named_scope("head"):
            return pooled if self.head is None else self.head(pooled)

    def pooled(self, images: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """The classifier's input: (batch, channels of the last stage), at least float32."""
        *_, tokens = self._stages(images, self._key_source(images, train, rngs))
        with jax.named_scope("head"):
            return self._pool(tokens)

    def features(
        self, images: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None, *, mask: jax.Array | None = None
    ) -> list[jax.Array]:
        """The unnormalised output of each stage before patch merging, for detection and segmentation heads.

        Args:
            images: (batch, H, W, 3), of a float dtype; H and W any multiples of 32.
            train, rngs: as for a call.
            mask: (batch,) bool, the examples that count in the statistics of batches. This family has none.

        Returns:
            Four maps (batch, H / s, W / s, channels of the stage), s = 4, 8, 16, 32: `config.stage_channels`.

        Raises:
            ValueError: as for a call; or the images are too small for the stages' spatial reductions.
        """
        del mask
        stages = self._stages(images, self._key_source(images, train, rngs, any_size=True))
        return [x.reshape(x.shape[0], *self._grid(images, i), x.shape[-1]) for i, x in enumerate(stages)]

    def tokens_before(self, images: jax.Array, *, stage: int, block: int) -> jax.Array:
        """The tokens (batch, tokens, channels) that enter a block in evaluation; stage and block are counted from 0."""
        next_key = self._key_source(images, False, None)
        x = images
        for i in range(stage + 1):
            grid = self._grid(images, i)
            x = self._enter(i, x, grid, next_key)
            for earlier in self.blocks(i)[: block if i == stage else None]:
                x = earlier(x, grid=grid)
        return x

    def _stages(self, images: jax.Array, next_key: Callable[[], jax.Array | None]) -> Iterator[jax.Array]:
        """Yields the tokens (batch, tokens, channels) after the blocks of each stage."""
        x = images
        for i in range(len(STRIDES)):
            static = {"grid": self._grid(images, i)}
            with jax.named_scope("patch_embedding"):
                x = self._enter(i, x, static["grid"], next_key)
            for block in self.blocks(i):
                key = next_key()
                x = rematerialised(block, x, key, static=static) if self.remat else block(x, key, **static)
            yield x

    @staticmethod
    def _grid(images: jax.Array, stage: int) -> Grid:
        return images.shape[1] // STRIDES[stage], images.shape[2] // STRIDES[stage]

    def blocks(self, stage: int) -> Sequence[Block]:
        """The blocks of a stage, counted from 0."""
        raise NotImplementedError

    def _enter(self, stage: int, x: jax.Array, grid: Grid, next_key: Callable[[], jax.Array | None]) -> jax.Array:
        """The tokens that enter a stage's first block, from the images (stage 0) or the previous stage's tokens.

        `grid` is that of the stage.
        """
        raise NotImplementedError

    def _pool(self, tokens: jax.Array) -> jax.Array:
        raise NotImplementedError

    def _key_source(
        self, images: jax.Array, train: bool, rngs: nnx.Rngs | None, *, any_size: bool = False
    ) -> Callable[[], jax.Array | None]:
        self._check_images(images, any_size or self.any_image_size)
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images have type {images.dtype}, expected a float type: normalise them first")
        rates = (getattr(self.config, "drop_rate", 0.0), self.config.drop_path_rate)
        if not train or not any(rates):
            return lambda: None
        if rngs is None:
            raise ValueError(
                f"train=True with drop_rate, drop_path_rate = {rates} draws random numbers, and rngs is None: pass "
                "rngs=nnx.Rngs(dropout=key)"
            )
        return Keys(rngs.dropout())

    def _check_images(self, images: jax.Array, any_size: bool) -> None:
        """Raises a ValueError if the shape of the images does not fit."""
        if images.ndim and images.shape[0] == 0:
            raise ValueError(f"images have shape {tuple(images.shape)}, expected at least one")
        if any_size:
            multiple = STRIDES[-1]
            sides = images.shape[1:3]
            if images.ndim != 4 or images.shape[3] != 3 or any(side == 0 or side % multiple for side in sides):
                raise ValueError(
                    f"images have shape {tuple(images.shape)}, expected (batch, height, width, 3), channels last,"
                    f" height and width multiples of {multiple}"
                )
            return
        size = self.config.img_size
        if images.ndim != 4 or images.shape[1:] != (size, size, 3):
            raise ValueError(
                f"images have shape {tuple(images.shape)}, expected (batch, {size}, {size}, 3), channels last; resize "
                "them, or create the model with another img_size"
            )


def classifier(features: int, num_classes: int, *, dtype, param_dtype, rngs: nnx.Rngs) -> nnx.Linear | None:
    """The head, in at least float32: it is small, and the loss needs accurate logits."""
    if num_classes == 0:
        return None
    return linear(features, num_classes, dtype=accumulation_dtype(dtype), param_dtype=param_dtype, rngs=rngs)
