"""Folders of image files, `ROOT/{train,val}/CLASS/*.jpeg`, as a random-access source: the layout of the official code.

ImageNet has 1.28 million files, which take minutes to list on a network drive. They are listed once: an index on disk
holds the names and each class folder's modification time, so that opening costs one `stat` per folder. A folder's
modification time changes whenever a file in it is added, removed or renamed; the index is then rebuilt.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging
from tqdm import tqdm

from polaformer_jax.data.records import Record
from polaformer_jax.errors import UserError
from polaformer_jax.files import atomic

EXTENSIONS = (".jpeg", ".jpg", ".png")  # in any case
_LAYOUT = "ROOT/train/CLASS/*.jpeg and ROOT/val/CLASS/*.jpeg (also jpg and png)"
_ALIASES = {"val": "validation", "validation": "val"}
_FORMAT = 1  # of the index; an index with another number is rebuilt
_SETTLED_NS = 2_000_000_000  # the coarsest file-system timestamps in use have a resolution of two seconds


class FolderSource:
    """One split of a folder of images (see `records.Source`). Records hold the files' bytes.

    A label is the position of its class folder in the sorted list of the *training* split's class folders, so that a
    class missing from another split shifts no label. Without a training split (evaluation only) the split's own folders
    are used. Files whose names begin with a dot and folders inside class folders are ignored.

    Args:
        root: the local folder that holds the splits' folders.
        split: name of the split's folder. `val` and `validation` are interchangeable where only one exists.
        class_split: the split that determines the classes.
        name: the data set's name in messages; by default the folder's name.

    Raises:
        UserError: no such folder or split; no class folders or no images; a class that is missing from `class_split`;
            in `class_split` itself, a class folder without images; a folder that cannot be read.
    """

    def __init__(self, root: str | os.PathLike, split: str, *, class_split: str = "train", name: str | None = None):
        if "://" in str(root):
            raise UserError(
                f"data folder {root}: a folder of images must be local (mount it, or copy it). From a bucket, read a "
                "data set prepared with tfds: data.source=tfds"
            )
        folder = Path(os.path.abspath(os.path.expanduser(root)))
        self.name, self.origin = f"{name or folder.name}/{split}", str(folder)
        if not folder.is_dir():
            raise UserError(f"data folder {folder} does not exist; expected {_LAYOUT}, ROOT given by data.data_dir")
        directory = _split_directory(folder, split)
        if directory is None:
            found = ", ".join(entry.name for entry in _class_folders(folder)) or "no folders"
            raise UserError(f"data folder {folder} has no split {split!r}: found {found}; expected {_LAYOUT}")
        self._directory = os.fsencode(directory)
        folders = _class_folders(directory)
        if not folders:
            loose = sum(1 for name in os.listdir(self._directory) if _is_image(name))
            raise UserError(
                f"{directory} has no class folders, but {loose} images directly in it; expected {_LAYOUT}: one folder "
                "for each class"
            )
        reference = _split_directory(folder, class_split)
        if reference is None or reference == directory:
            reference, self.class_names = directory, tuple(entry.name for entry in folders)
        else:
            self.class_names = tuple(entry.name for entry in _class_folders(reference))
        unknown = sorted({entry.name for entry in folders} - set(self.class_names))
        if unknown:
            raise UserError(
                f"{directory} has {len(unknown)} class folders that are missing from {reference}: {_some(unknown)}. "
                "Every class needs a folder with training images; remove the others"
            )
        self._index_path, index = _open_index(directory, folders)
        self._use(index)
        empty = [name for name, count in zip(index.classes, index.counts, strict=True) if not count]
        if len(empty) == len(index.classes):
            raise UserError(f"{directory} has class folders, but no images in them; expected {_LAYOUT}")
        if empty and reference == directory:
            raise UserError(
                f"{directory} has {len(empty)} class folders without images ({', '.join(EXTENSIONS)}): {_some(empty)}. "
                "Remove them, or put images there"
            )

    def _use(self, index: "_Index"):
        self._index = index
        lengths = np.frombuffer(index.lengths, "<u2")
        self._ends = np.cumsum(lengths, dtype=np.int64)  # (files,) where each name ends within `index.names`
        self._class_ends = np.cumsum(index.counts)  # (folders,) the number of files in all folders so far
        numbers = {name: label for label, name in enumerate(self.class_names)}
        self._labels = [numbers[name] for name in index.classes]

    def __getstate__(self):
        state = {key: self.__dict__[key] for key in ("name", "origin", "class_names", "_directory", "_index_path")}
        # A worker process reads the index from disk, so that starting it does not move millions of names through a
        # pipe.
        return state | {"_index": self._index.digest if self._index_path else self._index}

    def __setstate__(self, state):
        self.__dict__.update(state)
        index = self._index
        if not isinstance(index, _Index):
            index = _read_index(self._index_path)
            if index is None or index.digest != self._index:
                raise UserError(f"the index {self._index_path} changed since {self.name} was opened: start again")
        self._use(index)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Record:
        folder, path = self._locate(index)
        # Opening a named pipe would block until it has a writer; for a regular file O_NONBLOCK makes no difference.
        with open(path, "rb", buffering=0, opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
            return {"image": file.read(), "label": self._labels[folder]}

    def describe(self, index: int) -> str:
        path = self._locate(index)[1]
        return path.decode("utf-8", "backslashreplace")  # a file name may be any bytes

    def _locate(self, index: int) -> tuple[int, bytes]:
        """The position of a file's class folder, and the file's path."""
        if not 0 <= index < len(self._ends):
            raise IndexError(f"{self.name} has no record {index}, expected 0 to {len(self._ends) - 1}")
        folder = int(np.searchsorted(self._class_ends, index, side="right"))
        begin = self._ends[index - 1] if index else 0
        name = bytes(self._index.names[begin : self._ends[index]])
        return folder, b"/".join((self._directory, os.fsencode(self._index.classes[folder]), name))


class _Index(NamedTuple):
    """The files of a split, class by class in sorted order.

    Attributes:
        classes: names of the class folders.
        counts: the number of images in each.
        lengths: the length of each file's name, `<u2`.
        names: all file names, one after the other.
        digest: SHA-256 of all of the above.
        mtimes: each folder's modification time in ns; -1 where it was too recent to be distinguished from a later one.
    """

    classes: list[str]
    counts: list[int]
    lengths: bytes | memoryview
    names: bytes | memoryview
    digest: str
    mtimes: list[int]


def _split_directory(root: Path, split: str) -> Path | None:
    for name in (split, _ALIASES.get(split)):
        # A split is one name: neither "" nor "../other" nor a slice such as train[:90%].
        if name and name == os.path.basename(name) and name not in (".", "..") and (root / name).is_dir():
            return root / name
    return None


def _class_folders(directory: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(directory) as entries:
            folders = [entry for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    except OSError as error:
        raise UserError(f"folder {directory} cannot be read: {error}") from error
    return sorted(folders, key=lambda entry: entry.name)


def _is_image(name: bytes) -> bool:
    # "._name.jpeg" is what macOS leaves next to a file on a foreign drive: not an image.
    return not name.startswith(b".") and name.lower().endswith(tuple(e.encode() for e in EXTENSIONS))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", and {len(names) - 5} more" if len(names) > 5 else "")


def _open_index(directory: Path, folders: list[os.DirEntry]) -> tuple[str | None, _Index]:
    """Reads the index, or lists the files and writes it; returns its path (None if not written) and its content."""
    try:
        mtimes = [os.stat(entry.path).st_mtime_ns for entry in folders]
    except OSError as error:
        raise UserError(f"class folder cannot be read: {error}") from error
    classes = [entry.name for entry in folders]
    places = _index_paths(directory)
    for path in places:
        index = _read_index(path)
        if index is not None and index.classes == classes and index.mtimes == mtimes:
            return path, index
    index = _list_files(directory, classes, mtimes)
    for path in places:
        try:
            atomic.write(path, _to_bytes(index))
            return path, index
        except OSError as error:
            logging.warning("the index of %s cannot be kept in %s: %s", directory, os.path.dirname(path), error)
    return None, index


def _index_paths(directory: Path) -> list[str]:
    """Next to the split's folder, where all hosts see it; otherwise in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    key = hashlib.sha256(os.fsencode(os.path.realpath(directory))).hexdigest()[:16]
    return [
        str(directory.parent / f".polaformer_index_{directory.name}"),
        os.path.join(cache, "polaformer_jax", f"folder_index_{key}"),
    ]


def _list_files(directory: Path, classes: list[str], mtimes: list[int]) -> _Index:
    settled = time.time_ns() - _SETTLED_NS
    counts, names, lengths = [], bytearray(), []
    for name in tqdm(classes, desc=f"listing {directory}", unit=" classes", disable=None):
        try:
            with os.scandir(os.fsencode(directory / name)) as entries:
                # Links are not followed: a dangling one is a record that cannot be read, and is reported by name.
                found = sorted(e.name for e in entries if _is_image(e.name) and not e.is_dir(follow_symlinks=False))
        except OSError as error:
            raise UserError(f"class folder {directory / name} cannot be read: {error}") from error
        counts.append(len(found))
        names += b"".join(found)
        lengths.append(np.array([len(file) for file in found], "<u2").tobytes())
    # A folder modified within the last clock tick may change again without a new modification time: not reliable.
    mtimes = [mtime if mtime < settled else -1 for mtime in mtimes]
    index = _Index(classes, counts, b"".join(lengths), bytes(names), "", mtimes)
    return index._replace(digest=_digest(index))


def _digest(index: _Index) -> str:
    digest = hashlib.sha256(json.dumps([index.classes, index.counts]).encode())
    digest.update(index.lengths)
    digest.update(index.names)
    return digest.hexdigest()


def _to_bytes(index: _Index) -> bytes:
    header = {"format": _FORMAT, **{key: getattr(index, key) for key in ("classes", "counts", "mtimes", "digest")}}
    return b"\n".join((json.dumps(header).encode(), index.lengths + index.names))


def _read_index(path: str) -> _Index | None:
    """The index; None if it is missing, damaged or of another format."""
    try:
        content = Path(path).read_bytes()
        end = content.index(b"\n")
        header = json.loads(content[:end])
        if header["format"] != _FORMAT:
            return None
        body = memoryview(content)[end + 1 :]
        split = 2 * sum(header["counts"])
        index = _Index(
            header["classes"], header["counts"], body[:split], body[split:], header["digest"], header["mtimes"]
        )
        return index if _digest(index) == index.digest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
