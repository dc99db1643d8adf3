"""The layout of a prepared data set of the Long Range Arena on disk: `DATA_DIR/lra_NAME/VERSION/`.

    SPLIT.array_record   one record per example: its label (a byte), then its sequence as bytes. Where an example has
                         two texts, four bytes in between hold the length of the first (little-endian).
    SPLIT.lengths.npy    int32 (examples,), or (examples, 2): for the two texts, or for ListOps with and without its
                         closing brackets. Batches are planned by length without reading a record.
    index.json           what the data was made from, and the number of examples and the checksum of each split

A data set is written to a temporary folder (`incomplete.XXXXXX_VERSION`) and renamed when it is complete.
"""

import contextlib
import hashlib
import io
import json
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from etils import epath

from polaformer_jax.data.lra.facts import SPLITS
from polaformer_jax.errors import UserError
from polaformer_jax.files import atomic, paths

VERSION = "1.0.0"  # changes when a generator or the layout changes
_FIRST_LENGTH = struct.Struct("<I")


class Index(NamedTuple):
    """The content of `index.json`.

    Attributes:
        origin: human-readable description of where the data comes from.
        settings: what it was made with; other settings make another data set.
        splits: for each split `examples`, `bytes` (size of the record file) and `lengths_sha256`.
    """

    origin: str
    settings: dict
    splits: dict[str, dict]

    def counts(self) -> dict[str, int]:
        return {name: split["examples"] for name, split in self.splits.items()}


def directory_of(data_set: str, data_dir: epath.PathLike) -> epath.Path:
    return paths.given(data_dir, "data_dir") / data_set / VERSION


def find(data_set: str, data_dir: epath.PathLike) -> tuple[epath.Path, Index] | None:
    """The folder and the index of a prepared data set; None if there is no complete one.

    Raises:
        UserError: there is one, but its index is damaged.
    """
    directory = directory_of(data_set, data_dir)
    path = directory / "index.json"
    if not path.exists():
        return None
    try:
        index = Index(**json.loads(path.read_text()))
        if set(index.counts()) != set(SPLITS):
            raise ValueError(f"splits {', '.join(index.splits)}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(damaged_message(directory, f"index.json is damaged ({type(error).__name__})")) from error
    return directory, index


def damaged_message(directory: epath.Path, found: str) -> str:
    """The message about a prepared data set that cannot be read."""
    name = directory.parent.name
    return (
        f"{directory}: {found}. Remove this folder and prepare it again:\n"
        f"  polaformer prepare {name} --data-dir {directory.parent.parent}"
    )


def encode(label: int, texts: tuple[bytes, ...]) -> bytes:
    """The record of an example of one or two texts."""
    first = _FIRST_LENGTH.pack(len(texts[0])) if len(texts) == 2 else b""
    return bytes([label]) + first + b"".join(texts)


def decode(record: bytes, texts: int) -> tuple[int, tuple[np.ndarray, ...]]:
    """The label and the texts, uint8, of a record."""
    if texts == 1:
        return record[0], (np.frombuffer(record, np.uint8, offset=1),)
    body = np.frombuffer(record, np.uint8, offset=1 + _FIRST_LENGTH.size)
    (first,) = _FIRST_LENGTH.unpack_from(record, 1)
    return record[0], (body[:first], body[first:])


class Writer:
    """Writes the examples of a data set, the splits in any order."""

    def __init__(self, directory: epath.Path):
        from array_record.python import array_record_module

        self._directory = directory
        self._lengths = {split: [] for split in SPLITS}
        # One record per group: random access.
        self._records = {
            split: array_record_module.ArrayRecordWriter(str(directory / f"{split}.array_record"), "group_size:1")
            for split in SPLITS
        }

    def add(self, split: str, label: int, *texts: bytes, lengths: int | tuple[int, int]) -> None:
        self._records[split].write(encode(label, texts))
        self._lengths[split].append(lengths)

    def close(self) -> dict[str, dict]:
        """Closes the files and returns the index entry of each split."""
        splits = {}
        for split, writer in self._records.items():
            writer.close()
            content = io.BytesIO()
            np.save(content, np.array(self._lengths[split], np.int32))
            (self._directory / f"{split}.lengths.npy").write_bytes(content.getvalue())
            splits[split] = {
                "examples": len(self._lengths[split]),
                "bytes": (self._directory / f"{split}.array_record").stat().length,
                "lengths_sha256": hashlib.sha256(content.getvalue()).hexdigest(),
            }
        return splits

    def abandon(self) -> None:
        for writer in self._records.values():
            with contextlib.suppress(Exception):  # the original error is already being raised
                writer.close()


@contextlib.contextmanager
def writing(data_set: str, data_dir: epath.PathLike, *, origin: str, settings: dict) -> Iterator[Writer]:
    """Context to fill a data set with examples; it is moved to its place at the end, or leaves no trace after an error.

    Raises:
        UserError: a split got no example, or the files cannot be written.
    """
    target = directory_of(data_set, data_dir)
    try:
        with atomic.making(target) as aside:
            writer = Writer(aside)
            try:
                yield writer
            except BaseException:
                writer.abandon()
                raise
            splits = writer.close()
            empty = [split for split, found in splits.items() if not found["examples"]]
            if empty:
                raise UserError(f"{data_set} would have no examples in {', '.join(empty)}: more data is needed")
            index = {"origin": origin, "settings": settings, "splits": splits}
            (aside / "index.json").write_text(json.dumps(index, indent=2))  # last: without it there is no data set
    except OSError as error:
        raise UserError(f"writing {data_set} to {target} failed: {error}") from error


def leftovers(data_set: str, data_dir: epath.PathLike) -> list[epath.Path]:
    """Folders of preparations that were killed."""
    return sorted(directory_of(data_set, data_dir).parent.glob("incomplete.*"))
