"""Two dense layers under the name "dense": for tests of what surrounds a model, which it hardly costs time to compile.

It takes whatever training, evaluation and weights files ask of a model of images: a config, a classifier, parameters in
nested dicts, and dropout, so that its training draws random numbers.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import ClassVar
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx

from polaformer_jax.models import registry
from polaformer_jax.models.backbone import classifier
from polaformer_jax.models.initializers import Keys
from polaformer_jax.models.layers import dropout, linear
from polaformer_jax.models.model_config import Checks, ModelConfig, resolve_config

NAME = "dense"
_PATCH = 4  # pixels a side that are averaged
_RATES = ("drop_rate", "drop_path_rate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseConfig(ModelConfig):
    """Hyper-parameters, of which `alpha` changes what the model computes and no shape."""

    family: ClassVar[str] = "Dense"

    img_size: int = 32
    num_classes: int = 1000
    hidden: int = 128
    alpha: float = 4.0
    drop_rate: float = 0.0
    drop_path_rate: float = 0.05

    def _normalised(self, checks: Checks) -> dict[str, object]:
        integers = {name: checks.integer(name, getattr(self, name)) for name in ("img_size", "num_classes", "hidden")}
        rates = {name: checks.number(name, getattr(self, name), least=0, below=1) for name in _RATES}
        return {**integers, **rates, "alpha": checks.alpha(self.alpha)}

    def architecture(self) -> dict[str, object]:
        return {"hidden": self.hidden, "alpha": self.alpha}


class Dense(nnx.Module):
    """Logits of images: means of patches, a dense layer, |x|^(1 + alpha / 4), dropout and the classifier."""

    Config = DenseConfig
    remat = False

    def __init__(self, config=None, *, rngs, dtype="float32", param_dtype="float32", attention_impl="auto", **given):
        self.config = resolve_config(DenseConfig, config, given)
        self.dtype = jnp.dtype(dtype)
        types = {"dtype": self.dtype, "param_dtype": jnp.dtype(param_dtype), "rngs": Keys.of(rngs)}
        self.body = linear((self.config.img_size // _PATCH) ** 2 * 3, self.config.hidden, **types)
        self.head = classifier(self.config.hidden, self.config.num_classes, **types)

    def __call__(self, images: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        side = self.config.img_size // _PATCH
        patches = images.reshape(-1, side, _PATCH, side, _PATCH, 3).mean(axis=(2, 4))
        hidden = jnp.abs(self.body(patches.reshape(len(images), -1))) ** (1 + self.config.alpha / 4)
        key = Keys(rngs.dropout())() if train and self.config.drop_path_rate else None
        return self.head(dropout(hidden, self.config.drop_path_rate, key))


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """While it lasts, configs may name the model."""
    models = mock.patch.dict(registry._MODELS, {NAME: DenseConfig()})
    with models, mock.patch.dict(registry.FAMILIES, {DenseConfig.family: Dense}):
        yield
