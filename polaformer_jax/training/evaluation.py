"""Evaluation: every example of a split counted exactly once."""

import csv
import dataclasses
import io
import json
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
import tqdm
from etils import epath

from polaformer_jax.data.pipeline import EvalBatches
from polaformer_jax.data.sources import Source
from polaformer_jax.errors import UserError
from polaformer_jax.training.checkpoints import Checkpoints
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.metrics import Mean
from polaformer_jax.training.sharding import to_devices
from polaformer_jax.training.workdir import read_config, write_atomically

IN_FLIGHT = 2  # batches given to the device before the first one's result is awaited


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Result of one pass over a split."""

    metrics: dict[str, float]  # loss, accuracy, accuracy_top5
    counted: int  # examples that the metrics are means of
    skipped: int  # examples that could not be decoded (data.on_error="skip")
    images_per_second: float  # compilation not included
    outputs: dict[str, np.ndarray]  # per example, in the order of the split: prediction, probability, label, mask

    def summary(self) -> dict[str, float | int]:
        """What is reported: a flat dict that JSON takes."""
        return {
            **self.metrics,
            "images": self.counted,
            "skipped": self.skipped,
            "images_per_second": round(self.images_per_second, 1),
        }


class Evaluator:
    """Evaluates parameters on a config's evaluation split, any number of times. Use as a context manager.

    The step is compiled once, and the processes that read the data stay alive between passes.
    """

    def __init__(self, experiment: Experiment):
        self._mesh = experiment.mesh
        self._batches: EvalBatches = experiment.eval_batches()
        self._num_examples = len(experiment.eval_source)
        self._step: Callable = experiment.compile_eval_step(experiment.eval_batch_size)

    def __enter__(self) -> "Evaluator":
        return self

    def __exit__(self, *exception) -> None:
        self._batches.close()

    def __call__(self, params: Any) -> Evaluation:
        """One pass over the split.

        Args:
          params: nested dict of parameters, as `Experiment.abstract_params` describes them.
        """
        mean, outputs, pending = Mean(), [], []

        def collect(keep: int) -> None:
            while len(pending) > keep:
                sums, output = jax.device_get(pending.pop(0))
                mean.add(sums)
                outputs.append(output)

        began = time.monotonic()
        for batch in tqdm.tqdm(self._batches, desc="evaluate", unit="batch", leave=False, disable=None):
            pending.append(self._step(params, to_devices(batch, self._mesh)))
            collect(keep=IN_FLIGHT)
        collect(keep=0)
        seconds = time.monotonic() - began

        joined = {name: np.concatenate([o[name] for o in outputs])[: self._num_examples] for name in outputs[0]}
        counted = mean.count("loss")
        return Evaluation(
            metrics=mean.result(),
            counted=counted,
            skipped=self._num_examples - counted,
            images_per_second=counted / seconds,
            outputs=joined,
        )


def write_json(path: epath.PathLike, evaluation: Evaluation, facts: dict[str, Any]) -> None:
    """Writes the summary and further facts (what was evaluated), whole or not at all."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({**facts, **evaluation.summary()}, indent=2) + "\n")


def write_predictions(path: epath.PathLike, evaluation: Evaluation, source: Source) -> None:
    """Writes a CSV file: record, label, prediction, probability of the prediction, correct; one row an image.

    A record that could not be decoded has empty fields after its label.
    """
    path = epath.Path(path)
    if path.is_dir():
        raise UserError(f"--predictions {os.fspath(path)} is a folder: name a file")

    def name(label: int) -> str | int:
        return source.class_names[label] if source.class_names else int(label)

    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["record", "label", "prediction", "probability", "correct"])
    out = evaluation.outputs
    for index, (label, prediction, probability, mask) in enumerate(
        zip(out["label"], out["prediction"], out["probability"], out["mask"], strict=True)
    ):
        answer = [name(prediction), f"{probability:.6f}", int(prediction == label)] if mask else ["", "", ""]
        rows.writerow([source.describe(index), name(label), *answer])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue())


def evaluate(
    config: ml_collections.ConfigDict | None,
    workdir: epath.PathLike | None,
    *,
    checkpoint: str = "best",
    json_path: epath.PathLike | None = None,
    predictions_path: epath.PathLike | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint of a training, or a file of weights; writes the files asked for.

    Args:
      config: what to evaluate on, and the model; None: the config of the run in `workdir`. Where its `init.weights` is
        set, these weights are evaluated, else a checkpoint of `workdir`.
      workdir: work directory of a training. It may be running; nothing but `eval.json` is written there.
      checkpoint: "best", "latest" or a step.
      json_path: file for the result; None: `eval.json` in `workdir`, if that is given.
      predictions_path: file for one row an image; None: not written.

    Returns:
      What the JSON file holds: the metrics, images counted and skipped, images/s, and what was evaluated.

    Raises:
      UserError: there is nothing to evaluate, or it does not fit the model or the data.
    """
    if config is None and workdir is None:
        raise UserError("nothing to evaluate: give --workdir of a training, or --config with init.weights")
    from_file = config is not None and config.init.weights is not None
    if config is None:
        config = read_config(workdir)
    elif not from_file and workdir is None:
        raise UserError("no weights: give --config.init.weights=FILE, or --workdir of a training")

    experiment = Experiment(config)
    if from_file:
        params, evaluated = experiment.read_params(config.init.weights), {"weights": config.init.weights}
    else:
        directory = epath.Path(workdir) / "checkpoints"
        if not directory.exists():
            raise UserError(f"{directory} does not exist: {workdir} is not the work directory of a training")
        which = int(checkpoint) if checkpoint.isdecimal() else checkpoint
        if which not in ("best", "latest") and not isinstance(which, int):
            raise UserError(f"--checkpoint={checkpoint}: it is best, latest or a step")
        metric = config.checkpoint.best_metric
        with Checkpoints(directory, keep_last=1, best_metric=metric, read_only=True) as checkpoints:
            params, step = checkpoints.restore_params(experiment.abstract_params, which)
        evaluated = {"checkpoint": os.fspath(directory / str(step)), "step": step}
    facts = {"model": config.model.name, "data": config.data.name, "split": config.data.eval_split, **evaluated}

    with Evaluator(experiment) as evaluator:
        result = evaluator(params)
    if jax.process_index() == 0:
        if json_path is None and workdir is not None:
            json_path = epath.Path(workdir) / "eval.json"
        if json_path is not None:
            write_json(json_path, result, facts)
        if predictions_path is not None:
            write_predictions(predictions_path, result, experiment.eval_source)
    return {**facts, **result.summary()}
