"""Two dense layers under the name "dense": for tests of what surrounds a model, which it hardly costs time to compile.

"normed" is the same with a batch normalisation between them, whose running statistics are part of the state.

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
from polaformer_jax.models.batch_norm import BatchNorm
from polaformer_jax.models.initializers import Keys
from polaformer_jax.models.layers import dropout, linear
from polaformer_jax.models.model_config import Checks, ModelConfig, resolve_config

NAME, NORMED = "dense", "normed"
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
    normed: bool = False

    def _normalised(self, checks: Checks) -> dict[str, object]:
        integers = {name: checks.integer(name, getattr(self, name)) for name in ("img_size", "num_classes", "hidden")}
        rates = {name: checks.number(name, getattr(self, name), least=0, below=1) for name in _RATES}
        return {**integers, **rates, "alpha": checks.alpha(self.alpha), "normed": self.normed}

    def architecture(self) -> dict[str, object]:
        return {"hidden": self.hidden, "alpha": self.alpha, "normed": self.normed}


class Dense(nnx.Module):
    """Logits of images: means of patches, a dense layer, |x|^(1 + alpha / 4), dropout and the classifier."""

    Config = DenseConfig
    remat = False

    def __init__(self, config=None, *, rngs, dtype="float32", param_dtype="float32", attention_impl="auto", **given):
        self.config = resolve_config(DenseConfig, config, given)
        self.dtype = jnp.dtype(dtype)
        types = {"dtype": self.dtype, "param_dtype": jnp.dtype(param_dtype), "rngs": Keys.of(rngs)}
        self.body = linear((self.config.img_size // _PATCH) ** 2 * 3, self.config.hidden, **types)
        norm = {"param_dtype": types["param_dtype"], "rngs": types["rngs"]}
        self.norm = BatchNorm(self.config.hidden, **norm) if self.config.normed else None
        self.head = classifier(self.config.hidden, self.config.num_classes, **types)

    def __call__(
        self, images: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None, *, mask: jax.Array | None = None
    ) -> jax.Array:
        side = self.config.img_size // _PATCH
        patches = images.reshape(-1, side, _PATCH, side, _PATCH, 3).mean(axis=(2, 4))
        hidden = self.normalised(self.body(patches.reshape(len(images), -1)), mask)
        hidden = jnp.abs(hidden) ** (1 + self.config.alpha / 4)
        key = Keys(rngs.dropout())() if train and self.config.drop_path_rate else None
        return self.head(dropout(hidden, self.config.drop_path_rate, key))

    def normalised(self, hidden: jax.Array, mask: jax.Array | None) -> jax.Array:
        if self.norm is None:
            return hidden
        if mask is not None:
            return self.norm(hidden[:, None, None, :], mask)[:, 0, 0]
        factor, offset = (a.reshape(1, -1) for a in self.norm.affine())
        return hidden * factor + offset


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """While it lasts, configs may name the model."""
    models = mock.patch.dict(registry._MODELS, {NAME: DenseConfig(), NORMED: DenseConfig(normed=True)})
    with models, mock.patch.dict(registry.FAMILIES, {DenseConfig.family: Dense}):
        yield
