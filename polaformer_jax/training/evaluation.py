"""Evaluation: every example of a split counted exactly once."""

import csv
import dataclasses
import io
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from polaformer_jax import weights
from polaformer_jax.config import EVALUATION_MAY_CHANGE, FUNCTION, HOW_COMPUTED
from polaformer_jax.data.pipeline import Passes
from polaformer_jax.errors import NotWrittenError, UserError
from polaformer_jax.files import atomic, paths
from polaformer_jax.training import checkpoints, run_data
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.export import model_info
from polaformer_jax.training.metrics import Mean
from polaformer_jax.training.progress import bar, log
from polaformer_jax.training.sharding import on_one_device, to_devices
from polaformer_jax.training.workdir import differences, read_config

IN_FLIGHT = 2  # batches given to the device before the first one's result is awaited


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Result of one pass over a split."""

    metrics: dict[str, float]  # loss, accuracy; for images also accuracy_top5
    headline: str  # the metric by which the result is told
    details: dict[str, Any]  # of the metrics, for JSON
    counted: int  # number of examples that the metrics are means over
    skipped: int  # number of examples that could not be decoded (data.on_error="skip")
    split: str
    origin: str  # of the data
    examples: str  # what they are called: images, sequences
    examples_per_second: float  # since the first batch arrived: without compilation and the start of workers
    outputs: dict[str, np.ndarray]  # (n,) each, in the order of the split: the task's reported values, and mask

    def summary(self) -> dict[str, Any]:
        """The reported values, for JSON."""
        return {
            **self.metrics,
            self.examples: self.counted,
            "skipped": self.skipped,
            f"{self.examples}_per_second": round(self.examples_per_second, 1),
            **self.details,
        }


class Stopped(Exception):
    """An evaluation was stopped before its end."""


class Evaluator:
    """Evaluates parameters on a split, any number of times. Use as a context manager.

    The step is compiled once, and the processes that read the data stay alive between passes.

    Args:
        split: None: the config's `data.eval_split`.
    """

    def __init__(self, experiment: Experiment, split: str | None = None):
        self.split = experiment.config.data.eval_split if split is None else split
        self._task = experiment.task
        self._mesh = experiment.mesh
        self._batches: Passes = experiment.inputs.eval_batches(self.split)
        self._source = experiment.inputs.source(self.split)
        self._step: Callable = experiment.eval_step
        experiment.eval_step.program(experiment.abstract_eval_batch(self.split))

    def __enter__(self) -> "Evaluator":
        return self

    def __exit__(self, *exception) -> None:
        self._batches.close()

    def __call__(self, params: Any, *, at_batch: Callable[[], bool] = lambda: True) -> Evaluation:
        """One pass over the split.

        Args:
            params: nested dict of parameters, as `Experiment.params.abstract` describes them.
            at_batch: called at each batch; returns whether the pass continues.

        Raises:
            Stopped: `at_batch` returned False.
            UserError: no example could be decoded (with data.on_error="skip").
        """
        mean, outputs, pending = Mean(), [], []

        def collect(keep: int) -> None:
            while len(pending) > keep:
                sums, output = jax.device_get(pending.pop(0))
                mean.add(sums)
                outputs.append(output)

        began = None
        for batch in bar(self._batches, desc="evaluate", unit="batch", leave=False):
            began = began or time.monotonic()
            if not at_batch():
                raise Stopped
            pending.append(self._step(params, to_devices(batch, self._mesh)))
            collect(keep=IN_FLIGHT)
        collect(keep=0)
        seconds = time.monotonic() - began

        joined = {name: np.concatenate([o[name] for o in outputs]) for name in outputs[0]}
        if self._batches.order is not None:  # back into the order of the split
            order = np.argsort(self._batches.order, kind="stable")
            joined = {name: values[order] for name, values in joined.items()}
        joined = {name: values[: len(self._source)] for name, values in joined.items()}
        counted = mean.count("loss")
        if not counted:
            raise UserError(f"none of the {len(self._source)} examples to evaluate could be decoded: see the warnings")
        metrics, details = self._task.result(mean, self._source)
        return Evaluation(
            metrics=metrics,
            headline=self._task.headline,
            details=details,
            counted=counted,
            skipped=len(self._source) - counted,
            split=self.split,
            origin=self._source.origin,
            examples=self._task.examples,
            examples_per_second=counted / seconds,
            outputs=joined,
        )


def report(config: ml_collections.ConfigDict, evaluation: Evaluation, evaluated: dict[str, Any]) -> dict[str, Any]:
    """The content of `eval.json`: the model, the data, what was evaluated (weights or checkpoint), and the result."""
    data = {"data": config.data.name, "origin": evaluation.origin, "split": evaluation.split}
    return {"model": config.model.name, **data, **evaluated, **evaluation.summary()}


def write_json(path: epath.PathLike, content: dict[str, Any]) -> None:
    with atomic.reported("result", path):
        atomic.write(path, json.dumps(content, indent=2) + "\n")


def write_table(path: epath.PathLike, rows: Sequence[Sequence[Any]]) -> None:
    """Writes a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    with atomic.reported("predictions", path):
        atomic.write(path, text.getvalue())


def evaluate(
    config: ml_collections.ConfigDict | None,
    workdir: epath.PathLike | None,
    *,
    checkpoint: str | None = None,
    kind: checkpoints.Kind | None = None,
    data_dir: str | None = None,
    split: str | None = None,
    json_path: epath.PathLike | None = None,
    predictions_path: epath.PathLike | None = None,
    weights_path: epath.PathLike | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint of a training, or a file of weights; writes the requested files.

    Args:
        config: what to evaluate on; None: the config of the run in `workdir`. Without `workdir`, its `init.weights` are
            evaluated. With `workdir`, its model, task and preprocessing (`config.FUNCTION`) must be those of the run,
            and `init.weights`, from which a run starts, is ignored.
        workdir: work directory of a training, whose checkpoint is evaluated. It may be running; nothing but `eval.json`
            is written there. The number of devices need not be that of the training.
        checkpoint: "best" (the default), "latest" or a step.
        kind: which weights of it, "raw" or "ema"; None: the config's `eval.weights`.
        data_dir: where the data is now, if not where the config says.
        split: None: the config's `data.test_split`, or `data.eval_split` where that is None.
        json_path: file for the result; None: `eval.json` in `workdir`, if that is given.
        predictions_path: file for one row per example; None: not written.
        weights_path: `.safetensors` file for the weights that were evaluated; None: not written.

    Returns:
        The content of the JSON file: the metrics, examples counted and skipped, examples/s, and what was evaluated.

    Raises:
        UserError: there is nothing to evaluate, it does not fit the model or the data, or a file cannot be written,
            which is tried before the work.
        NotWrittenError: a file could not be written in the end; the error has what would have been returned.
    """
    workdir = None if workdir is None else paths.given(workdir, "workdir")
    _check_request(config, workdir, checkpoint)
    if json_path is None and workdir is not None:
        json_path = workdir / "eval.json"
    outputs = _Outputs(json_path=json_path, predictions_path=predictions_path, weights_path=weights_path)
    if workdir is not None:
        stored = read_config(workdir)
        if config is None:
            config = stored
            config.mesh.data, config.mesh.fsdp = -1, 1  # this machine may have other devices than the one that trained
        changed = differences(stored, config, within=FUNCTION, but=EVALUATION_MAY_CHANGE)
        if changed:
            listed = "\n".join(f"  {line}" for line in changed)
            raise UserError(
                f"with this config the weights trained in {workdir} would be another function:\n{listed}\nundo these"
                " changes, or leave out the config; to evaluate them so all the same, export them, and give the file as"
                " init.weights without a work directory"
            )
        for line in differences(stored, config, within=(*HOW_COMPUTED, "model.dtype"), but=("mesh",)):
            log.info("evaluated in another way than trained: %s", line)
    if data_dir is not None:
        config = config.copy_and_resolve_references()
        config.data.data_dir = data_dir

    experiment = Experiment(config)
    split = experiment.inputs.report_split if split is None else split
    source = experiment.inputs.source(split)
    experiment.inputs.check_workers(split, training=False)
    if workdir is None:
        file = weights.read_file(config.init.weights)
        run_data.check_names(file.class_names, source.class_names, f"the weights {file.path}", source.name)
        params, evaluated = experiment.params.read(file), {"weights": config.init.weights}
    else:
        if (data := run_data.read(workdir)) is not None:
            run_data.check_names(data.class_names, source.class_names, f"the run in {workdir}", source.name)
        kind = config.eval.weights if kind is None else kind
        params, step = checkpoints.read_params(
            workdir, experiment.params.abstract, checkpoint, best_metric=checkpoints.metric_name(config), kind=kind
        )
        evaluated = {"checkpoint": os.fspath(workdir / "checkpoints" / str(step)), "step": step, "kind": kind}

    with Evaluator(experiment, split) as evaluator:
        result = evaluator(params)
    content = report(config, result, evaluated)
    facts = {**({} if workdir is None else {"step": step}), **result.metrics}
    info = model_info(config, source.class_names, facts)
    if weights_path is not None:
        params = on_one_device(params)  # all processes take part in gathering it

    def write_weights(path: epath.Path) -> None:
        model = experiment.model(params)
        model.info = info
        weights.save_weights(model, path)

    outputs.write(
        content,
        json_path=lambda path: write_json(path, content),
        predictions_path=lambda path: write_table(path, experiment.task.table(result.outputs, source)),
        weights_path=write_weights,
    )
    return content


class _Outputs:
    """The files that an evaluation is asked to write, by the names of the arguments; process 0 writes them.

    They are tried before the work. One that cannot be written after it does not keep the others from being written.

    Raises:
        UserError: one cannot be written, or has the wrong suffix.
    """

    _KINDS = {"json_path": "result", "predictions_path": "predictions", "weights_path": "weights"}

    def __init__(self, **asked: epath.PathLike | None):
        self._paths = {}
        if jax.process_index() > 0:
            return
        for name, path in asked.items():
            if path is not None:
                if name == "weights_path":
                    weights.check_suffix(path, argument=name)
                self._paths[name] = atomic.check_target(path, self._KINDS[name], argument=name)

    def write(self, result: dict[str, Any], **writers: Callable[[epath.Path], None]) -> None:
        """Writes all.

        Raises:
            NotWrittenError: some could not be written; it has the result.
        """
        problems = []
        for name, path in self._paths.items():
            try:
                writers[name](path)
            except UserError as error:
                problems.append(str(error))
            except Exception as error:  # after an hour of work, no fault may cost the result
                problems.append(f"{self._KINDS[name]} {path} could not be made: {type(error).__name__}: {error}")
        if problems:
            raise NotWrittenError("; ".join(problems), result)


def _check_request(config, workdir, checkpoint) -> None:
    """Raises a UserError, before any work, if the arguments of `evaluate` conflict."""
    if workdir is None:
        if config is None:
            raise UserError("nothing to evaluate: give the work directory of a training, or a config with init.weights")
        if config.init.weights is None:
            raise UserError("no weights: give init.weights in the config, or the work directory of a training")
        if checkpoint is not None:
            raise UserError(f"{checkpoint!r} needs the work directory of a training", argument="checkpoint")
    else:
        checkpoints.check_choice(workdir, checkpoint)
