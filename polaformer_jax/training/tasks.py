"""What is learnt: a task maps a batch to the model's arguments, to the loss and to metrics.

Step, loop and evaluation know no modality; they know this interface.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import optax

from polaformer_jax.training.metrics import Sums, masked

Batch = dict[str, jax.Array]

# Mean and standard deviation of ImageNet's pixels, RGB in [0, 1]: what the official weights expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Task(Protocol):
    def inputs(self, batch: Batch) -> jax.Array:
        """What the model is called with."""

    def losses(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """The training loss of each example, (B,), float32 or wider."""

    def metrics(self, logits: jax.Array, batch: Batch) -> Sums:
        """Evaluation metrics, summed over the batch's unmasked examples."""

    def outputs(self, logits: jax.Array) -> Batch:
        """What is reported of each example: arrays of length B."""


@dataclasses.dataclass(frozen=True)
class ImageClassification:
    """Images (B, S, S, 3) uint8, one label each; cross-entropy with label smoothing."""

    num_classes: int
    label_smoothing: float = 0.0

    def inputs(self, batch: Batch) -> jax.Array:
        return normalise(batch["image"])

    def losses(self, logits: jax.Array, batch: Batch) -> jax.Array:
        targets = jax.nn.one_hot(batch["label"], self.num_classes, dtype=logits.dtype)
        return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, self.label_smoothing))

    def metrics(self, logits: jax.Array, batch: Batch) -> Sums:
        label = batch["label"]
        _, top5 = jax.lax.top_k(logits, min(5, self.num_classes))
        values = {
            "loss": optax.softmax_cross_entropy_with_integer_labels(logits, label),
            "accuracy": jnp.argmax(logits, -1) == label,
            "accuracy_top5": jnp.any(top5 == label[:, None], -1),
        }
        return {name: masked(value, batch["mask"]) for name, value in values.items()}

    def outputs(self, logits: jax.Array) -> Batch:
        prediction = jnp.argmax(logits, -1)
        return {"prediction": prediction, "probability": jnp.max(jax.nn.softmax(logits), -1)}


def normalise(images: jax.Array) -> jax.Array:
    """uint8 RGB images (..., 3) to float32 of about zero mean and unit variance."""
    shape = (1,) * (images.ndim - 1) + (3,)
    mean = jnp.asarray(IMAGENET_MEAN, jnp.float32).reshape(shape)
    std = jnp.asarray(IMAGENET_STD, jnp.float32).reshape(shape)
    return (images.astype(jnp.float32) / 255 - mean) / std
