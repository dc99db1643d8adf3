"""A backbone that hardly costs time to compile, under the name "means": for tests of what surrounds a segmenter.

Each map is a dense layer of the means of its stride's patches.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import ClassVar
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx

from polaformer_jax.models import families, registry
from polaformer_jax.models.initializers import Keys
from polaformer_jax.models.layers import linear
from polaformer_jax.models.model_config import STRIDES, Checks, ModelConfig, resolve_config
from polaformer_jax.models.model_info import ModelInfo

NAME = "means"
_CHANNELS = (4, 4, 6, 6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeansConfig(ModelConfig):
    family: ClassVar[str] = "Means"

    img_size: int = 32
    num_classes: int = 1000
    drop_path_rate: float = 0.0

    def _normalised(self, checks: Checks) -> dict[str, object]:
        return {
            "img_size": checks.image_size(self.img_size),
            "num_classes": checks.integer("n", self.num_classes, least=0),
        }

    def architecture(self) -> dict[str, object]:
        return {}

    @property
    def num_heads(self) -> tuple[int, ...]:
        return (1, 1, 1, 1)

    @property
    def stage_channels(self) -> tuple[int, ...]:
        return _CHANNELS


class Means(nnx.Module):
    Config = MeansConfig
    epsilon = 1e-6
    remat = frozen_statistics = False

    def __init__(self, config=None, *, rngs, dtype="float32", param_dtype="float32", attention_impl="auto", **given):
        self.config = resolve_config(MeansConfig, config, given)
        types = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(param_dtype), "rngs": Keys.of(rngs)}
        self.layers = nnx.List([linear(3, width, **types) for width in _CHANNELS])
        self.dtype, self.info = types["dtype"], ModelInfo()

    def features(self, images: jax.Array, train=False, rngs=None, *, mask=None) -> list[jax.Array]:
        batch, height, width, _ = images.shape
        return [
            jax.nn.relu(layer(images.reshape(batch, height // s, s, width // s, s, 3).mean(axis=(2, 4))))
            for s, layer in zip(STRIDES, self.layers, strict=True)
        ]


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """While it lasts, segmenters may be built on it."""
    with (
        mock.patch.dict(registry._MODELS, {NAME: MeansConfig()}),
        mock.patch.dict(families.BACKBONES, {MeansConfig.family: Means}),
    ):
        yield
