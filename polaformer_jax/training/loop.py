"""The training of a config in a work directory, from the first step or from the latest checkpoint to the last step.

The order of things at a step: train, look at the numbers, evaluate if due, save if due, stop if asked to. A checkpoint
is the only thing that a run goes on from: data, randomness and learning rate are functions of the step, and what has
been counted since the last report is saved with it. So an interrupted run writes what an undisturbed one would have.
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

from polaformer_jax.errors import Interrupted, UserError
from polaformer_jax.training import debugging, record, reports
from polaformer_jax.training.agreement import Agreement
from polaformer_jax.training.checkpoints import COUNTS, Checkpoints, metric_name
from polaformer_jax.training.evaluation import Evaluation, Evaluator, Stopped, report, write_json
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.progress import Progress, log
from polaformer_jax.training.report import Result
from polaformer_jax.training.sharding import to_devices
from polaformer_jax.training.signals import StopRequests
from polaformer_jax.training.step import TrainState
from polaformer_jax.training.utilisation import Utilisation
from polaformer_jax.training.watchdog import Watchdog
from polaformer_jax.training.window import Window
from polaformer_jax.training.workdir import claim, writable
from polaformer_jax.training.writers import make_writer

SAVE, STOP = 1, 2  # what a process may wish for at a step; the greater one includes the other


class NonFiniteError(UserError):
    """The loss or the gradient of a step is not a finite number."""


def train(config: ml_collections.ConfigDict, workdir: epath.PathLike, *, stop: StopRequests | None = None) -> Result:
    """Trains, or goes on training, or if training is finished only evaluates.

    Args:
      config: one that `configs/defaults.py` describes.
      workdir: created if need be; holds all that the run writes.
      stop: where it is heard that the run should stop; None: nowhere.

    Returns:
      The evaluation of the best checkpoint.

    Raises:
      UserError: the config, the data or the work directory cannot be used, or a checkpoint not be written.
      NonFiniteError: the loss or a gradient is not finite. The checkpoints before it are kept.
      Interrupted: the run was told to stop, and has saved its state.
    """
    stop = StopRequests() if stop is None else stop
    experiment = Experiment(config)
    experiment.check_training()
    config = experiment.config
    with (
        claim(workdir, config) as workdir,
        Checkpoints(
            workdir / "checkpoints",
            keep_last=config.checkpoint.keep_last,
            best_metric=metric_name(config),
        ) as checkpoints,
        Evaluator(experiment) as evaluator,
    ):
        restored = checkpoints.restore(experiment.abstract_state)
        run = _Run(experiment, workdir, checkpoints, evaluator, stop)
        if restored is None:
            run.to_the_end(experiment.initial_state())
        else:
            step = int(restored.state.step)
            log.info("going on from the checkpoint of step %d of %d", step, experiment.length.total)
            if step < experiment.length.total or not restored.evaluated:
                run.to_the_end(restored.state, counted=restored.counted, evaluated=restored.evaluated)
        if not (workdir / record.FILE).exists():
            record.write(workdir, experiment)
        del restored
        return _conclude(experiment, workdir, checkpoints, evaluator)


class _Run:
    """One process's way from a state to the last step."""

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
        self.agree = Agreement(experiment.mesh)
        self.window = Window(self.config.train.batch_size, experiment.modality.examples)
        self.utilisation = Utilisation(experiment)
        self.watchdog = Watchdog(self.config.watchdog.step_s)
        self.saved_at = time.monotonic()

    def to_the_end(self, state: TrainState, *, counted: dict[str, Any] | None = None, evaluated: bool = True) -> None:
        """Takes all steps that are left.

        Args:
          state: used up.
          counted, evaluated: of the checkpoint that the state comes from (see `checkpoints.Restored`); None: of none.
        """
        start = int(state.step)
        log.info("%s", self._description())
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.stop.deferred())  # from here on there is something to save
            stack.callback(self.checkpoints.wait)
            with writable(self.workdir):
                self.writer = make_writer(self.workdir, start)
            stack.callback(self.writer.close)
            if start == 0:
                overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
                self.writer.write_texts(0, {"parameters": f"```\n{overview}\n```"})
            self.experiment.train_step.program(self.experiment.abstract_batch(self.config.train.batch_size))
            if self.agree.now(self._wish()) == STOP:
                self._interrupt(state, saved=counted is not None)
            stack.enter_context(self.watchdog)
            self.window.take_up(counted or {})
            if self._evaluation_is_due(start) and not evaluated:
                metrics = self._evaluate(start, state)
                if metrics is None:
                    self._interrupt(state, saved=True)
                self.checkpoints.add_metrics(start, metrics)
            self._steps(state, start)
            if self.agree.now(self._wish()) == STOP:
                raise Interrupted(f"all {self.total} steps are taken and saved; the same command evaluates them")

    def _steps(self, state: TrainState, start: int) -> None:
        train_step, examples = self.experiment.train_step, self.experiment.modality.examples
        every, log_every = self.config.checkpoint.every_steps, self.config.log.every
        batches = self.experiment.train_batches(start)
        in_flight: tuple[int, Any] | None = None
        profile = debugging.Profile(self.config.log, self.workdir)
        with (
            contextlib.closing(batches),
            contextlib.closing(profile),
            Progress(self.total, start, examples) as progress,
        ):
            for step in range(start, self.total):
                profile.before(step)
                self.watchdog.alive(f"waiting for the batch of step {step}")
                with self.window.waiting():
                    batch = next(batches)
                self.watchdog.alive(f"step {step}")
                batch = to_devices(batch, self.experiment.mesh)
                with self.window.paused():
                    train_step.program(batch)  # compiled now if sequences of this length are met for the first time
                    self.utilisation.step(batch)
                with debugging.checked(self.config.debug):
                    state, sums = train_step(state, batch)
                taken = step + 1
                # Numbers are looked at one step late, so that the device always has the next step to work on.
                if in_flight is not None:
                    self._look_at(*in_flight)
                in_flight = (step, sums)

                wish = self.agree(self._wish())
                evaluate = self._evaluation_is_due(taken)
                save = evaluate or taken % every == 0 or wish >= SAVE
                if save or taken % log_every == 0:
                    self._look_at(*in_flight)
                    in_flight = None
                progress.step()
                if taken % log_every == 0 or taken == self.total:
                    metrics = self.window.close()
                    metrics |= self.utilisation.close(metrics["seconds"])
                    self.writer.write_scalars(taken, metrics)
                    progress.report(taken, metrics)
                if save:
                    with self.window.paused():
                        metrics = self._evaluate(taken, state) if evaluate and wish < STOP else None
                        if (evaluate and metrics is None) or wish == STOP:
                            self._interrupt(state, saved=False)
                        self._save(state, metrics)
                self.checkpoints.check()

    def _wish(self) -> int:
        if self.stop.requested:
            return STOP
        minutes = self.config.checkpoint.every_minutes
        return SAVE if minutes is not None and time.monotonic() - self.saved_at > 60 * minutes else 0

    def _evaluation_is_due(self, taken: int) -> bool:
        return taken > 0 and (taken % self.eval_every == 0 or taken == self.total)

    def _look_at(self, step: int, sums: Any) -> None:
        """Waits for a step's numbers and counts them."""
        sums = jax.device_get(sums)
        (loss, count), (grad_norm, _) = sums["loss"], sums["grad_norm"]
        if np.isfinite(loss) and np.isfinite(grad_norm):
            self.window.add(sums)
            return
        found = f"step {step}: loss {loss / max(count, 1):g}, gradient norm {grad_norm:g}"
        names = self.experiment.describe_batch(step)
        batch = f"its batch: {', '.join(names[:4])}{f' and {len(names) - 4} more' if names[4:] else ''}"
        if self.config.train.on_nonfinite == "skip":
            log.warning("%s; the step is skipped (%s)", found, batch)
            self.window.leave_out()
            return
        raise NonFiniteError(
            f"{found}; {batch}. Nothing of this step was kept; the same command goes on from the latest checkpoint. A"
            " lower optimizer.lr, a longer schedule.warmup, optimizer.clip_norm or model.dtype=float32 may help, with"
            " another --workdir; eval.py --save_weights and init.weights take the weights of a checkpoint there."
            " train.on_nonfinite=skip leaves such steps out"
        )

    def _evaluate(self, step: int, state: TrainState) -> dict[str, float] | None:
        """None where it was interrupted."""
        metrics = {}
        try:
            for prefix, name, params in (("", "evaluation", state.params), ("ema_", "moving average", state.ema)):
                if params is not None:
                    result = self.evaluator(params, at_batch=self._may_go_on)
                    log.info("step %d/%d  %s: %s", step, self.total, name, _sentence(result))
                    metrics |= {f"{prefix}{name}": value for name, value in result.metrics.items()}
        except Stopped:
            return None
        self.writer.write_scalars(step, {f"eval_{name}": value for name, value in metrics.items()})
        # An early step may not be the best: its metrics are kept, but do not count.
        return metrics | {COUNTS: float(step > self.config.checkpoint.best_after * self.total)}

    def _may_go_on(self) -> bool:
        self.watchdog.alive("evaluation")
        return self.agree(self._wish()) < STOP

    def _save(self, state: TrainState, metrics: dict[str, float] | None) -> None:
        self.watchdog.alive("saving a checkpoint")
        # Before the checkpoint, so that no step that it has behind it is missing from the metrics.
        self.writer.flush()
        self.checkpoints.save(state, metrics, self.window.saved())
        self.saved_at = time.monotonic()

    def _interrupt(self, state: TrainState, *, saved: bool) -> None:
        """Saves the state unless it is `saved`, and raises Interrupted."""
        step = int(state.step)
        if not saved:
            self._save(state, None)
        self.checkpoints.wait()
        raise Interrupted(f"the checkpoint of step {step} of {self.total} is saved; the same command goes on from it")

    def _description(self) -> str:
        config, experiment = self.config, self.experiment
        parameters = sum(leaf.size for leaf in jax.tree.leaves(experiment.abstract_params))
        return (
            f"{config.model.name}: {parameters:,} parameters in {config.model.dtype} on {experiment.mesh.size}"
            f" {jax.devices()[0].platform} device(s); {len(experiment.train_source):,} examples of {config.data.name},"
            f" {self.total:,} steps of {config.train.batch_size}"
        )


def _conclude(experiment: Experiment, workdir: epath.Path, checkpoints: Checkpoints, evaluator: Evaluator) -> Result:
    """Evaluates the best checkpoint on the split that is reported, writes `eval.json` and the pictures."""
    kind, split = experiment.config.eval.weights, experiment.report_split
    params, step = checkpoints.restore_params(experiment.abstract_params, "best", kind=kind)
    if split == evaluator.split:
        evaluation = evaluator(params)
    else:
        with Evaluator(experiment, split) as another:
            evaluation = another(params)
    drawn = []
    if jax.process_index() == 0:
        evaluated = {"checkpoint": os.fspath(checkpoints.directory / str(step)), "step": step, "kind": kind}
        write_json(workdir / "eval.json", report(experiment.config, evaluation, evaluated))
        if experiment.config.log.pictures:
            source = experiment.source(split)
            drawn = reports.draw_all(workdir, evaluation, source, experiment.modality.picture_of(source))
    return Result(evaluation, step, checkpoints.directory / str(step), drawn)


def _sentence(evaluation: Evaluation) -> str:
    metrics = evaluation.metrics
    text = f"accuracy {metrics['accuracy']:.4f}, loss {metrics['loss']:.4f}, {evaluation.counted} {evaluation.examples}"
    return text + (f" ({evaluation.skipped} could not be decoded)" if evaluation.skipped else "")
