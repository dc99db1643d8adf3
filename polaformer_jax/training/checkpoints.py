"""Training state on disk: an Orbax CheckpointManager that keeps the latest N steps and the best one.

A step's folder holds the items `params`, `optimizer` (with the step) and, where there is a moving average, `ema`, so
that evaluation reads the one that it wants.
"""

import math
from typing import Any, Literal

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from polaformer_jax.errors import UserError
from polaformer_jax.training.step import TrainState

GREATER_IS_BETTER = {"accuracy": True, "loss": False}
Kind = Literal["raw", "ema"]


def metric_name(config) -> str:
    """The metric by which a config's best checkpoint is chosen: that of the weights that `eval.weights` names."""
    return config.checkpoint.best_metric if config.eval.weights == "raw" else f"ema_{config.checkpoint.best_metric}"


class Checkpoints:
    """The checkpoints of one work directory. Use as a context manager: leaving it waits for saves under way.

    Args:
      directory: created if need be, unless `read_only`.
      keep_last: how many of the latest steps are kept.
      best_metric: name of the evaluation metric by which one more step, the best, is kept.
      read_only: never writes or deletes, as evaluation beside a running training wants.
    """

    def __init__(self, directory: epath.PathLike, *, keep_last: int, best_metric: str, read_only: bool = False):
        self.directory = epath.Path(directory).resolve()  # Orbax writes to absolute paths only
        self._metric = best_metric
        self._sign = 1.0 if GREATER_IS_BETTER[best_metric.removeprefix("ema_")] else -1.0
        keep = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep_last),
                checkpoint_managers.BestN(get_metric_fn=self._score, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        # Both are needed: without best_fn metrics are not written, without the policy the newest step may be deleted.
        options = ocp.CheckpointManagerOptions(
            best_fn=self._score, preservation_policy=keep, read_only=read_only, create=not read_only
        )
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_names=("params", "optimizer", "ema")
        )

    def _score(self, metrics: dict[str, float]) -> float:
        score = self._sign * metrics[self._metric]
        return score if math.isfinite(score) else -math.inf

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self._manager.close()

    def save(self, state: TrainState, metrics: dict[str, float] | None = None) -> None:
        """Starts saving; writing goes on in the background.

        Args:
          state: its arrays may be donated as soon as this returns.
          metrics: evaluation metrics of this very state, where it has been evaluated.

        Raises:
          RuntimeError: a later step has been saved. ValueError: this step has been.
        """
        step = int(state.step)
        items = {
            "params": ocp.args.StandardSave(state.params),
            "optimizer": ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        # force: the loop decides when to save. Orbax answers False, silently, to a step that is not the newest.
        if not self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True):
            raise RuntimeError(f"the checkpoint of step {step} was not saved: {self.directory} holds {self.steps()}")

    def wait(self) -> None:
        """Returns when all saves are on disk; raises what went wrong with them."""
        self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The evaluated step with the best metric, the later one of equals; None if none was evaluated."""
        scored = [(self._score(metrics), step) for step in self.steps() if (metrics := self._manager.metrics(step))]
        return max(scored)[1] if scored else None

    def restore(self, abstract: TrainState) -> TrainState | None:
        """The state of the latest checkpoint, None if there is none.

        Args:
          abstract: shapes, dtypes and shardings of the state: where its arrays will be placed.
        """
        step = self.latest()
        if step is None:
            return None
        items = {
            "params": ocp.args.StandardRestore(abstract.params),
            "optimizer": ocp.args.StandardRestore({"step": abstract.step, "opt_state": abstract.opt_state}),
        }
        if abstract.ema is not None:
            items["ema"] = ocp.args.StandardRestore(abstract.ema)
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return TrainState(params=restored["params"], **restored["optimizer"], ema=restored.get("ema"))

    def restore_params(self, abstract: Any, which: str | int = "best", *, kind: Kind = "raw") -> tuple[Any, int]:
        """Parameters alone, and the step they are of.

        Args:
          abstract: nested dict of `jax.ShapeDtypeStruct` with shardings.
          which: "best", "latest", or a step.
          kind: "raw", or "ema" for the moving average.

        Raises:
          UserError: there is no such checkpoint, or it has no moving average.
        """
        step = {"best": self.best, "latest": self.latest}[which]() if isinstance(which, str) else which
        if step is None or step not in self.steps():
            raise UserError(f"{self.directory} has no checkpoint {which!r}; it has the steps {self.steps()}")
        item = {"raw": "params", "ema": "ema"}[kind]
        if not (self.directory / str(step) / item).exists():
            raise UserError(
                f"the checkpoint of step {step} in {self.directory} has no moving average (ema.decay was None)"
            )
        items = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)})
        return self._manager.restore(step, args=items)[item], step


def check_choice(workdir: epath.PathLike, which: str | None) -> None:
    """Raises a UserError where `workdir` has no checkpoints at all, or `which` cannot mean one."""
    if not (epath.Path(workdir) / "checkpoints").exists():
        raise UserError(f"{workdir} has no checkpoints: it is not the work directory of a training, or one just begun")
    if which is not None and which not in ("best", "latest") and not which.isdecimal():
        raise UserError(f"--checkpoint={which}: it is best, latest or a step")


def read_params(
    workdir: epath.PathLike, abstract: Any, which: str | None, *, best_metric: str, kind: Kind = "raw"
) -> tuple[Any, int]:
    """Parameters of a checkpoint in a work directory, whose training may be running, and the step they are of.

    Args:
      abstract: nested dict of `jax.ShapeDtypeStruct` with shardings.
      which: "best" (None is this), "latest", or a step in digits.
      best_metric: see `Checkpoints`. kind: "raw", or "ema" for the moving average.

    Raises:
      UserError: there is no such checkpoint.
    """
    check_choice(workdir, which)
    chosen = int(which) if which and which.isdecimal() else which or "best"
    directory = epath.Path(workdir) / "checkpoints"
    with Checkpoints(directory, keep_last=1, best_metric=best_metric, read_only=True) as checkpoints:
        return checkpoints.restore_params(abstract, chosen, kind=kind)
