"""Training state on disk: an Orbax CheckpointManager that keeps the latest N steps and the best one.

A step's folder holds the items `params`, `optimizer` (with the step) and, where there is a moving average, `ema`, so
that evaluation reads only the one it needs; and `record`: a checksum of every array, and the sums of the run since it
last wrote its metrics. Orbax restores a tensor with a flipped bit without an error; the checksums detect it.
"""

import dataclasses
import json
import math
import time
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from polaformer_jax.errors import UserError
from polaformer_jax.files import paths
from polaformer_jax.training.checksums import described, named, opened, sealed
from polaformer_jax.training.progress import log
from polaformer_jax.training.state import TrainState

GREATER_IS_BETTER = {"accuracy": True, "loss": False, "miou": True}
Kind = Literal["raw", "ema"]
COUNTS = "counts_for_best"  # one of a checkpoint's metrics: 0 if it cannot be the best, whatever the others are
_ITEMS = ("params", "optimizer", "ema", "record")


class DamagedError(UserError):
    """A checkpoint that cannot be read, or holds other values than were saved."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a run resumes from.

    Attributes:
        state: the state that was saved.
        counted: the argument of `save`.
        evaluated: whether the step has evaluation metrics.
    """

    state: TrainState
    counted: dict[str, Any]
    evaluated: bool


def metric_name(config) -> str:
    """The metric by which a config's best checkpoint is chosen: that of the weights that `eval.weights` names."""
    return config.checkpoint.best_metric if config.eval.weights == "raw" else f"ema_{config.checkpoint.best_metric}"


class Checkpoints:
    """The checkpoints of one work directory. Use as a context manager: leaving it waits for pending saves.

    Args:
        directory: created if necessary, unless `read_only`.
        keep_last: how many of the latest steps are kept.
        best_metric: name of the evaluation metric by which one more step, the best, is kept.
        read_only: never writes or deletes, as evaluation during a running training requires.

    Raises:
        UserError: `directory` is in a bucket, and google-cloud-storage is not installed.
    """

    def __init__(self, directory: epath.PathLike, *, keep_last: int, best_metric: str, read_only: bool = False):
        self.directory = paths.absolute(paths.given(directory))  # as Orbax needs it: absolute, and with safe globs
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
        paths.check_checkpoint_client(self.directory)
        self._set_aside_unreadable_metrics(read_only)
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=_ITEMS)
        self._held = paths.Held(self.directory)

    def _score(self, metrics: dict[str, float]) -> float:
        score = self._sign * metrics[self._metric]
        return score if math.isfinite(score) and metrics.get(COUNTS, 1.0) else -math.inf

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self._manager.close()
        self._held.close()

    def save(
        self, state: TrainState, metrics: dict[str, float] | None = None, counted: dict[str, Any] | None = None
    ) -> None:
        """Starts saving; writing continues in the background.

        Args:
            state: its arrays may be donated as soon as this returns.
            metrics: evaluation metrics of this state, if it has been evaluated.
            counted: what else the run needs to resume, in types that JSON has.

        Raises:
            UserError: this save or the one before could not be written.
            RuntimeError: a later step has been saved.
            ValueError: this step has been saved.
        """
        step = int(state.step)
        trees = {"params": state.params, "optimizer": {"step": state.step, "opt_state": state.opt_state}}
        if state.ema is not None:
            trees["ema"] = state.ema
        record = {"arrays": {name: named(tree) for name, tree in trees.items()}, "counted": counted or {}}
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items["record"] = ocp.args.JsonSave(sealed(record))
        self.wait()  # for the save before, whose failure would otherwise be attributed to this one
        try:
            self._try_to_write()
        except Exception as error:  # buckets have exceptions of their own
            raise self._failed(error) from error
        try:
            # force: the loop decides when to save. Orbax returns False, silently, for a step that is not the newest.
            saved = self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)
        except OSError as error:
            raise self._failed(error) from error
        if not saved:
            raise RuntimeError(f"the checkpoint of step {step} was not saved: {self.directory} holds {self.steps()}")

    def _try_to_write(self) -> None:
        """Raises if nothing can be written now. (Orbax would notice after five minutes of waiting.)"""
        if jax.process_index() == 0:
            if not self._held.is_in_place():
                raise FileNotFoundError(f"{self.directory} is not the folder any more that the run began with")
            probe = self.directory.parent / ".writable"
            probe.write_bytes(bytes(4096))
            probe.unlink()

    def add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Adds evaluation metrics to a checkpoint that was saved without them."""
        self.wait()
        saver = ocp.Checkpointer(ocp.JsonCheckpointHandler(filename="metrics"))
        saver.save(self.directory / str(step) / "metrics", metrics)
        saver.close()
        self._manager.reload()

    def wait(self) -> None:
        """Returns when all saves are on disk.

        Raises:
            UserError: one could not be written.
            JaxRuntimeError: another process that writes it too is lost.
        """
        try:
            self._manager.wait_until_finished()
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:
            raise self._failed(error) from error

    def check(self) -> None:
        """Raises what `wait` would if a save in the background has failed; does not wait for pending saves."""
        try:
            self._manager.check_for_errors()
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> UserError:
        kept = self.steps()
        return UserError(
            f"a checkpoint could not be written to {self.directory} ({_first_line(error)}). Is the disk full, the"
            f" folder moved or removed, or write permission missing? The steps {kept} are intact; the same command"
            " resumes from the last"
        )

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The evaluated step with the best metric, the latest of equal ones; None if none was evaluated."""
        scored = [(self._score(metrics), step) for step in self.steps() if (metrics := self._manager.metrics(step))]
        return max(scored)[1] if scored else None

    def restore(self, abstract: TrainState) -> Restored | None:
        """Restores the latest intact checkpoint; None if there is none.

        A damaged one is logged and moved into `damaged_checkpoints/`, next to `directory`.

        Args:
            abstract: shapes, dtypes and shardings of the state: where its arrays will be placed.

        Raises:
            UserError: it is of another model or optimizer, or read permission is missing.
        """
        while (step := self.latest()) is not None:
            try:
                return self._restore(step, abstract)
            except DamagedError as error:
                self._set_aside(step, error)
        return None

    def _restore(self, step: int, abstract: TrainState) -> Restored:
        trees = {"params": abstract.params, "optimizer": {"step": abstract.step, "opt_state": abstract.opt_state}}
        if abstract.ema is not None:
            trees["ema"] = abstract.ema
        found, record = self._read(step, trees)
        state = TrainState(params=found["params"], **found["optimizer"], ema=found.get("ema"))
        return Restored(state, record["counted"], self._manager.metrics(step) is not None)

    def _read(self, step: int, trees: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Items of a step, verified against the checksums of its record; and the record.

        Raises:
            DamagedError: they are not what was saved.
            UserError: the saved arrays are not the requested ones.
        """
        where = f"the checkpoint {self.directory / str(step)}"
        record = self._read_record(step, where)
        for name, tree in trees.items():
            _check_same(described(tree), record["arrays"].get(name), f"{name} of {where}")
        items = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
        try:
            found = dict(self._manager.restore(step, args=ocp.args.Composite(**items)))
        except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # a dozen kinds, down to Exception itself from TensorStore
            raise DamagedError(f"{where} cannot be read ({_first_line(error)})") from error
        for name in trees:
            sums = named(found[name])
            wrong = [leaf for leaf in sums if sums[leaf] != record["arrays"][name][leaf]]
            if wrong:
                listed = f"{', '.join(wrong[:3])}{' ...' if wrong[3:] else ''}"
                raise DamagedError(f"{where} holds other values than were saved: {name}{listed}")
        return found, record

    def _read_record(self, step: int, where: str) -> dict[str, Any]:
        try:
            sealed = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
        except PermissionError as error:
            raise UserError(f"{where} cannot be read, permission is missing: {error}") from error
        except Exception as error:
            raise DamagedError(f"the record of {where} cannot be read ({_first_line(error)})") from error
        record = opened(sealed)
        if record is None:
            raise DamagedError(f"the record of {where} is not what was saved")
        return record

    def _set_aside_unreadable_metrics(self, read_only: bool) -> None:
        """Sets checkpoints with unreadable metrics aside: Orbax reads all metrics when it starts, and would fail."""
        for path in sorted(self.directory.glob("*/metrics/metrics")):
            try:
                json.loads(path.read_text())
            except ValueError as error:
                step = path.parent.parent
                damage = DamagedError(f"the metrics of the checkpoint {step} cannot be read ({_first_line(error)})")
                if read_only:
                    raise damage from error
                self._move_aside(int(step.name), damage)

    def _set_aside(self, step: int, error: DamagedError) -> None:
        self._move_aside(step, error)
        self._manager.reload()

    def _move_aside(self, step: int, error: DamagedError) -> None:
        aside = self.directory.parent / "damaged_checkpoints" / f"{step}_{time.strftime('%Y%m%d_%H%M%S')}"
        # All processes must agree: if another one is gone, only the joint read has failed, and this raises.
        multihost_utils.sync_global_devices(f"checkpoint {step} is damaged")
        log.error("%s; it is moved to %s, and the checkpoint before it is used", error, aside)
        if jax.process_index() == 0:
            aside.parent.mkdir(parents=True, exist_ok=True)
            (self.directory / str(step)).rename(aside)
        multihost_utils.sync_global_devices(f"checkpoint {step} is set aside")

    def restore_params(self, abstract: Any, which: str | int = "best", *, kind: Kind = "raw") -> tuple[Any, int]:
        """Restores only the parameters; returns them and their step.

        Args:
            abstract: nested dict of `jax.ShapeDtypeStruct` with shardings.
            which: "best", "latest", or a step.
            kind: "raw", or "ema" for the moving average.

        Raises:
            UserError: there is no such checkpoint, it is damaged, or it has no moving average.
        """
        step = {"best": self.best, "latest": self.latest}[which]() if isinstance(which, str) else which
        if step is None or step not in self.steps():
            raise UserError(f"{self.directory} has no checkpoint {which!r}; it has the steps {self.steps()}")
        item = {"raw": "params", "ema": "ema"}[kind]
        if not (self.directory / str(step) / item).exists():
            raise UserError(
                f"the checkpoint of step {step} in {self.directory} has no moving average (ema.decay was None)"
            )
        return self._read(step, {item: abstract})[0][item], step


def _check_same(wanted: dict[str, list], saved: dict[str, list] | None, what: str) -> None:
    """Raises a UserError if the arrays of a record are not the requested ones."""
    have = {name: entry[:2] for name, entry in (saved or {}).items()}
    differing = [name for name in sorted(wanted.keys() | have.keys()) if wanted.get(name) != have.get(name)]
    if differing:
        listed = "; ".join(f"{name}: {have.get(name)} there, {wanted.get(name)} here" for name in differing[:3])
        raise UserError(
            f"{what}: not the arrays that this config and this version of the program have ({listed}"
            f"{'; ...' if differing[3:] else ''}): use the version that wrote it, or another work directory"
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def check_choice(workdir: epath.PathLike, which: str | None) -> None:
    """Raises a UserError if `workdir` has no checkpoints at all, or `which` is not valid."""
    if not (paths.given(workdir, "workdir") / "checkpoints").exists():
        raise UserError(
            f"{workdir} has no checkpoints: it is not the work directory of a training, or of one just begun"
        )
    if which is not None and which not in ("best", "latest") and not which.isdecimal():
        raise UserError(f"{which!r}: expected best, latest or a step", argument="checkpoint")


def read_params(
    workdir: epath.PathLike, abstract: Any, which: str | None, *, best_metric: str, kind: Kind = "raw"
) -> tuple[Any, int]:
    """Parameters of a checkpoint in a work directory, whose training may be running, and their step.

    Args:
        abstract: nested dict of `jax.ShapeDtypeStruct` with shardings.
        which: "best" (None is this), "latest", or a step in digits.
        best_metric: see `Checkpoints`.
        kind: "raw", or "ema" for the moving average.

    Raises:
        UserError: there is no such checkpoint.
    """
    check_choice(workdir, which)
    chosen = int(which) if which and which.isdecimal() else which or "best"
    directory = paths.given(workdir, "workdir") / "checkpoints"
    with Checkpoints(directory, keep_last=1, best_metric=best_metric, read_only=True) as checkpoints:
        return checkpoints.restore_params(abstract, chosen, kind=kind)
