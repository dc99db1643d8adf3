"""Trains a config in a work directory, from the first step or from the latest checkpoint to the last step.

The order at each step: train, record the metrics, evaluate if due, save if due, stop if requested. A run needs only a
checkpoint to resume: data, random numbers and learning rate are functions of the step, and the sums since the last log
line are saved with it. So an interrupted run writes what an uninterrupted one would have written.
"""

import contextlib
import os
import time
from typing import Any

import jax
import ml_collections
import numpy as np
from clu import parameter_overview
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils

from polaformer_jax import weights
from polaformer_jax.errors import Interrupted, NotWrittenError, UserError
from polaformer_jax.files import paths
from polaformer_jax.training import reports, run_data, runtime
from polaformer_jax.training.checkpoints import COUNTS, Checkpoints, Kind, metric_name
from polaformer_jax.training.evaluation import Evaluation, Evaluator, Stopped, report, write_json
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.metrics import RunningAverages, Utilisation, make_writer
from polaformer_jax.training.progress import Progress, log
from polaformer_jax.training.reports import Result
from polaformer_jax.training.run_data import RunData
from polaformer_jax.training.sharding import on_one_device, to_devices
from polaformer_jax.training.signals import StopRequests
from polaformer_jax.training.state import TrainState
from polaformer_jax.training.workdir import TRAINING_FILE, claim, writable, write_training

SAVE, STOP = 1, 2  # what a process may request at a step; the larger includes the smaller


class NonFiniteError(UserError):
    """The loss or the gradient of a step is not finite."""


def train(config: ml_collections.ConfigDict, workdir: epath.PathLike, *, stop: StopRequests | None = None) -> Result:
    """Trains, resumes a training, or evaluates a finished one.

    Args:
        config: see `polaformer_jax.config`.
        workdir: created if it does not exist; holds all that the run writes.
        stop: source of stop requests; None: there are none.

    Returns:
        The evaluation of the best checkpoint.

    Raises:
        UserError: the config, the data or the work directory cannot be used, or a checkpoint cannot be written.
        NonFiniteError: the loss or a gradient is not finite. The checkpoints before it are kept.
        NotWrittenError: `eval.json` could not be written; the error has what would have been returned.
        Interrupted: the run was requested to stop, and has saved its state.
    """
    workdir = paths.given(workdir, "workdir")
    stop = StopRequests() if stop is None else stop
    experiment = Experiment(config, epoch_examples=run_data.epoch_examples(workdir))
    experiment.check_training()
    config = experiment.config
    data = RunData.of(experiment.inputs, config)
    with contextlib.ExitStack() as stack:
        workdir = stack.enter_context(claim(workdir, config, data))
        checkpoints = stack.enter_context(
            Checkpoints(workdir / "checkpoints", keep_last=config.checkpoint.keep_last, best_metric=metric_name(config))
        )
        evaluator = stack.enter_context(Evaluator(experiment))
        restored = checkpoints.restore(experiment.states.abstract)
        loop = _Loop(experiment, workdir, checkpoints, evaluator, stop)
        if restored is None:
            file = None if config.init.weights is None else weights.read_file(config.init.weights)
            if file is not None and not experiment.params.is_of_backbone(file):
                _warn_of_other_names(file, data.class_names)
            loop.run(experiment.states.initial(file))
            del file
        else:
            step = int(restored.state.step)
            log.info("resuming from the checkpoint of step %d of %d", step, experiment.length.total)
            if step < experiment.length.total or not restored.evaluated:
                loop.run(restored.state, counted=restored.counted, evaluated=restored.evaluated)
        if not (workdir / TRAINING_FILE).exists():
            write_training(workdir, steps=experiment.length.total, devices=experiment.mesh.size)
        del restored
        return _conclude(experiment, workdir, checkpoints, evaluator)


class _Loop:
    """The training loop of one process, from a state to the last step."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: epath.Path,
        checkpoints: Checkpoints,
        evaluator: Evaluator,
        stop: StopRequests,
    ):
        self.experiment = experiment
        self.config = experiment.config
        self.workdir = workdir
        self.checkpoints = checkpoints
        self.evaluator = evaluator
        self.stop = stop
        self.total = experiment.length.total
        self.eval_every = max(1, round(self.config.eval.every * experiment.length.unit))
        self.consensus = runtime.RequestConsensus(experiment.mesh)
        self.averages = RunningAverages(self.config.train.batch_size, experiment.task.examples)
        self.utilisation = Utilisation(experiment.step_flops, experiment.mesh)
        self.watchdog = runtime.Watchdog(self.config.watchdog.step_s)
        self.saved_at = time.monotonic()

    def run(self, state: TrainState, *, counted: dict[str, Any] | None = None, evaluated: bool = True) -> None:
        """Takes all remaining steps.

        Args:
            state: donated.
            counted, evaluated: of the checkpoint that the state was restored from, see `checkpoints.Restored`; None: it
                is the initial state.
        """
        start = int(state.step)
        log.info("%s", self._description())
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.stop.deferred())  # from here on there is a state to save
            stack.callback(self.checkpoints.wait)
            with writable(self.workdir):
                self.writer = make_writer(self.workdir, start)
            stack.callback(self.writer.close)
            if start == 0:
                overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
                self.writer.write_texts(0, {"parameters": f"```\n{overview}\n```"})
            self.experiment.train_step.program(self.experiment.abstract_batch(self.config.train.batch_size))
            if self.consensus.now(self._request()) == STOP:
                self._interrupt(state, saved=counted is not None)
            stack.enter_context(self.watchdog)
            self.averages.restore(counted or {})
            if self._evaluation_is_due(start) and not evaluated:
                metrics = self._evaluate(start, state)
                if metrics is None:
                    self._interrupt(state, saved=True)
                self.checkpoints.add_metrics(start, metrics)
            self._steps(state, start)
            if self.consensus.now(self._request()) == STOP:
                raise Interrupted(f"all {self.total} steps are taken and saved; the same command evaluates the result")

    def _steps(self, state: TrainState, start: int) -> None:
        train_step, examples = self.experiment.train_step, self.experiment.task.examples
        every, log_every = self.config.checkpoint.every_steps, self.config.log.every
        batches = self.experiment.inputs.train_batches(start)
        in_flight: tuple[int, Any] | None = None
        profile = runtime.Profile(self.config.log, self.workdir)
        with (
            contextlib.closing(batches),
            contextlib.closing(profile),
            Progress(self.total, start, examples) as progress,
        ):
            for step in range(start, self.total):
                profile.before(step)
                self.watchdog.alive(f"waiting for the batch of step {step}")
                with self.averages.waiting():
                    batch = next(batches)
                self.watchdog.alive(f"step {step}")
                batch = to_devices(batch, self.experiment.mesh)
                with self.averages.paused():
                    train_step.program(batch)  # compiles on the first batch of a length
                    self.utilisation.step(batch)
                with runtime.checked(self.config.debug):
                    state, sums = train_step(state, batch)
                taken = step + 1
                # Metrics are fetched one step late, so that the device always has a next step enqueued.
                if in_flight is not None:
                    self._record_metrics(*in_flight)
                in_flight = (step, sums)

                request = self.consensus(self._request())
                evaluate = self._evaluation_is_due(taken)
                save = evaluate or taken % every == 0 or request >= SAVE
                if save or taken % log_every == 0:
                    self._record_metrics(*in_flight)
                    in_flight = None
                progress.step()
                if taken % log_every == 0 or taken == self.total:
                    metrics = self.averages.reset()
                    metrics |= self.utilisation.reset(metrics["seconds"])
                    self.writer.write_scalars(taken, metrics)
                    progress.report(taken, metrics)
                if save:
                    with self.averages.paused():
                        metrics = self._evaluate(taken, state) if evaluate and request < STOP else None
                        if (evaluate and metrics is None) or request == STOP:
                            self._interrupt(state, saved=False)
                        self._save(state, metrics)
                self.checkpoints.check()

    def _request(self) -> int:
        if self.stop.requested:
            return STOP
        minutes = self.config.checkpoint.every_minutes
        return SAVE if minutes is not None and time.monotonic() - self.saved_at > 60 * minutes else 0

    def _evaluation_is_due(self, taken: int) -> bool:
        return taken > 0 and (taken % self.eval_every == 0 or taken == self.total)

    def _record_metrics(self, step: int, sums: Any) -> None:
        """Waits for the metrics of a step and adds them to the averages."""
        sums = jax.device_get(sums)
        (loss, count), (grad_norm, _) = sums["loss"], sums["grad_norm"]
        if np.isfinite(loss) and np.isfinite(grad_norm):
            self.averages.add(sums)
            return
        found = f"step {step}: loss {loss / max(count, 1):g}, gradient norm {grad_norm:g}"
        names = self.experiment.inputs.describe_batch(step)
        batch = f"its batch: {', '.join(names[:4])}{f' and {len(names) - 4} more' if names[4:] else ''}"
        if self.config.train.on_nonfinite == "skip":
            log.warning("%s; the step is skipped (%s)", found, batch)
            self.averages.count_skipped()
            return
        raise NonFiniteError(
            f"{found}; {batch}. This step was discarded; the same command resumes from the latest checkpoint. A lower"
            " optimizer.lr, a longer schedule.warmup, optimizer.clip_norm or model.dtype=float32 may help, in another"
            " work directory, which can start from the weights of a checkpoint (export them, then init.weights)."
            " train.on_nonfinite=skip skips such steps"
        )

    def _evaluate(self, step: int, state: TrainState) -> dict[str, float] | None:
        """Evaluation metrics of a state; None where the evaluation was interrupted."""
        metrics = {}
        try:
            for prefix, name, params in (("", "evaluation", state.params), ("ema_", "moving average", state.ema)):
                if params is not None:
                    result = self.evaluator(params, at_batch=self._may_continue)
                    log.info("step %d/%d  %s: %s", step, self.total, name, _sentence(result))
                    metrics |= {f"{prefix}{name}": value for name, value in result.metrics.items()}
        except Stopped:
            return None
        self.writer.write_scalars(step, {f"eval_{name}": value for name, value in metrics.items()})
        # Early checkpoints cannot be the best: their metrics are kept, but not compared.
        return metrics | {COUNTS: float(step > self.config.checkpoint.best_after * self.total)}

    def _may_continue(self) -> bool:
        self.watchdog.alive("evaluation")
        return self.consensus(self._request()) < STOP

    def _save(self, state: TrainState, metrics: dict[str, float] | None) -> None:
        self.watchdog.alive("saving a checkpoint")
        # Before the checkpoint, so that the metrics of all its steps are on disk.
        self.writer.flush()
        self.checkpoints.save(state, metrics, self.averages.state_dict())
        self.saved_at = time.monotonic()

    def _interrupt(self, state: TrainState, *, saved: bool) -> None:
        """Saves the state unless it is `saved` already, and raises Interrupted."""
        step = int(state.step)
        if not saved:
            self._save(state, None)
        self.checkpoints.wait()
        raise Interrupted(f"the checkpoint of step {step} of {self.total} is saved; the same command resumes from it")

    def _description(self) -> str:
        config, experiment = self.config, self.experiment
        return (
            f"{config.model.name}: {experiment.parameter_count:,} parameters in {config.model.dtype} on"
            f" {experiment.mesh.size} {jax.devices()[0].platform} device(s);"
            f" {len(experiment.inputs.train_source):,} examples of {config.data.name},"
            f" {self.total:,} steps of {config.train.batch_size}"
        )


def _conclude(experiment: Experiment, workdir: epath.Path, checkpoints: Checkpoints, evaluator: Evaluator) -> Result:
    """Evaluates the best checkpoint on the reported split, writes `eval.json` and the pictures."""
    kind, split = experiment.config.eval.weights, experiment.inputs.report_split
    params, step = checkpoints.restore_params(experiment.params.abstract, "best", kind=kind)
    if split == evaluator.split:
        evaluation = evaluator(params)
    else:
        with Evaluator(experiment, split) as another:
            evaluation = another(params)
    result = Result(evaluation, step, checkpoints.directory / str(step), [])
    model = None
    if experiment.config.log.pictures and experiment.task.draws_with_model:
        model = experiment.model(on_one_device(params))  # all processes take part in gathering it
    try:
        if jax.process_index() == 0:
            _write(experiment, workdir, result, kind, model)
    finally:
        if model is not None and jax.process_count() > 1:  # drawing may take longer than processes wait at their end
            multihost_utils.sync_global_devices("the pictures are drawn")
    return result


def _write(experiment: Experiment, workdir: epath.Path, result: Result, kind: Kind, model: nnx.Module | None) -> None:
    """Writes `eval.json` and the pictures.

    Raises:
        NotWrittenError: `eval.json` could not be written.
    """
    evaluation = result.evaluation
    evaluated = {"checkpoint": os.fspath(result.checkpoint), "step": result.step, "kind": kind}
    try:
        write_json(workdir / "eval.json", report(experiment.config, evaluation, evaluated))
    except UserError as error:
        raise NotWrittenError(str(error), result) from error
    if experiment.config.log.pictures:
        result.pictures.extend(reports.draw_all(workdir, evaluation, experiment, model))


def _warn_of_other_names(file: weights.WeightsFile, class_names: tuple[str, ...] | None) -> None:
    """Warns where a run begins with a classifier of as many classes as the data has, but other ones."""
    before = file.class_names
    if before is not None and class_names is not None and before != class_names and len(before) == len(class_names):
        label = next(label for label, names in enumerate(zip(before, class_names, strict=True)) if len(set(names)) > 1)
        log.warning(
            "%s has a classifier for other classes (label %d: %s there, %s in the data); training begins with it",
            *(file.path, label, before[label], class_names[label]),
        )


def _sentence(evaluation: Evaluation) -> str:
    metrics = evaluation.metrics
    label = reports.LABELS.get(evaluation.headline, evaluation.headline)
    text = f"{label} {metrics[evaluation.headline]:.4f}, loss {metrics['loss']:.4f}"
    text += f", {evaluation.counted} {evaluation.examples}"
    return text + (f" ({evaluation.skipped} could not be decoded)" if evaluation.skipped else "")
