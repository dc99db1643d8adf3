"""Pictures of an evaluated classifier: confusion matrix, and test images with its answers."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from polaformer_jax.files import figures
from polaformer_jax.files.figures import FAINT, INK

WRONG = "#c8382c"
NAMED_CLASSES = 25  # with more, a confusion matrix has no space for names and numbers
GRID = (6, 10)  # rows and columns of test images


def confusion(outputs: Mapping[str, np.ndarray], names: Sequence[str], examples: str) -> Figure:
    """True class by predicted class, in shares of the true class.

    Args:
        outputs: label, prediction and mask of each example.
        examples: what they are called.
    """
    seen = outputs["mask"]
    counts = np.zeros((len(names), len(names)), np.int64)
    np.add.at(counts, (outputs["label"][seen], outputs["prediction"][seen]), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)

    few = len(names) <= NAMED_CLASSES
    side = 2.2 + 0.42 * len(names) if few else 9
    figure = figures.new(side + 1.1, side)
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    right = counts.trace() / max(counts.sum(), 1)
    axes.set_title(f"{100 * right:.2f} % of {counts.sum():,} {examples}", loc="left", color=INK, fontweight="bold")
    axes.set_xlabel("predicted class", color=INK)
    axes.set_ylabel("true class", color=INK)
    axes.spines[:].set_color(FAINT)
    if few:
        rotation = 90 if max(map(len, names)) > 3 else 0
        labels = [figures.plain(name) for name in names]
        axes.set_xticks(range(len(names)), labels, rotation=rotation)
        axes.set_yticks(range(len(names)), labels)
        axes.tick_params(length=0, labelcolor=INK)
        for row, column in zip(*np.nonzero(counts), strict=True):
            wrong = row != column
            colour = WRONG if wrong else ("white" if shares[row, column] > 0.5 else INK)
            weight = "bold" if wrong else "normal"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=colour, fontweight=weight)
    bar = figure.colorbar(picture, ax=axes, fraction=0.046, pad=0.03, format=PercentFormatter(1.0, decimals=0))
    bar.outline.set_visible(False)
    bar.set_label("share of the true class", color=INK)
    return figure


def predictions(
    outputs: Mapping[str, np.ndarray], names: Sequence[str], image_of: Callable[[int], np.ndarray]
) -> Figure:
    """A grid of test images: the mistakes, most confident first; then the correct ones, least confident first.

    Args:
        outputs: label, prediction, probability and mask of each example.
        image_of: returns the image (S, S, 3) uint8 at an index of the split.
    """
    seen = np.flatnonzero(outputs["mask"])
    wrong = outputs["prediction"][seen] != outputs["label"][seen]
    probability = outputs["probability"][seen]
    order = seen[np.lexsort((np.where(wrong, -probability, probability), ~wrong))]
    rows = min(GRID[0], math.ceil(len(order) / GRID[1]))
    shown = order[: rows * GRID[1]]

    figure = figures.new(1.25 * GRID[1], 1.6 * rows + 0.5)
    count = int(wrong.sum())
    mistakes = f"{count} mistake{'' if count == 1 else 's'} in {len(seen):,} images"
    figure.suptitle(
        f"{mistakes}: the mistakes, surest first, then the least sure of the right answers",
        x=0.01,
        ha="left",
        color=INK,
        fontweight="bold",
    )
    for axes, index in zip(figure.subplots(rows, GRID[1], squeeze=False).flat, shown, strict=False):
        true, predicted = (figures.plain(_short(names[outputs[key][index]])) for key in ("label", "prediction"))
        axes.imshow(image_of(index), interpolation="nearest")
        mistaken = outputs["label"][index] != outputs["prediction"][index]
        text = f"{predicted}, not {true}" if mistaken else true
        axes.set_title(
            f"{text}\n{100 * outputs['probability'][index]:.0f} %", fontsize=8, color=WRONG if mistaken else INK, pad=3
        )
        axes.spines[:].set_color(WRONG if mistaken else FAINT)
        axes.spines[:].set_linewidth(2.0 if mistaken else 0.8)
    for axes in figure.axes:
        axes.set_xticks([])
        axes.set_yticks([])
        if not axes.images:
            axes.set_visible(False)
    return figure


def _short(name: str, length: int = 12) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
