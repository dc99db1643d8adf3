"""The training of a config in a work directory, from the first step or from the latest checkpoint to the last step.

The order of things at a step: train, look at the numbers, evaluate if due, save if due. A checkpoint is the only thing
that a run goes on from: data, randomness and learning rate are functions of the step.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from clu import parameter_overview
from etils import epath

from polaformer_jax.errors import UserError
from polaformer_jax.training import pictures
from polaformer_jax.training.checkpoints import Checkpoints, metric_name
from polaformer_jax.training.evaluation import Evaluation, Evaluator, report, write_json
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.metrics import Mean
from polaformer_jax.training.progress import Progress, log
from polaformer_jax.training.report import Result
from polaformer_jax.training.scalars import make_writer
from polaformer_jax.training.sharding import to_devices
from polaformer_jax.training.step import TrainState
from polaformer_jax.training.workdir import claim


class NonFiniteError(UserError):
    """The loss or the gradient of a step is not a finite number."""


def train(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> Result:
    """Trains, or goes on training, or if training is finished only evaluates.

    Args:
      config: one that `configs/defaults.py` describes.
      workdir: created if need be; holds all that the run writes.

    Returns:
      The evaluation of the best checkpoint.

    Raises:
      UserError: the config, the data or the work directory cannot be used.
      NonFiniteError: the loss or a gradient is not finite. The checkpoints before it are kept.
    """
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
        state = checkpoints.restore(experiment.abstract_state)
        if state is None:
            state = experiment.initial_state()
        else:
            log.info("going on from the checkpoint of step %d of %d", int(state.step), experiment.length.total)
        if int(state.step) < experiment.length.total:
            state = _Run(experiment, workdir, checkpoints, evaluator).to_the_end(state)
        del state
        return _conclude(experiment, workdir, checkpoints, evaluator)


class _Run:
    """One process's way from a state to the last step."""

    def __init__(self, experiment: Experiment, workdir: epath.Path, checkpoints: Checkpoints, evaluator: Evaluator):
        self.experiment = experiment
        self.config = experiment.config
        self.checkpoints = checkpoints
        self.evaluator = evaluator
        self.total = experiment.length.total
        self.eval_every = max(1, round(self.config.eval.every * experiment.length.unit))
        self.writer = make_writer(workdir)

    def to_the_end(self, state: TrainState) -> TrainState:
        start = int(state.step)
        log.info("%s", self._description())
        if start == 0:
            overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
            self.writer.write_texts(0, {"parameters": f"```\n{overview}\n```"})

        began = time.monotonic()
        train_step = self.experiment.compile_train_step()
        log.info("compiled the training step in %.1f s", time.monotonic() - began)

        batches = self.experiment.train_batches(start)
        window = _Window(self.config.train.batch_size)
        in_flight: tuple[int, Any] | None = None
        try:
            with Progress(self.total, start) as progress:
                for step in range(start, self.total):
                    with window.waiting():
                        batch = next(batches)
                    state, sums = train_step(state, to_devices(batch, self.experiment.mesh))
                    taken = step + 1
                    # Numbers are looked at one step late, so that the device always has the next step to work on.
                    if in_flight is not None:
                        window.add(*in_flight)
                    in_flight = (step, sums)

                    evaluate = taken % self.eval_every == 0 or taken == self.total
                    save = evaluate or taken % self.config.checkpoint.every_steps == 0
                    if save or taken % self.config.log.every == 0:
                        window.add(*in_flight)
                        in_flight = None
                    progress.step()
                    if taken % self.config.log.every == 0 or taken == self.total:
                        metrics = window.close()
                        self.writer.write_scalars(taken, metrics)
                        progress.report(taken, metrics)
                    if save:
                        with window.paused():
                            self.checkpoints.save(state, self._evaluate(taken, state) if evaluate else None)
        finally:
            batches.close()
            self.writer.flush()
            self.checkpoints.wait()
            self.writer.close()
        return state

    def _evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        result = self.evaluator(state.params)
        log.info("step %d/%d  evaluation: %s", step, self.total, _sentence(result))
        metrics = dict(result.metrics)
        if state.ema is not None:
            result = self.evaluator(state.ema)
            log.info("step %d/%d  moving average: %s", step, self.total, _sentence(result))
            metrics |= {f"ema_{name}": value for name, value in result.metrics.items()}
        self.writer.write_scalars(step, {f"eval_{name}": value for name, value in metrics.items()})
        return metrics

    def _description(self) -> str:
        config, experiment = self.config, self.experiment
        parameters = sum(leaf.size for leaf in jax.tree.leaves(experiment.abstract_params))
        return (
            f"{config.model.name}: {parameters:,} parameters in {config.model.dtype} on {experiment.mesh.size}"
            f" {jax.devices()[0].platform} device(s); {len(experiment.train_source):,} examples of {config.data.name},"
            f" {self.total:,} steps of {config.train.batch_size}"
        )


class _Window:
    """Numbers of the steps since the last report."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._restart()

    def _restart(self) -> None:
        self._mean = Mean()
        self._steps = 0
        self._waited = 0.0
        self._began = time.monotonic()

    def add(self, step: int, sums: Any) -> None:
        """Waits for a step's numbers and adds them. Raises a NonFiniteError if they are not finite."""
        sums = jax.device_get(sums)
        (loss, count), (grad_norm, _) = sums["loss"], sums["grad_norm"]
        if not (np.isfinite(loss) and np.isfinite(grad_norm)):
            raise NonFiniteError(
                f"step {step}: loss {loss / max(count, 1):g}, gradient norm {grad_norm:g}. Nothing of this step was"
                " kept; the same command goes on from the latest checkpoint. A lower optimizer.lr, a longer"
                " schedule.warmup, optimizer.clip_norm or model.dtype=float32 may help, with another --workdir; eval.py"
                " --save_weights and init.weights take the weights of a checkpoint there"
            )
        self._mean.add(sums)
        self._steps += 1

    def close(self) -> dict[str, float]:
        """The means, and how fast it went; a new window begins."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        means = self._mean.result()
        metrics = {
            **means,
            "skipped": means.get("skipped", 0.0) * self._steps,  # records, not a mean
            "images_per_second": self._steps * self._batch_size / seconds,
            "input_wait_share": self._waited / seconds,
        }
        self._restart()
        return metrics

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Waiting for data: the time counts, and is also counted apart."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Not training: the time does not count."""
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began


def _conclude(experiment: Experiment, workdir: epath.Path, checkpoints: Checkpoints, evaluator: Evaluator) -> Result:
    """Evaluates the best checkpoint, writes `eval.json` and the pictures."""
    kind = experiment.config.eval.weights
    params, step = checkpoints.restore_params(experiment.abstract_params, "best", kind=kind)
    evaluation = evaluator(params)
    drawn = []
    if jax.process_index() == 0:
        evaluated = {"checkpoint": os.fspath(checkpoints.directory / str(step)), "step": step, "kind": kind}
        write_json(workdir / "eval.json", report(experiment.config, evaluation, evaluated))
        if experiment.config.log.pictures:
            drawn = pictures.draw_all(workdir, evaluation, experiment.eval_source, experiment.eval_transform)
    return Result(evaluation, step, checkpoints.directory / str(step), drawn)


def _sentence(evaluation: Evaluation) -> str:
    metrics = evaluation.metrics
    text = f"accuracy {metrics['accuracy']:.4f}, loss {metrics['loss']:.4f}, {evaluation.counted} images"
    return text + (f" ({evaluation.skipped} could not be decoded)" if evaluation.skipped else "")
