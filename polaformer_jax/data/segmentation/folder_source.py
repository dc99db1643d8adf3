"""Folders of images and masks, `ROOT/images/SPLIT/x.jpg` and `ROOT/annotations/SPLIT/x.png`, as a random-access source.

This is the layout of ADE20K, which may be read where it was unpacked.
"""

import functools
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from polaformer_jax.data.records import Record
from polaformer_jax.data.segmentation import layout
from polaformer_jax.data.segmentation.labels import MAX_CLASSES
from polaformer_jax.data.segmentation.sizes import read_sizes
from polaformer_jax.errors import UserError
from polaformer_jax.files import paths
from polaformer_jax.files.names import shown

IMAGE_DIR, MASK_DIR = "images/{split}", "annotations/{split}"
_ALIASES = {"train": "training", "training": "train", "val": "validation", "validation": "val"}


class MaskFolderSource:
    """One split of a folder of images and masks (see `source.SegmentationSource`). Records hold the files' bytes.

    The names of the classes are read from `ROOT/classes.txt` (a name a line), or from ADE20K's `objectInfo150.txt`.

    Args:
        root: the local folder; or the one that holds ADE20K's folder `ADEChallengeData2016`.
        split: name of the split; `train` and `training`, `val` and `validation` are interchangeable where only one
            exists.
        image_dir, mask_dir: the folders below it, in which `{split}` stands for the split.
        num_classes: the number of classes where no file names them.
        reduce_zero_label: whether 0 in the masks means none of the classes (see `labels`); None: as ADE20K if there is
            its list of classes, otherwise not.
        name: the data set's name in messages; by default the folder's name.

    Raises:
        UserError: no such folder; images and masks that do not match; no names of classes and no `num_classes`, or
            another number than there are names; more than 255 classes.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        split: str,
        *,
        image_dir: str = IMAGE_DIR,
        mask_dir: str = MASK_DIR,
        num_classes: int | None = None,
        reduce_zero_label: bool | None = None,
        name: str | None = None,
    ):
        folder = paths.data_folder(root, expected=f"ROOT with {image_dir} and {mask_dir}")
        self.name = shown(f"{name or folder.name}/{split}")
        images, masks = (_directory(folder, given, split) for given in (image_dir, mask_dir))
        if (images is None or masks is None) and (folder / layout.ADE20K).is_dir():
            folder = folder / layout.ADE20K
            images, masks = (_directory(folder, given, split) for given in (image_dir, mask_dir))
        for directory, given in ((images, image_dir), (masks, mask_dir)):
            if directory is None:
                raise UserError(_missing(folder, given, split))
        self.origin = shown(str(folder))
        classes = layout.read_classes(folder)
        self.num_classes = _number(classes, num_classes, folder)
        self.class_names = classes.names if classes else None
        self.reduce_zero_label = bool(classes and classes.reduce_zero_label)
        if reduce_zero_label is not None:
            self.reduce_zero_label = reduce_zero_label
        self._images, self._masks = os.fspath(images), os.fspath(masks)
        self._pairs = layout.pairs(images, masks)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "sizes"}

    @property
    def digest(self) -> str:
        """Of the names of classes and files, and so of the order of the records; not of their content."""
        parts = [self._pairs, self.num_classes, self.class_names, self.reduce_zero_label]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        return read_sizes(lambda index: open(self._paths(index)[0], "rb"), len(self), self.name)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Record:
        image, mask = self._paths(index)
        return {"image": _content(image), "mask": _content(mask)}

    def describe(self, index: int) -> str:
        return shown(self._paths(index)[0])

    def _paths(self, index: int) -> tuple[str, str]:
        """Of the image and of the mask."""
        if not 0 <= index < len(self._pairs):
            raise IndexError(f"{self.name} has no record {index}, expected 0 to {len(self._pairs) - 1}")
        image, mask = self._pairs[index]
        return os.path.join(self._images, image), os.path.join(self._masks, mask)


def _content(path: str) -> bytes:
    # Opening a named pipe would block until it has a writer; for a regular file O_NONBLOCK makes no difference.
    with open(path, "rb", buffering=0, opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
        return file.read()


def _directory(root: Path, given: str, split: str) -> Path | None:
    """The folder of a split; None if there is none."""
    for name in (split, _ALIASES.get(split)):
        # A split is one name: neither "" nor "../other" nor a slice such as train[:90%].
        if name and name == os.path.basename(name) and name not in (".", ".."):
            if (directory := root / given.replace("{split}", name)).is_dir():
                return directory
    return None


def _missing(root: Path, given: str, split: str) -> str:
    """The message about a folder that is not there, with what is there instead."""
    parent = root / given.replace("{split}", split)
    while parent != root and not parent.is_dir():
        parent = parent.parent
    found = ", ".join(sorted(shown(path.name) for path in parent.iterdir() if path.is_dir())) or "no folders"
    return (
        f"data folder {root} has no folder {given.replace('{split}', split)} for split {split!r}: found {found} in"
        f" {parent}; expected ROOT/{IMAGE_DIR} and ROOT/{MASK_DIR}, or other folders named by data.image_dir and"
        " data.mask_dir"
    )


def _number(classes: layout.Classes | None, given: int | None, root: Path) -> int:
    if classes is None and given is None:
        raise UserError(
            f"the number of classes is not known: {root} has neither classes.txt (a name a line) nor objectInfo150.txt"
            " (of ADE20K). Write the names into classes.txt, or give num_classes"
        )
    number = len(classes.names) if classes else given
    if given is not None and given != number:
        raise UserError(f"num_classes is {given}, but {root} names {number} classes: leave it out, or correct one")
    if not 1 <= number <= MAX_CLASSES:
        raise UserError(f"{number} classes in {root}: expected 1 to {MAX_CLASSES}, for masks have 8 bits")
    return number
