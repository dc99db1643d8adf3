"""Semantic segmentation: crops for training, whole images at their own size for evaluation, mean IoU.

Losses, metrics and schedules are those of MMSegmentation (https://github.com/open-mmlab/mmsegmentation).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure

from polaformer_jax.data import pipeline
from polaformer_jax.data.images.normalisation import normalise
from polaformer_jax.data.segmentation import batches
from polaformer_jax.data.segmentation.labels import IGNORED
from polaformer_jax.data.segmentation.source import SegmentationSource, open_source
from polaformer_jax.data.segmentation.transforms import EvalSegmentationTransform, TrainSegmentationTransform
from polaformer_jax.data.workers import Stream
from polaformer_jax.errors import UserError
from polaformer_jax.models import registry
from polaformer_jax.models.dense_inference import InferenceMode, by_blocks, score_maps
from polaformer_jax.models.initializers import Keys
from polaformer_jax.models.maps import resize_bilinear
from polaformer_jax.models.segmenter import Scores, Segmenter
from polaformer_jax.training.metrics import Mean, Sums, masked
from polaformer_jax.training.tasks import segmentation_pictures
from polaformer_jax.training.tasks.images import architecture
from polaformer_jax.training.tasks.task import Batch, Evaluated, Shapes, computation


class SemanticSegmentation:
    """Images (B, S, S, 3) uint8 with labels (B, S, S) uint8, 255 where there is none. See `Task`.

    The training loss of an image is the mean cross-entropy over all of its crop's pixels, in which pixels without label
    have none; with `train.loss_pixels="labelled"` the mean over the labelled pixels, of the whole batch. The loss of an
    evaluation is a mean over images.
    """

    examples = "images"
    headline = "miou"
    draws_with_model = True
    fits = ("tables", "classifier")

    def __init__(self, config: ml_collections.ConfigDict):
        self._config = config

    def create_model(self, rngs: nnx.Rngs | Keys) -> Segmenter:
        config, init = self._config.model, self._config.init
        given = {name: config[name] for name in ("head_channels", "auxiliary_channels") if config[name] is not None}
        model = registry.create(
            registry.segmenter_config(
                config.name,
                head=config.head,
                num_classes=config.num_classes,
                img_size=config.img_size,
                drop_path=config.drop_path,
                **given,
                **architecture(config),
            ),
            **computation(config),
            rngs=rngs,
        )
        model.remat = config.remat
        model.frozen_statistics = init.freeze_backbone or init.freeze_statistics
        return model

    # Data.

    def open_source(self, split: str) -> SegmentationSource:
        return open_source(self._config.data, split, self._config.model.num_classes)

    def train_batches(self, source: SegmentationSource, *, start: int, **reading: Any) -> Stream:
        config = self._config
        augment = config.augment
        transform = TrainSegmentationTransform(
            config.model.img_size,
            scale=None if augment.scale is None else tuple(augment.scale),
            ratio_range=tuple(augment.ratio),
            max_class_share=augment.max_class_share,
            flip=augment.flip,
            distortion=augment.distortion,
            reduce_zero_label=source.reduce_zero_label,
            num_classes=config.model.num_classes,
            on_error=config.data.on_error,
        )
        size, seed = config.train.batch_size, config.seed
        return pipeline.train_batches(source, transform, batch_size=size, seed=seed, start=start, **reading)

    def batch_indices(self, source: SegmentationSource, step: int) -> list[int]:
        size, seed = self._config.train.batch_size, self._config.seed
        return pipeline.batch_indices(len(source), batch_size=size, seed=seed, batch=step)

    def eval_batches(self, source: SegmentationSource, *, batch_size: int, **reading: Any) -> pipeline.Passes:
        return batches.eval_batches(source, self._eval_transform(source), batch_size=batch_size, **reading)

    def _eval_transform(self, source: SegmentationSource) -> EvalSegmentationTransform:
        evaluation = self._config.eval
        return EvalSegmentationTransform(
            None if evaluation.scale is None else tuple(evaluation.scale),
            scales=tuple(map(float, evaluation.scales)),
            reduce_zero_label=source.reduce_zero_label,
            num_classes=self._config.model.num_classes,
            on_error=self._config.data.on_error,
        )

    def batch_shapes(self) -> Shapes:
        size = self._config.model.img_size
        return {
            "image": ((size, size, 3), np.uint8),
            "label": ((size, size), np.uint8),
            "size": ((2,), np.int32),
            "mask": ((), np.bool_),
        }

    def eval_shapes(self, source: SegmentationSource) -> Shapes:
        largest = batches.largest(source, self._eval_transform(source))
        return {name: (array.shape, array.dtype.type) for name, array in largest.items()}

    # Computation on the device.

    def augment(self, batch: Batch, key: Callable[[str], jax.Array]) -> Batch:
        del key  # all that is random is drawn on the host
        images, size = normalise(batch["image"]), batch["size"]
        rows, columns = (jnp.arange(length).reshape(1, -1) for length in images.shape[1:3])
        inside = (rows < size[:, :1])[:, :, None] & (columns < size[:, 1:])[:, None, :]  # (B, S, S)
        images = jnp.where(inside[..., None], images, 0)  # padding has the mean colour, as in the reference
        augmented = {
            "inputs": images.astype(jnp.dtype(self._config.model.dtype)),
            "label": batch["label"],
            "mask": batch["mask"],
        }
        if self._config.train.loss_pixels == "labelled":
            labelled = jnp.sum(batch["label"] != IGNORED, axis=(1, 2), dtype=jnp.float32)
            augmented["weight"] = jnp.where(batch["mask"], labelled, 0)
        return augmented

    def losses(self, outputs: Scores, batch: Batch) -> jax.Array:
        losses = self._loss(outputs.logits, batch["label"])
        if outputs.auxiliary is None:
            return losses
        return losses + self._config.train.auxiliary_weight * self._loss(outputs.auxiliary, batch["label"])

    def _loss(self, logits: jax.Array, label: jax.Array) -> jax.Array:
        """The mean loss of each image, (B,)."""
        logits, labelled = resize_bilinear(logits, label.shape[1:]), label != IGNORED
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.where(labelled, label, 0).astype(jnp.int32)
        )
        total = jnp.sum(jnp.where(labelled, losses, 0), axis=(1, 2))
        if self._config.train.loss_pixels == "all":
            return total / (label.shape[1] * label.shape[2])
        return total / jnp.maximum(jnp.sum(labelled, axis=(1, 2)), 1).astype(total.dtype)

    def metrics(self, outputs: Scores, batch: Batch) -> Sums:
        label = batch["label"]
        right = jnp.argmax(resize_bilinear(outputs.logits, label.shape[1:]), -1) == label
        labelled = (label != IGNORED) & batch["mask"].reshape(-1, 1, 1)
        return {"accuracy": masked(right, labelled)}

    def evaluate(self, model: Segmenter, batch: Batch) -> tuple[Sums, Batch]:
        """See `Task`. The sum `confusion` counts pixels by label and prediction, (classes, classes)."""
        names = sorted(name for name in batch if name.startswith("image"))
        maps = score_maps(model, [normalise(batch[name]) for name in names], self._mode)
        label, classes = batch["label"], self._config.model.num_classes
        labelled = (label != IGNORED) & batch["mask"].reshape(-1, 1, 1)
        example = jnp.arange(label.shape[0]).reshape(-1, 1, 1)

        def count(logs: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
            true, counts = (jax.lax.dynamic_slice_in_dim(x, rows[0], len(rows), axis=1) for x in (label, labelled))
            true = jnp.where(counts, true, 0).astype(jnp.int32)
            place = (example * classes + true) * classes + jnp.argmax(logs, -1)
            confusion = jnp.zeros(label.shape[0] * classes**2, jnp.int32)
            confusion = confusion.at[place.reshape(-1)].add(counts.reshape(-1).astype(jnp.int32))
            losses = -jnp.take_along_axis(logs, true[..., None], axis=-1)[..., 0]
            return confusion, jnp.sum(jnp.where(counts, losses, 0), axis=(1, 2))

        confusions, losses = by_blocks(maps, batch["size"], label.shape[1:], count)
        confusion = jnp.sum(confusions, axis=0).reshape(-1, classes, classes)  # (B, label, prediction)
        pixels = jnp.sum(confusion, axis=(1, 2))
        divisor = jnp.prod(batch["size"], axis=1) if self._config.train.loss_pixels == "all" else pixels
        loss = jnp.sum(losses, axis=0)
        loss = loss / jnp.maximum(divisor, 1).astype(loss.dtype)
        sums = {
            "loss": masked(loss, batch["mask"]),
            "confusion": (jnp.sum(confusion, axis=0), jnp.sum(batch["mask"])),
        }
        right = jnp.trace(confusion, axis1=1, axis2=2)
        outputs = {
            "loss": loss,
            "miou": _iou(confusion),
            "accuracy": right / jnp.maximum(pixels, 1),
            "pixels": pixels,
        }
        return sums, outputs

    @property
    def _mode(self) -> InferenceMode:
        evaluation = self._config.eval
        return InferenceMode(window=evaluation.window, stride=evaluation.stride, flip=evaluation.flip)

    # Reports.

    def result(self, mean: Mean, source: SegmentationSource) -> tuple[dict[str, float], dict[str, Any]]:
        confusion = mean.total("confusion")  # (label, prediction), exact: whole numbers of float64
        if not confusion.any():
            raise UserError(f"no pixel of {source.name} has a label: are the masks those of other classes?")
        right, true, found = np.diagonal(confusion), confusion.sum(1), confusion.sum(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            iou, accuracy = right / (true + found - right), right / true  # nan for classes that never occur
        names = class_names(source)
        table = [
            {"class": name, "iou": _number(iou[i]), "accuracy": _number(accuracy[i]), "pixels": int(true[i])}
            for i, name in enumerate(names)
        ]
        metrics = {
            **mean.result(),
            "miou": float(np.nanmean(iou)),
            "aacc": float(right.sum() / true.sum()),
            "macc": float(np.nanmean(accuracy)),
        }
        return metrics, {"classes": table}

    def table(self, outputs: Mapping[str, np.ndarray], source: SegmentationSource) -> list[list[Any]]:
        """Record, mean IoU over the classes that occur in it, accuracy and loss of its pixels, labelled pixels."""
        rows = [["record", "miou", "accuracy", "loss", "pixels"]]
        for index, mask in enumerate(outputs["mask"]):
            values = ["", "", "", ""]
            if mask:
                values = [f"{outputs[name][index]:.6f}" for name in ("miou", "accuracy", "loss")]
                values.append(int(outputs["pixels"][index]))
            rows.append([source.describe(index), *values])
        return rows

    def pictures(
        self, evaluation: Evaluated, source: SegmentationSource, model: Segmenter
    ) -> Mapping[str, Callable[[], Figure]]:
        transform = self._eval_transform(source)
        segment = functools.partial(segmentation_pictures.segmented, model, transform, self._mode)
        names = class_names(source)
        return {
            "classes.png": lambda: segmentation_pictures.classes(evaluation.details["classes"], evaluation.metrics),
            "predictions.png": lambda: segmentation_pictures.predictions(
                evaluation.outputs, source, transform, segment, names
            ),
        }

    def metadata(self) -> Mapping[str, Any]:
        evaluation = self._config.eval
        scale = None if evaluation.scale is None else list(evaluation.scale)
        names = ("window", "stride", "flip")
        settings = {"scale": scale, "scales": list(map(float, evaluation.scales))}
        return {"segmentation": {**settings, **{name: evaluation[name] for name in names}}}


def class_names(source: SegmentationSource) -> tuple[str, ...]:
    """The names of the classes, or their numbers."""
    return source.class_names or tuple(map(str, range(source.num_classes)))


def _iou(confusion: jax.Array) -> jax.Array:
    """(B, label, prediction) -> (B,), the mean over the classes that are in an image's labels or prediction."""
    right = jnp.diagonal(confusion, axis1=1, axis2=2)
    union = jnp.sum(confusion, axis=1) + jnp.sum(confusion, axis=2) - right
    iou = right / jnp.maximum(union, 1)
    return jnp.sum(iou, axis=1) / jnp.maximum(jnp.sum(union > 0, axis=1), 1)


def _number(value: float) -> float | None:
    """For JSON, which has no nan."""
    return float(value) if np.isfinite(value) else None
