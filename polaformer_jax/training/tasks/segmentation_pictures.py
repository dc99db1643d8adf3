"""Pictures of an evaluated segmenter: IoU of each class, and the images with the worst result beside their labels."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from polaformer_jax.data.images.normalisation import normalise
from polaformer_jax.data.images.transforms import decode
from polaformer_jax.data.segmentation.labels import decode_labels
from polaformer_jax.data.segmentation.source import SegmentationSource
from polaformer_jax.data.segmentation.transforms import EvalSegmentationTransform
from polaformer_jax.files import figures
from polaformer_jax.files.figures import FAINT, INK
from polaformer_jax.files.palette import coloured, palette
from polaformer_jax.models.dense_inference import InferenceMode, label_map
from polaformer_jax.models.segmenter import Segmenter

IMAGES = 8  # that are shown, the worst first
LEGEND = 40  # classes at most
COLOUR = "#2364aa"


def segmented(
    model: Segmenter, transform: EvalSegmentationTransform, mode: InferenceMode, image: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The predicted classes (h, w) uint8 of an image (h, w, 3) uint8, and their probabilities."""
    arrays = [normalise(jnp.asarray(array)) for array in transform.prepared(image).values()]
    return label_map(model, arrays, image.shape[:2], mode)


def classes(table: Sequence[Mapping[str, Any]], metrics: Mapping[str, float]) -> Figure:
    """A bar for the IoU of each class, the best first; classes that do not occur are at the end, without one."""
    rows = sorted(table, key=lambda row: -1 if row["iou"] is None else row["iou"])
    figure = figures.new(8, 1.2 + 0.24 * len(rows))
    axes = figure.subplots()
    figures.tidy(axes)
    values = [row["iou"] or 0 for row in rows]
    axes.barh(range(len(rows)), values, color=COLOUR, height=0.7)
    axes.set_yticks(range(len(rows)), [figures.plain(row["class"]) for row in rows], fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(0, 1.08)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(visible=False, axis="y")
    for place, row in enumerate(rows):
        text = "does not occur" if row["iou"] is None else f"{100 * row['iou']:.1f}"
        axes.text(values[place] + 0.01, place, text, va="center", fontsize=7, color=INK)
    axes.axvline(metrics["miou"], color=INK, linewidth=0.8, linestyle=":")
    axes.set_title(
        f"IoU of each class; mIoU {100 * metrics['miou']:.2f} %, aAcc {100 * metrics['aacc']:.2f} %,"
        f" mAcc {100 * metrics['macc']:.2f} %",
        **{"loc": "left", "color": INK, "fontweight": "bold", "fontsize": 10},
    )
    return figure


def predictions(
    outputs: Mapping[str, np.ndarray],
    source: SegmentationSource,
    transform: EvalSegmentationTransform,
    segment: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    names: Sequence[str],
) -> Figure:
    """The images with the lowest mean IoU: image, labels, prediction, and where they differ.

    Args:
        outputs: `miou` and `mask` of each example.
        segment: from an image (h, w, 3) uint8 to its classes (h, w).
        names: of the classes.
    """
    seen = np.flatnonzero(outputs["mask"] & (outputs["pixels"] > 0))
    shown = seen[np.argsort(outputs["miou"][seen], kind="stable")][:IMAGES]
    figure = figures.new(11.5, 2.6 * len(shown) + 1.6)
    columns = figure.subplots(max(len(shown), 1), 4, squeeze=False)
    occurring: set[int] = set()
    for row, index in zip(columns, shown, strict=False):
        record = source[int(index)]
        image = decode(record["image"])
        labels = decode_labels(
            record["mask"],
            size=image.shape[:2],
            num_classes=transform.num_classes,
            reduce_zero=transform.reduce_zero_label,
        )
        predicted, _ = segment(image)
        occurring |= set(np.unique(labels)) | set(np.unique(predicted))
        _draw(row, image, labels, predicted, len(names))
        row[0].set_title(figures.plain(source.describe(int(index)).rsplit("/", 1)[-1]), fontsize=8, loc="left")
        row[2].set_title(f"IoU {100 * outputs['miou'][index]:.1f} %", fontsize=8, loc="right")
    for axes, text in zip(columns[0], ("", "labels", "prediction", "wrong pixels"), strict=True):
        axes.set_title(text, fontsize=9, loc="center", color=INK, fontweight="bold")
    listed = sorted(label for label in occurring if label < len(names))[:LEGEND]
    colours = palette(len(names)) / 255
    handles = [Patch(color=colours[label], label=figures.plain(names[label])) for label in listed]
    figure.legend(handles=handles, loc="outside lower left", ncols=6, frameon=False, fontsize=8, labelcolor=INK)
    figure.suptitle(
        f"The {len(shown)} of {len(seen):,} images with the lowest mean IoU, the worst first; black has no label",
        **{"x": 0.01, "ha": "left", "color": INK, "fontweight": "bold"},
    )
    return figure


def _draw(row, image: np.ndarray, labels: np.ndarray, predicted: np.ndarray, classes: int) -> None:
    labelled = labels < classes
    wrong = np.where((labelled & (predicted != labels))[..., None], (200, 56, 44), image // 3 + 150).astype(np.uint8)
    over = (0.35 * image + 0.65 * coloured(predicted, classes)).astype(np.uint8)
    for axes, picture in zip(row, (image, coloured(labels, classes), over, wrong), strict=True):
        axes.imshow(picture, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color(FAINT)
