"""Reports of a run for people: pictures (curves, and those of its task), its summary, and the dry run."""

import dataclasses
import json
import os

import jax
import numpy as np
from clu import parameter_overview
from etils import epath
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from polaformer_jax.files import figures
from polaformer_jax.files.figures import INK
from polaformer_jax.training.evaluation import Evaluation
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.metrics import read_scalars
from polaformer_jax.training.progress import log
from polaformer_jax.training.workdir import as_json

TRAIN, TEST = "#9aa5b1", "#2364aa"
MIB = 2**20
# Of metrics that are not called by their names.
LABELS = {
    "learning_rate": "learning rate",
    "accuracy_top5": "top-5",
    "miou": "mIoU",
    "aacc": "aAcc",
    "macc": "mAcc",
}


def draw_all(
    workdir: epath.Path, evaluation: Evaluation, experiment: Experiment, model: nnx.Module | None
) -> list[epath.Path]:
    """Draws all pictures into `workdir/pictures`.

    Args:
        evaluation: of the checkpoint that the pictures show.
        model: that checkpoint, see `Task.pictures`.

    Returns:
        The files. What could not be drawn or written is logged, and missing.
    """
    task, source = experiment.task, experiment.inputs.source(evaluation.split)
    drawers = {"curves.png": lambda: curves(read_scalars(workdir), task.headline)}
    drawers |= task.pictures(evaluation, source, model)
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


def curves(scalars: dict[str, tuple[np.ndarray, np.ndarray]], headline: str) -> Figure:
    """Loss, headline metric and learning rate over the steps, from the scalars written for TensorBoard."""
    figure = figures.new(12, 3.8)
    panels = zip(figure.subplots(1, 3), ("loss", headline, "learning_rate"), strict=True)
    for axes, name in panels:
        figures.tidy(axes)
        axes.set_title(LABELS.get(name, name), loc="left", color=INK, fontweight="bold")
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
        if name == headline:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
            if f"eval_{name}" in scalars:
                best = np.nanmax(scalars[f"eval_{name}"][1])
                axes.axhline(best, color=TEST, linewidth=0.8, linestyle=":")
                axes.set_title(f"best {100 * best:.2f} %", loc="right", color=TEST, fontsize=10)
    return figure


@dataclasses.dataclass(frozen=True)
class Result:
    """The evaluation of the best checkpoint, and the files of the run."""

    evaluation: Evaluation
    step: int
    checkpoint: epath.Path
    pictures: list[epath.Path]


def describe(result: Result, workdir: epath.PathLike) -> str:
    """The summary at the end of a training, for people."""
    evaluation = result.evaluation
    headline = evaluation.headline
    others = [name for name in LABELS if name in evaluation.metrics and name != headline]
    told = ", ".join(f"{LABELS.get(name, name)} {100 * evaluation.metrics[name]:.2f} %" for name in others)
    lines = [
        f"test {LABELS.get(headline, headline):<9} {100 * evaluation.metrics[headline]:.2f} %"
        f"  ({told}{', ' if told else ''}loss {evaluation.metrics['loss']:.4f})",
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
