"""What is learnt: a task maps a batch to the model's arguments, to the loss and to metrics.

Step, loop and evaluation know no modality; they know this interface.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from polaformer_jax.data.images import device_transforms
from polaformer_jax.training.metrics import Sums, masked

Batch = dict[str, jax.Array]

# Mean and standard deviation of ImageNet's pixels, RGB in [0, 1]: what the official weights expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Task(Protocol):
    def inputs(self, batch: Batch) -> jax.Array:
        """What the model is called with in evaluation."""

    def augmented(self, batch: Batch, key: Callable[[str], jax.Array]) -> Batch:
        """A training batch with `inputs`, what the model is called with, and all that `losses` needs.

        The whole batch, so that its examples may be mixed; it is split up only afterwards. `key` gives the random key
        of a purpose.
        """

    def losses(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """The training loss of each example of an augmented batch, (B,), float32 or wider."""

    def metrics(self, logits: jax.Array, batch: Batch) -> Sums:
        """Evaluation metrics, summed over the batch's unmasked examples."""

    def outputs(self, logits: jax.Array) -> Batch:
        """What is reported of each example: arrays of length B."""


@dataclasses.dataclass(frozen=True)
class ImageClassification:
    """Images (B, S, S, 3) uint8, one label each; cross-entropy with smoothed and, where asked for, mixed targets.

    Attributes:
        erase_prob: of erasing a box of an image.
        mixup, cutmix, mix_prob, switch_prob: see `device_transforms.mix`.
        dtype: in which augmented images are held; that of the model's computation.
    """

    num_classes: int
    label_smoothing: float = 0.0
    erase_prob: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    switch_prob: float = 0.5
    dtype: Any = jnp.float32

    def inputs(self, batch: Batch) -> jax.Array:
        return normalise(batch["image"])

    def augmented(self, batch: Batch, key: Callable[[str], jax.Array]) -> Batch:
        images, mask = normalise(batch["image"]), batch["mask"]
        if self.erase_prob:
            images = device_transforms.random_erasing(images, key("erase"), probability=self.erase_prob)
        images, share = device_transforms.mix(
            images,
            mask,
            key("mix"),
            mixup=self.mixup,
            cutmix=self.cutmix,
            probability=self.mix_prob,
            switch_probability=self.switch_prob,
        )
        targets = device_transforms.mixed_targets(
            batch["label"],
            share,
            num_classes=self.num_classes,
            label_smoothing=self.label_smoothing,
            dtype=jnp.promote_types(self.dtype, jnp.float32),
        )
        return {"inputs": images.astype(self.dtype), "targets": targets, "label": batch["label"], "mask": mask}

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

    def outputs(self, logits: jax.Array) -> Batch:
        prediction = jnp.argmax(logits, -1)
        return {"prediction": prediction, "probability": jnp.max(jax.nn.softmax(logits), -1)}


def _rank(logits: jax.Array, label: jax.Array) -> jax.Array:
    """(B, classes), (B,) -> (B,): how many classes stand before the label; of equals the lower one, a NaN before all.

    `top_k` would gather the logits of all devices on each of them.
    """
    index, label = jnp.arange(logits.shape[-1])[None, :], label[:, None]
    own = jnp.sum(jnp.where(index == label, logits, 0), -1, keepdims=True)
    after = (logits < own) | ((logits == own) & (index >= label))
    return jnp.sum(~after, -1)


def normalise(images: jax.Array) -> jax.Array:
    """uint8 RGB images (..., 3) to float32 of about zero mean and unit variance."""
    shape = (1,) * (images.ndim - 1) + (3,)
    mean = jnp.asarray(IMAGENET_MEAN, jnp.float32).reshape(shape)
    std = jnp.asarray(IMAGENET_STD, jnp.float32).reshape(shape)
    return (images.astype(jnp.float32) / 255 - mean) / std
