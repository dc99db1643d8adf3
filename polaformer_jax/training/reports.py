"""Reports of a run for people: pictures (curves, confusion matrix, test images), its summary, and the dry run."""

import dataclasses
import json
import math
import os
from collections.abc import Callable

import jax
import numpy as np
from clu import parameter_overview
from etils import epath
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from polaformer_jax.data.records import Source
from polaformer_jax.files import figures
from polaformer_jax.files.figures import FAINT, INK
from polaformer_jax.training.evaluation import Evaluation
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.metrics import read_scalars
from polaformer_jax.training.progress import log
from polaformer_jax.training.workdir import as_json

TRAIN, TEST, WRONG = "#9aa5b1", "#2364aa", "#c8382c"
NAMED_CLASSES = 25  # with more, a confusion matrix has no space for names and numbers
MIB = 2**20
GRID = (6, 10)  # rows and columns of test images


def draw_all(
    workdir: epath.Path, evaluation: Evaluation, source: Source, picture_of: Callable[[int], np.ndarray] | None
) -> list[epath.Path]:
    """Draws all pictures into `workdir/pictures`.

    Args:
        evaluation: of the checkpoint that the pictures show.
        source: the split that was evaluated.
        picture_of: returns the image (S, S, 3) uint8 of an example that the model saw; None: there are no images.

    Returns:
        The files. What could not be drawn or written is logged, and missing.
    """
    names = source.class_names or tuple(str(label) for label in range(source.num_classes))
    drawers = {
        "curves.png": lambda: curves(read_scalars(workdir)),
        "confusion.png": lambda: confusion(evaluation, names),
    }
    if picture_of is not None:
        drawers["predictions.png"] = lambda: predictions(evaluation, names, picture_of)
    paths = []
    for name, draw in drawers.items():
        path = workdir / "pictures" / name
        try:
            figures.save(draw(), path)
        except Exception as error:  # a picture is not worth a result
            log.warning("the picture %s was not drawn: %s: %s", path, type(error).__name__, error)
        else:
            paths.append(path)
    return paths


def curves(scalars: dict[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Loss, accuracy and learning rate over the steps, from the scalars written for TensorBoard."""
    figure = figures.new(12, 3.8)
    panels = zip(figure.subplots(1, 3), ("loss", "accuracy", "learning_rate"), strict=True)
    for axes, name in panels:
        figures.tidy(axes)
        axes.set_title({"learning_rate": "learning rate"}.get(name, name), loc="left", color=INK, fontweight="bold")
        axes.set_xlabel("step", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if name in scalars:
            colour = INK if name == "learning_rate" else TRAIN
            axes.plot(*scalars[name], color=colour, linewidth=1.5, label="training")
        if f"eval_{name}" in scalars:
            steps, values = scalars[f"eval_{name}"]
            axes.plot(steps, values, color=TEST, linewidth=2, marker="o", markersize=3, label="evaluation")
            axes.legend(frameon=False, labelcolor=INK)
        if name == "loss":
            axes.set_ylim(bottom=0)
        if name == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
            if "eval_accuracy" in scalars:
                best = scalars["eval_accuracy"][1].max()
                axes.axhline(best, color=TEST, linewidth=0.8, linestyle=":")
                axes.set_title(f"best {100 * best:.2f} %", loc="right", color=TEST, fontsize=10)
    return figure


def confusion(evaluation: Evaluation, names: tuple[str, ...]) -> Figure:
    """True class by predicted class, in shares of the true class."""
    seen = evaluation.outputs["mask"]
    counts = np.zeros((len(names), len(names)), np.int64)
    np.add.at(counts, (evaluation.outputs["label"][seen], evaluation.outputs["prediction"][seen]), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)

    few = len(names) <= NAMED_CLASSES
    side = 2.2 + 0.42 * len(names) if few else 9
    figure = figures.new(side + 1.1, side)
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    right = counts.trace() / max(counts.sum(), 1)
    axes.set_title(
        f"{100 * right:.2f} % of {counts.sum():,} {evaluation.examples}", loc="left", color=INK, fontweight="bold"
    )
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


def predictions(evaluation: Evaluation, names: tuple[str, ...], image_of) -> Figure:
    """A grid of test images: the mistakes, most confident first; then the correct ones, least confident first.

    Args:
        image_of: returns the image (S, S, 3) uint8 at an index of the split.
    """
    out = evaluation.outputs
    seen = np.flatnonzero(out["mask"])
    wrong = out["prediction"][seen] != out["label"][seen]
    probability = out["probability"][seen]
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
        true, predicted = (figures.plain(_short(names[out[key][index]])) for key in ("label", "prediction"))
        axes.imshow(image_of(index), interpolation="nearest")
        mistaken = out["label"][index] != out["prediction"][index]
        text = f"{predicted}, not {true}" if mistaken else true
        axes.set_title(
            f"{text}\n{100 * out['probability'][index]:.0f} %", fontsize=8, color=WRONG if mistaken else INK, pad=3
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


@dataclasses.dataclass(frozen=True)
class Result:
    """The evaluation of the best checkpoint, and the files of the run."""

    evaluation: Evaluation
    step: int
    checkpoint: epath.Path
    pictures: list[epath.Path]


def describe(result: Result, workdir: epath.PathLike) -> str:
    """The summary at the end of a training, for people."""
    metrics = result.evaluation.metrics
    top5 = f"top-5 {100 * metrics['accuracy_top5']:.2f} %, " if "accuracy_top5" in metrics else ""
    lines = [
        f"test accuracy  {100 * metrics['accuracy']:.2f} %  ({top5}loss {metrics['loss']:.4f})",
        f"{result.evaluation.examples:<14} {result.evaluation.counted}",
        f"checkpoint     {os.fspath(result.checkpoint)}  (step {result.step}, the best)",
        f"TensorBoard    tensorboard --logdir {os.fspath(workdir)}",
    ]
    if result.evaluation.skipped:
        lines.insert(2, f"skipped        {result.evaluation.skipped} {result.evaluation.examples} could not be decoded")
    lines += [f"picture        {os.fspath(path)}" for path in result.pictures]
    return "\n".join(lines)


def describe_dry(experiment: Experiment) -> str:
    """What a dry run prints: config, parameters, batches, and the memory of the compiled training step.

    Raises:
        UserError: the experiment cannot be trained.
    """
    experiment.check_training()
    config, length, inputs = experiment.config, experiment.length, experiment.inputs
    params = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), experiment.params.abstract)
    batch = experiment.abstract_batch(config.train.batch_size)
    memory = experiment.train_step.program(batch).memory_analysis()
    lines = [
        json.dumps(as_json(config), indent=2),
        parameter_overview.get_parameter_overview(params, include_stats=False),
        f"steps: {length.total:,} of {config.train.batch_size} examples, {length.warmup:,} of them warm-up;"
        f" {inputs.epoch_examples:,} examples to train on, {len(inputs.eval_source):,} to evaluate",
        *(f"batch[{name!r}]: {leaf.dtype} {leaf.shape}, {leaf.sharding.spec}" for name, leaf in batch.items()),
        f"devices: {experiment.mesh.size} x {jax.devices()[0].device_kind}, as mesh {dict(experiment.mesh.shape)}",
        f"memory of the training step on each device: arguments {memory.argument_size_in_bytes / MIB:.1f} MiB"
        f" (reused for outputs: {memory.alias_size_in_bytes / MIB:.1f} MiB),"
        f" temporary {memory.temp_size_in_bytes / MIB:.1f} MiB",
    ]
    return "\n".join(lines)
