"""A work directory belongs to one run: it remembers the run's config and is used by one training at a time.

It holds `config.json`, `checkpoints/`, TensorBoard events, `pictures/` and `eval.json`.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import ml_collections
from etils import epath

from polaformer_jax.errors import UserError

# Fields that say where, on what and how visibly a run runs. All others make its identity: they change its result.
NOT_IDENTITY = ("mesh", "log", "checkpoint", "data.workers", "data.prefetch", "data.data_dir", "eval.batch_size")


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, its keys joined by dots."""
    items: dict[str, Any] = {}
    for name, value in config.items():
        items.update(flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return items


def as_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as JSON would give it back: nested dicts, tuples turned into lists."""
    return json.loads(json.dumps(config.to_dict()))


def write_atomically(path: epath.Path, text: str) -> None:
    """Writes aside, then renames: a reader sees the old file or the new one, never a part."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text)
    aside.replace(path)


def read_config(workdir: epath.PathLike) -> ml_collections.ConfigDict:
    """The config of the run in a work directory.

    Raises:
      UserError: there is none.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"{path} does not exist: {workdir} is not the work directory of a training")
    return ml_collections.ConfigDict(json.loads(path.read_text()))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each field of the identity whose value differs."""
    old, new = flat(old), flat(new)
    missing = "(absent)"
    return [
        f"{field}: {old.get(field, missing)!r} there, {new.get(field, missing)!r} now"
        for field in sorted(old.keys() | new.keys())
        if old.get(field, missing) != new.get(field, missing)
        and not any(field == name or field.startswith(f"{name}.") for name in NOT_IDENTITY)
    ]


@contextlib.contextmanager
def claim(workdir: epath.PathLike, config: ml_collections.ConfigDict) -> Iterator[epath.Path]:
    """Makes the work directory this run's for as long as the context lasts.

    Raises:
      UserError: it belongs to a run of another identity (the differences are listed), or another process trains in it.
    """
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with _locked(workdir):
        path = workdir / "config.json"
        if path.exists():
            changed = differences(json.loads(path.read_text()), as_json(config))
            if changed:
                raise UserError(
                    f"{workdir} belongs to a run with another config:\n"
                    + "\n".join(f"  {line}" for line in changed)
                    + "\ntake another --workdir, or undo these changes to go on with that run"
                )
        elif (workdir / "checkpoints").exists():
            raise UserError(f"{workdir} holds checkpoints but no config.json: take another --workdir")
        write_atomically(path, json.dumps(as_json(config), indent=2) + "\n")
        yield workdir


@contextlib.contextmanager
def _locked(workdir: epath.Path) -> Iterator[None]:
    """Holds the directory's lock file. The system drops the lock with the process, however that ends."""
    if "://" in os.fspath(workdir):  # object stores have no locks
        yield
        return
    import fcntl  # not on Windows, where jax has no accelerators either

    with open(workdir / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"another process ({file.read().strip() or 'unknown'}) is training in {workdir}:"
                " wait for it or stop it, or take another --workdir"
            ) from None
        file.truncate(0)
        file.write(f"pid {os.getpid()}")
        file.flush()
        yield
