"""Folders of image files, `ROOT/{train,val}/CLASS/*.jpeg`, as a random-access source: the layout of the official code.

ImageNet has 1.28 million files, which take minutes to list on a network drive. They are listed once: an index on disk
holds the names and each class folder's modification time, so that opening costs one `stat` per folder. A folder's
modification time changes whenever a file in it is added, removed or renamed; the index is then rebuilt.

Some mounts report one time for all folders, whatever happens in them. So times count only where they tell folders
apart, and a few folders are listed at each opening all the same.
"""

import collections
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
from polaformer_jax.files import atomic, paths
from polaformer_jax.files.names import shown

EXTENSIONS = (".jpeg", ".jpg", ".png")  # in any case
_LAYOUT = "ROOT/train/CLASS/*.jpeg and ROOT/val/CLASS/*.jpeg (also jpg and png)"
_ALIASES = {"val": "validation", "validation": "val"}
_FORMAT = 2  # of the index; an index with another number is rebuilt
_KINDS = 5  # of what is left out, that are named
_LISTED = 8  # folders that are listed at each opening
_SETTLED_NS = 2_000_000_000  # the coarsest file-system timestamps in use have a resolution of two seconds


class FolderSource:
    """One split of a folder of images (see `records.Source`). Records hold the files' bytes.

    A label is the position of its class folder in the sorted list of the *training* split's class folders, so that a
    class missing from another split shifts no label. Without a training split (evaluation only) the split's own folders
    are used. In class folders, other files than images and further folders are left out, which is logged; those whose
    names begin with a dot silently.

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
        folder = paths.data_folder(root, expected=f"{_LAYOUT}, ROOT given by data.data_dir")
        self.name, self.origin = shown(f"{name or folder.name}/{split}"), shown(str(folder))
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
            reference, self._classes = directory, tuple(entry.name for entry in folders)
        else:
            self._classes = tuple(entry.name for entry in _class_folders(reference))
        self.class_names = tuple(map(shown, self._classes))
        unknown = sorted({entry.name for entry in folders} - set(self._classes))
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
        if index.left_out:
            listed = ", ".join(f"{count} {what}" for what, count in index.left_out.items())
            logging.warning("%s: left out, for they are no %s: %s", self.name, ", ".join(EXTENSIONS), listed)

    def _use(self, index: "_Index"):
        self._index = index
        lengths = np.frombuffer(index.lengths, "<u2")
        self._ends = np.cumsum(lengths, dtype=np.int64)  # (files,) where each name ends within `index.names`
        self._class_ends = np.cumsum(index.counts)  # (folders,) the number of files in all folders so far
        numbers = {name: label for label, name in enumerate(self._classes)}
        self._labels = [numbers[name] for name in index.classes]

    def __getstate__(self):
        names = ("name", "origin", "class_names", "_classes", "_directory", "_index_path")
        state = {key: self.__dict__[key] for key in names}
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

    @property
    def digest(self) -> str:
        """Of the names of classes and files, and so of labels and the order of the records; not of their content."""
        return hashlib.sha256(json.dumps([self._index.digest, self._labels]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Record:
        folder, path = self._locate(index)
        # Opening a named pipe would block until it has a writer; for a regular file O_NONBLOCK makes no difference.
        with open(path, "rb", buffering=0, opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
            return {"image": file.read(), "label": self._labels[folder]}

    def describe(self, index: int) -> str:
        return shown(os.fsdecode(self._locate(index)[1]))  # a file name may be any bytes

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
        left_out: how many entries of the folders are no images, by what they are (`.webp files`, `folders`), the most
            common first; of many kinds, the rare ones together.
    """

    classes: list[str]
    counts: list[int]
    lengths: bytes | memoryview
    names: bytes | memoryview
    digest: str
    mtimes: list[int]
    left_out: dict[str, int]


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
    return ", ".join(map(shown, names[:5])) + (f", and {len(names) - 5} more" if len(names) > 5 else "")


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
        if index is not None and index.classes == classes and _is_current(index, directory, mtimes):
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
    key = hashlib.sha256(os.fsencode(os.path.realpath(directory))).hexdigest()[:16]
    return [
        str(directory.parent / f".polaformer_index_{directory.name}"),
        os.path.join(paths.user_cache(), f"folder_index_{key}"),
    ]


def _is_current(index: _Index, directory: Path, mtimes: list[int]) -> bool:
    """Whether the class folders still hold what the index says, as far as their times and the listed ones tell."""
    if index.mtimes != mtimes or len(set(mtimes)) < len(mtimes) / 2:
        return False
    ends, splits = np.cumsum(index.counts), np.cumsum(np.frombuffer(index.lengths, "<u2"), dtype=np.int64)
    for folder in sorted({round(place) for place in np.linspace(0, len(mtimes) - 1, _LISTED)}):
        first = ends[folder] - index.counts[folder]
        begin = splits[first - 1] if first else 0
        end = splits[ends[folder] - 1] if ends[folder] else 0
        if b"".join(_images(directory / index.classes[folder])[0]) != bytes(index.names[begin:end]):
            return False
    return True


def _images(folder: Path) -> tuple[list[bytes], collections.Counter[str]]:
    """The sorted names of the images in a class folder; and what else is there, see `_Index.left_out`."""
    found, others = [], collections.Counter()
    try:
        with os.scandir(os.fsencode(folder)) as entries:
            for entry in entries:
                # Links are not followed: a dangling one is a record that cannot be read, and is reported by name.
                is_folder = entry.is_dir(follow_symlinks=False)
                if _is_image(entry.name) and not is_folder:
                    found.append(entry.name)
                elif not entry.name.startswith(b"."):
                    suffix = shown(os.fsdecode(os.path.splitext(entry.name)[1].lower()))
                    files = f"{suffix} files" if suffix else "files without a suffix"
                    others["folders" if is_folder else files] += 1
    except OSError as error:
        raise UserError(f"class folder {folder} cannot be read: {error}") from error
    return sorted(found), others


def _list_files(directory: Path, classes: list[str], mtimes: list[int]) -> _Index:
    settled = time.time_ns() - _SETTLED_NS
    counts, names, lengths, left_out = [], bytearray(), [], collections.Counter()
    for name in tqdm(classes, desc=f"listing {directory}", unit=" classes", disable=None):
        found, others = _images(directory / name)
        left_out += others
        counts.append(len(found))
        names += b"".join(found)
        lengths.append(np.array([len(file) for file in found], "<u2").tobytes())
    # A folder modified within the last clock tick may change again without a new modification time: not reliable.
    mtimes = [mtime if mtime < settled else -1 for mtime in mtimes]
    index = _Index(classes, counts, b"".join(lengths), bytes(names), "", mtimes, _summed(left_out))
    return index._replace(digest=_digest(index))


def _digest(index: _Index) -> str:
    digest = hashlib.sha256(json.dumps([index.classes, index.counts]).encode())
    digest.update(index.lengths)
    digest.update(index.names)
    return digest.hexdigest()


def _summed(left_out: collections.Counter[str]) -> dict[str, int]:
    common = dict(sorted(left_out.items(), key=lambda item: (-item[1], item[0]))[:_KINDS])
    rest = left_out.total() - sum(common.values())
    return common | ({"of other kinds": rest} if rest else {})


_STORED = ("classes", "counts", "digest", "mtimes", "left_out")  # in the header of the index


def _to_bytes(index: _Index) -> bytes:
    header = {"format": _FORMAT, **{key: getattr(index, key) for key in _STORED}}
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
        index = _Index(lengths=body[:split], names=body[split:], **{key: header[key] for key in _STORED})
        return index if _digest(index) == index.digest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
