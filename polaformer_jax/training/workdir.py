"""A work directory belongs to one run: it stores the run's config and is used by one training at a time.

It holds `config.json`, `data.json`, `checkpoints/`, TensorBoard events, `pictures/` and `eval.json`.
"""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

import polaformer_jax
from polaformer_jax.config import HOW_COMPUTED, NOT_IDENTITY, ON_FAULTS, SEQUENCE_TASKS, defaults, is_within
from polaformer_jax.errors import UserError
from polaformer_jax.files import atomic, paths
from polaformer_jax.training import run_data
from polaformer_jax.training.metrics import read_scalars
from polaformer_jax.training.progress import log
from polaformer_jax.training.run_data import RunData
from polaformer_jax.weights import flatten

TRAINING_FILE = "training.json"


def as_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as JSON returns it: nested dicts, with lists instead of tuples."""
    return json.loads(json.dumps(config.to_dict()))


def read_config(workdir: epath.PathLike) -> ml_collections.ConfigDict:
    """The config of the run in a work directory. Fields that are newer than the run have their defaults.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = paths.given(workdir, "workdir") / "config.json"
    if not path.exists():
        raise UserError(f"{path} does not exist: {workdir} is not the work directory of a training")
    try:
        return ml_collections.ConfigDict(_completed(_renamed(json.loads(path.read_text()))))
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # no UTF-8, no JSON, no config
        raise UserError(f"{path} is damaged ({error}): take another work directory") from error


def _renamed(stored: dict[str, Any]) -> dict[str, Any]:
    """The stored values under today's names: up to version 0.2 `task.attention` was that of sequence models.

    All configs had it, and baselines could have an alpha, which had no effect and is refused today.
    """
    if "attention" in stored.get("task", {}):
        attention = stored["task"].pop("attention")
        if stored["task"]["name"] in SEQUENCE_TASKS:
            stored["model"]["attention"] = attention
            if attention != "polarity":
                stored["model"]["alpha"] = None
    return stored


def _completed(stored: dict[str, Any]) -> dict[str, Any]:
    """The stored values, completed with the defaults of the current schema."""

    def over(default: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        nested = {
            name: over(default[name], values[name])
            for name in default.keys() & values.keys()
            if isinstance(default[name], dict)
        }
        return {**default, **values, **nested}

    return over(as_json(defaults()), stored)


def differences(old: ml_collections.ConfigDict, new: ml_collections.ConfigDict, **which: Any) -> list[str]:
    """One line for each of the `changed_fields`, whose arguments these are."""
    changed = changed_fields(old, new, **which)
    return [f"{field}: {there!r} there, {now!r} now" for field, (there, now) in changed.items()]


def changed_fields(
    old: ml_collections.ConfigDict,
    new: ml_collections.ConfigDict,
    *,
    within: tuple[str, ...] | None = None,
    but: tuple[str, ...] = NOT_IDENTITY,
) -> dict[str, tuple[Any, Any]]:
    """The two values of each field that differs, sorted by field.

    Args:
        within: fields, and parts of the config, that are compared; None: all.
        but: those that are not; by default what remains is the identity of a run.
    """
    before, now = flatten(as_json(old)), flatten(as_json(new))
    missing = "(absent)"
    values = {field: (before.get(field, missing), now.get(field, missing)) for field in before.keys() | now.keys()}
    return {
        field: (there, here)
        for field, (there, here) in sorted(values.items())
        if there != here and (within is None or is_within(field, within)) and not is_within(field, but)
    }


@contextlib.contextmanager
def claim(
    workdir: epath.PathLike, config: ml_collections.ConfigDict, data: RunData | None = None
) -> Iterator[epath.Path]:
    """Reserves the work directory for this run within the context. With several processes, process 0 does it.

    Args:
        data: what the run reads; None: not known, and not compared.

    Raises:
        UserError: it belongs to a run with another config (differences are listed) or with other data, another process
            trains in it, or the processes read different data.
    """
    workdir = paths.given(workdir, "workdir")
    if data is not None:
        run_data.check_agreement(data)
    if jax.process_count() == 1:
        with _claimed(workdir, config, data):
            yield workdir
        return
    with contextlib.ExitStack() as stack:
        problem = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(_claimed(workdir, config, data))
            except UserError as error:
                problem = error
        if multihost_utils.broadcast_one_to_all(np.int32(problem is not None)):
            raise problem or UserError(f"process 0 could not take the work directory {workdir}: see its message")
        yield workdir


@contextlib.contextmanager
def _claimed(workdir: epath.Path, config: ml_collections.ConfigDict, data: RunData | None) -> Iterator[None]:
    with writable(workdir):
        atomic.make_folder(workdir)
    with _locked(workdir):
        if run_data.has_begun(workdir):
            stored = read_config(workdir)
            changed = differences(stored, config)
            if changed:
                raise UserError(
                    f"{workdir} belongs to a run with another config:\n"
                    + "\n".join(f"  {line}" for line in changed)
                    + "\ntake another work directory, or undo these changes to resume that run"
                )
            if data is not None and (before := run_data.read(workdir)) is not None:
                data = before.resumed(data, on_change=config.data.on_change, where=os.fspath(workdir))
            for line in differences(stored, config, within=HOW_COMPUTED, but=()):
                log.info("the run is computed in another way from here on: %s", line)
            for line in differences(stored, config, within=ON_FAULTS, but=()):
                log.info("the run goes on with another answer to faults: %s", line)
        with writable(workdir):
            atomic.write(workdir / "config.json", json.dumps(as_json(config), indent=2) + "\n")
            if data is not None:
                run_data.write(workdir, data)
        yield


@contextlib.contextmanager
def writable(workdir: epath.Path) -> Iterator[None]:
    """Converts errors within the context to a UserError."""
    try:
        yield
    except Exception as error:  # buckets have exceptions of their own
        raise UserError(
            f"the work directory {workdir} cannot be written ({error}): is the disk full, or write permission missing?"
        ) from error


@contextlib.contextmanager
def _locked(workdir: epath.Path) -> Iterator[None]:
    """Holds the directory's lock file. The system releases it when the process ends, however it ends."""
    if paths.in_bucket(workdir):  # object stores have no locks
        yield
        return
    import fcntl  # not on Windows, where jax has no accelerators either

    with writable(workdir):
        lock = open(workdir / ".lock", "ab+", buffering=0)  # unbuffered: closing it writes nothing
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"another process ({file.read().decode().strip() or 'unknown'}) is training in {workdir}:"
                " wait for it or stop it, or take another work directory"
            ) from None
        except OSError as error:  # Lustre without -o flock, some network drives
            log.warning(
                "%s cannot be locked (%s): do not start a second training in it, for it would not be noticed",
                *(workdir, error.strerror),
            )
        with writable(workdir):
            file.truncate(0)
            file.write(b"pid %d" % os.getpid())
        yield


def write_training(workdir: epath.Path, *, steps: int, devices: int) -> None:
    """Writes `training.json` on process 0: steps, seconds, hardware and commit.

    `seconds` are those of the training steps: without evaluations, checkpoints and compilation, and counted once where
    a run was interrupted and repeated some steps. They are read from the event files, and None without these.
    """
    if jax.process_index() == 0:
        scalars = read_scalars(workdir)
        if "seconds" not in scalars:
            log.warning("%s has no event files any more: how long the training took is not known", workdir)
        content = {
            "steps": steps,
            "seconds": round(float(scalars["seconds"][1].sum()), 1) if "seconds" in scalars else None,
            "hardware": hardware(devices),
            "commit": commit(),
        }
        atomic.write(workdir / TRAINING_FILE, json.dumps(content, indent=2) + "\n")


def hardware(devices: int) -> str:
    """Number and kind of the devices, as JAX names them; for a CPU the number of cores that the process may use."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return f"CPU, {cores} core{'' if cores == 1 else 's'}"
    return f"{devices} x {device.device_kind}"


def commit(package: Path = Path(polaformer_jax.__file__).parent) -> str:
    """The commit of this code, with a plus if files of the package or the recipes were changed since.

    Empty if git does not track the code, as in an environment inside the checkout of another project.
    """
    try:
        _, found, changed = (
            subprocess.run(["git", *words], cwd=package, capture_output=True, text=True, check=True).stdout.strip()
            for words in (
                ("ls-files", "--error-unmatch", "__init__.py"),
                ("rev-parse", "--short=7", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no", "--", ".", "../configs"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{found}+" if changed else found
