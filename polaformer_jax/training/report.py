"""What a training says to people: at its end, and in a dry run."""

import dataclasses
import json
import os

import jax
import numpy as np
from clu import parameter_overview
from etils import epath

from polaformer_jax.training.evaluation import Evaluation
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.workdir import as_json

MEBIBYTE = 2**20


@dataclasses.dataclass(frozen=True)
class Result:
    """The evaluation of the best checkpoint, and where things are."""

    evaluation: Evaluation
    step: int
    checkpoint: epath.Path
    pictures: list[epath.Path]


def describe(result: Result, workdir: epath.PathLike) -> str:
    """What a training ends with, for people."""
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
    """What `--dry_run` prints: config, parameters, batches, and the memory of the compiled training step.

    Raises:
      UserError: the experiment cannot be trained.
    """
    experiment.check_training()
    config, length = experiment.config, experiment.length
    params = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), experiment.abstract_params)
    batch = experiment.abstract_batch(config.train.batch_size)
    memory = experiment.train_step.program(batch).memory_analysis()
    lines = [
        json.dumps(as_json(config), indent=2),
        parameter_overview.get_parameter_overview(params, include_stats=False),
        f"steps: {length.total:,} of {config.train.batch_size} examples, {length.warmup:,} of them warm-up;"
        f" {len(experiment.train_source):,} examples to train on, {len(experiment.eval_source):,} to evaluate",
        *(f"batch[{name!r}]: {leaf.dtype} {leaf.shape}, {leaf.sharding.spec}" for name, leaf in batch.items()),
        f"devices: {experiment.mesh.size} x {jax.devices()[0].device_kind}, as mesh {dict(experiment.mesh.shape)}",
        f"memory of the training step on each device: arguments {memory.argument_size_in_bytes / MEBIBYTE:.1f} MiB"
        f" (reused for outputs: {memory.alias_size_in_bytes / MEBIBYTE:.1f} MiB),"
        f" temporary {memory.temp_size_in_bytes / MEBIBYTE:.1f} MiB",
    ]
    return "\n".join(lines)
