"""Classification of images: the models of the zoo, host and device transforms."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from polaformer_jax.data import pipeline, sources
from polaformer_jax.data.images import transforms
from polaformer_jax.data.workers import Stream
from polaformer_jax.models.initializers import Keys
from polaformer_jax.training.tasks.task import ImageClassification
from polaformer_jax.weights import creation

# Fields of `config.model` that are passed on to the model's constructor where they are not None.
ARCHITECTURE = ("attn_type", "window_size", "softmax_window_size", "alpha", "kernel_size")


class ImageModality:
    """See `modality.Modality`."""

    examples = "images"
    fit = ("tables", "classifier")

    def __init__(self, config: ml_collections.ConfigDict):
        self._config = config

    def build_model(self, rngs: nnx.Rngs | Keys) -> nnx.Module:
        config = self._config.model
        model = creation.create_model(
            config.name,
            num_classes=config.num_classes,
            img_size=config.img_size,
            drop_path=config.drop_path,
            attention_impl=config.attention_impl,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
            **{name: config[name] for name in ARCHITECTURE if config[name] is not None},
        )
        model.remat = config.remat
        return model

    @functools.cached_property
    def task(self) -> ImageClassification:
        augment = self._config.augment
        return ImageClassification(
            self._config.model.num_classes,
            self._config.train.label_smoothing,
            erase_prob=augment.erase_prob,
            mixup=augment.mixup,
            cutmix=augment.cutmix,
            mix_prob=augment.mix_prob,
            switch_prob=augment.switch_prob,
            dtype=jnp.dtype(self._config.model.dtype),
        )

    def open_source(self, split: str) -> sources.Source:
        return sources.open_source(self._config.data, split)

    def train_batches(self, source: sources.Source, *, start: int, **reading: int) -> Stream:
        return pipeline.train_batches(
            source,
            transforms.train_transform(self._config),
            batch_size=self._config.train.batch_size,
            seed=self._config.seed,
            start=start,
            **reading,
        )

    def batch_indices(self, source: sources.Source, step: int) -> list[int]:
        size, seed = self._config.train.batch_size, self._config.seed
        return pipeline.batch_indices(len(source), batch_size=size, seed=seed, batch=step)

    def eval_batches(self, source: sources.Source, *, batch_size: int, **reading: int) -> pipeline.EvalBatches:
        return pipeline.EvalBatches(source, self._eval_transform, batch_size=batch_size, **reading)

    @functools.cached_property
    def _eval_transform(self) -> transforms.EvalImageTransform:
        return transforms.EvalImageTransform(
            self._config.eval.resize,
            self._config.eval.crop,
            num_classes=self._config.model.num_classes,
            on_error=self._config.data.on_error,
        )

    def batch_shapes(self) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
        size = self._config.model.img_size
        return {"image": ((size, size, 3), np.uint8), "label": ((), np.int32), "mask": ((), np.bool_)}

    def picture_of(self, source: sources.Source) -> Callable[[int], np.ndarray]:
        return lambda index: self._eval_transform(source[index], None)["image"]

    def about(self) -> Mapping[str, Any]:
        return {"preprocess": {"resize": self._config.eval.resize, "crop": self._config.eval.crop}}
