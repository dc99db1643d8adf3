"""Image classification: host transforms, augmentation on the device, cross-entropy, top-1 and top-5."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx

from polaformer_jax.data import pipeline, sources
from polaformer_jax.data.images import device_transforms, transforms
from polaformer_jax.data.images.normalisation import normalise
from polaformer_jax.data.records import Source
from polaformer_jax.data.workers import Stream
from polaformer_jax.models import registry
from polaformer_jax.models.initializers import Keys
from polaformer_jax.training.metrics import Sums, masked
from polaformer_jax.training.tasks.classification import Classification
from polaformer_jax.training.tasks.task import Batch, Shapes, computation

_ARCHITECTURE = (
    *("attn_type", "window_size", "softmax_window_size", "alpha", "kernel_size", "flags"),
    *("attention", "convolution", "gate", "mlp_ratio"),
)


class ImageClassification(Classification):
    """Images (B, S, S, 3) uint8, one label each; cross-entropy with smoothed and mixed targets. See `Task`."""

    examples = "images"
    fits = ("tables", "classifier")

    def __init__(self, config: ml_collections.ConfigDict):
        self._config = config

    def create_model(self, rngs: nnx.Rngs | Keys) -> nnx.Module:
        config = self._config.model
        model = registry.create(
            registry.model_config(
                config.name,
                num_classes=config.num_classes,
                img_size=config.img_size,
                drop_path=config.drop_path,
                **architecture(config),
            ),
            **computation(config),
            rngs=rngs,
        )
        model.remat = config.remat
        init = self._config.init
        model.frozen_statistics = init.freeze_backbone or init.freeze_statistics
        return model

    def open_source(self, split: str) -> Source:
        return sources.open_source(self._config.data, split)

    def train_batches(self, source: Source, *, start: int, **reading: Any) -> Stream:
        return pipeline.train_batches(
            source,
            transforms.train_transform(self._config),
            batch_size=self._config.train.batch_size,
            seed=self._config.seed,
            start=start,
            **reading,
        )

    def batch_indices(self, source: Source, step: int) -> list[int]:
        size, seed = self._config.train.batch_size, self._config.seed
        return pipeline.batch_indices(len(source), batch_size=size, seed=seed, batch=step)

    def eval_batches(self, source: Source, *, batch_size: int, **reading: Any) -> pipeline.EvalBatches:
        return pipeline.EvalBatches(source, self._eval_transform, batch_size=batch_size, **reading)

    @functools.cached_property
    def _eval_transform(self) -> transforms.EvalImageTransform:
        return transforms.EvalImageTransform(
            self._config.eval.resize,
            self._config.eval.crop,
            num_classes=self._config.model.num_classes,
            on_error=self._config.data.on_error,
        )

    def batch_shapes(self) -> Shapes:
        size = self._config.model.img_size
        return {"image": ((size, size, 3), np.uint8), "label": ((), np.int32), "mask": ((), np.bool_)}

    def inputs(self, batch: Batch) -> jax.Array:
        return normalise(batch["image"])

    def augment(self, batch: Batch, key: Callable[[str], jax.Array]) -> Batch:
        augment, model = self._config.augment, self._config.model
        images, mask, dtype = normalise(batch["image"]), batch["mask"], jnp.dtype(model.dtype)
        if augment.erase_prob:
            images = device_transforms.random_erasing(images, key("erase"), probability=augment.erase_prob)
        images, share = device_transforms.mix(
            images,
            mask,
            key("mix"),
            mixup=augment.mixup,
            cutmix=augment.cutmix,
            probability=augment.mix_prob,
            switch_probability=augment.switch_prob,
        )
        targets = device_transforms.mixed_targets(
            batch["label"],
            share,
            num_classes=model.num_classes,
            label_smoothing=self._config.train.label_smoothing,
            dtype=jnp.promote_types(dtype, jnp.float32),
        )
        return {"inputs": images.astype(dtype), "targets": targets, "label": batch["label"], "mask": mask}

    def losses(self, logits: jax.Array, batch: Batch) -> jax.Array:
        return optax.softmax_cross_entropy(logits, batch["targets"].astype(logits.dtype))

    def metrics(self, logits: jax.Array, batch: Batch) -> Sums:
        label = batch["label"]
        values = {
            "loss": optax.softmax_cross_entropy_with_integer_labels(logits, label),
            "accuracy": jnp.argmax(logits, -1) == label,
            "accuracy_top5": _rank(logits, label) < 5,
        }
        return {name: masked(value, batch["mask"]) for name, value in values.items()}

    def image_of(self, source: Source) -> Callable[[int], np.ndarray]:
        return lambda index: self._eval_transform(source[index], None)["image"]

    def metadata(self) -> Mapping[str, Any]:
        return {"preprocess": {"resize": self._config.eval.resize, "crop": self._config.eval.crop}}


def architecture(model: ml_collections.ConfigDict) -> dict[str, Any]:
    """The fields of `config.model` that replace those of the named model's config."""
    given = {name: model[name] for name in _ARCHITECTURE if model[name] is not None}
    if given["attention"] == "polarity":  # what all named models have, and PolaFormer++ without a choice
        del given["attention"]
    return given


def _rank(logits: jax.Array, label: jax.Array) -> jax.Array:
    """(B, classes), (B,) -> (B,): the number of classes ranked before the label.

    Ties go to the lower class, and NaN ranks before everything. (`top_k` would gather the logits of all devices on each
    of them.)
    """
    index, label = jnp.arange(logits.shape[-1])[None, :], label[:, None]
    own = jnp.sum(jnp.where(index == label, logits, 0), -1, keepdims=True)
    after = (logits < own) | ((logits == own) & (index >= label))
    return jnp.sum(~after, -1)
