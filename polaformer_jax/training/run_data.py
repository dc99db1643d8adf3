"""What data a run was begun with: `data.json` in its work directory. The data is part of a run, as its config is.

It holds the names of the classes, and for each split the number of examples and the digest of the source (see
`records.Source`). Other names would give the labels another meaning; they are always refused. Other examples would give
the run another end than it began; they are refused too, unless `data.on_change` says to go on, which is recorded.
"""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from polaformer_jax.errors import UserError
from polaformer_jax.files import atomic, paths
from polaformer_jax.training.inputs import Inputs
from polaformer_jax.training.progress import log

FILE = "data.json"
_LISTED = 40  # names of a list that are shown


@dataclasses.dataclass(frozen=True)
class RunData:
    """The content of `data.json`.

    Attributes:
        class_names: in label order; None if the data has none.
        splits: for each split that the run reads, `examples` (their number), `digest` and `origin`.
        epoch_examples: the number of training examples when the run began, by which epochs are counted to its end.
        changes: what changed while the run went on all the same: `split`, `before` and `now`, which are as in `splits`.
    """

    class_names: tuple[str, ...] | None
    splits: dict[str, dict[str, Any]]
    epoch_examples: int
    changes: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(cls, inputs: Inputs, config: ml_collections.ConfigDict) -> "RunData":
        """The data as it is now."""
        names = dict.fromkeys((config.data.train_split, config.data.eval_split, inputs.report_split))
        sources = {name: inputs.source(name) for name in names}
        splits = {
            name: {"examples": len(source), "digest": source.digest, "origin": source.origin}
            for name, source in sources.items()
        }
        return cls(inputs.eval_source.class_names, splits, len(inputs.train_source))

    def resumed(self, now: "RunData", *, on_change: str, where: str) -> "RunData":
        """The data of this run after it goes on with the data `now`.

        Args:
            on_change: "stop", or "accept".
            where: the run, for messages.

        Raises:
            UserError: the classes have other names, or there are other examples, and `on_change` is "stop".
        """
        check_names(self.class_names, now.class_names, f"the run in {where}", "the data now")
        changed = [
            name for name in now.splits if name in self.splits and not _same(self.splits[name], now.splits[name])
        ]
        if not changed:
            return dataclasses.replace(now, epoch_examples=self.epoch_examples, changes=self.changes)
        told = "; ".join(f"{name}: {_told(self.splits[name])} then, {_told(now.splits[name])} now" for name in changed)
        if on_change == "stop":
            raise UserError(
                f"the run in {where} was begun with other data ({told}), and would not end as it began. Restore the"
                " data, or take another work directory; data.on_change=accept goes on with the data as it is now, in"
                " as many steps as before"
            )
        log.warning("the data changed, and the run goes on with it in as many steps as before: %s", told)
        changes = ({"split": name, "before": self.splits[name], "now": now.splits[name]} for name in changed)
        return dataclasses.replace(now, epoch_examples=self.epoch_examples, changes=(*self.changes, *changes))


def _same(before: dict[str, Any], now: dict[str, Any]) -> bool:
    return before["digest"] == now["digest"] and before["examples"] == now["examples"]


def _told(split: dict[str, Any]) -> str:
    return f"{split['examples']:,} examples, digest {split['digest'][:8]}"


def check_names(there: tuple[str, ...] | None, here: tuple[str, ...] | None, trained: str, data: str) -> None:
    """Checks that labels mean the same in two lists of class names. Where there is no list, nothing is known.

    Raises:
        UserError: they differ; it shows both.
    """
    if there is None or here is None or tuple(there) == tuple(here):
        return
    raise UserError(
        f"the classes of {trained} have other names than those of {data}, so that the same labels would mean other"
        f" classes:\n  {trained}: {_list(there, here)}\n  {data}: {_list(here, there)}\nUse the data with the names of"
        " the training: a folder of images takes its labels from the sorted names of its class folders"
    )


def _list(names: tuple[str, ...], others: tuple[str, ...]) -> str:
    if len(names) <= _LISTED:
        return f"{len(names)} classes: {', '.join(names)}"
    labels = [label for label, name in enumerate(names) if label >= len(others) or others[label] != name]
    shown = ", ".join(f"{label}: {names[label]}" for label in labels[:_LISTED])
    more = f", and {len(labels) - _LISTED} more" if len(labels) > _LISTED else ""
    return f"{len(names)} classes, of which differ: {shown}{more}"


def read(workdir: epath.PathLike) -> RunData | None:
    """The data of the run in a work directory; None where an earlier version of this package began it.

    Raises:
        UserError: the file is damaged.
    """
    path = paths.given(workdir, "workdir") / FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        names = content["class_names"]
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise TypeError(f"class_names {names!r}")
        for name, split in content["splits"].items():
            if not isinstance(split["examples"], int) or not isinstance(split["digest"], str):
                raise TypeError(f"split {name}")
        epoch_examples, changes = int(content["epoch_examples"]), tuple(content["changes"])
        return RunData(None if names is None else tuple(names), content["splits"], epoch_examples, changes)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({error}): remove it, and the run goes on without knowing what data it began with"
        ) from error


def check_agreement(data: RunData) -> None:
    """Checks, where there are several processes, that all of them read the same data.

    Raises:
        UserError: this process reads other data than process 0.
    """
    if jax.process_count() == 1:
        return
    known = [data.class_names, {name: (split["examples"], split["digest"]) for name, split in data.splits.items()}]
    digest = np.frombuffer(hashlib.sha256(json.dumps(known, sort_keys=True).encode()).digest(), np.uint8)
    if (multihost_utils.broadcast_one_to_all(digest) != digest).any():
        told = "; ".join(f"{name}: {_told(split)}" for name, split in data.splits.items())
        raise UserError(
            f"process {jax.process_index()} reads other data than process 0 ({told} here): all hosts need the same"
            " files in data.data_dir, and the same index of a folder of images"
        )


def has_begun(workdir: epath.Path) -> bool:
    """Whether there is a checkpoint. A run without one has nothing to lose: config and data may still change."""
    checkpoints = workdir / "checkpoints"
    return checkpoints.exists() and any(path.name.isdecimal() for path in checkpoints.iterdir())


def epoch_examples(workdir: epath.Path) -> int | None:
    """The number of training examples by which the run in `workdir` counts epochs; None if it has not begun.

    With several processes, all get what process 0 finds.
    """
    stored = read(workdir) if jax.process_index() == 0 and has_begun(workdir) else None
    found = 0 if stored is None else stored.epoch_examples
    if jax.process_count() > 1:
        found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
    return found or None


def write(workdir: epath.Path, data: RunData) -> None:
    atomic.write(workdir / FILE, json.dumps(dataclasses.asdict(data), indent=2) + "\n")
