"""Prepared TensorFlow Datasets of images with masks, as a random-access source."""

import functools
import io
from typing import Any

import numpy as np
from etils import epath

from polaformer_jax.data.records import Record
from polaformer_jax.data.segmentation.labels import MAX_CLASSES
from polaformer_jax.data.segmentation.sizes import read_sizes
from polaformer_jax.data.tfds_source import TfdsRecords, check_image, feature_dict, listed
from polaformer_jax.errors import UserError
from polaformer_jax.files.names import shown


def metadata(num_classes: int, *, class_names: list[str] | None, reduce_zero_label: bool) -> dict[str, Any]:
    """What a builder stores with its data set, as `tfds.core.MetadataDict`: masks are images, which name no classes.

    Args:
        num_classes: without that of 0, if it is reduced.
        class_names: in the order of labels; None: they have none.
        reduce_zero_label: whether 0 in the masks *as they are stored* means none of the classes (see `labels`).
    """
    return {"num_classes": num_classes, "class_names": class_names, "reduce_zero_label": reduce_zero_label}


class MaskTfdsSource(TfdsRecords):
    """One split of a prepared tfds data set with the features `image` and `mask` (see `source.SegmentationSource`).

    Records hold both as they are stored (encoded bytes). Data sets that this package prepares say how many classes they
    have, their names, and whether 0 is one (see `metadata`); for others it is given here.

    Args:
        name, data_dir, split: see `TfdsRecords`.
        num_classes: the number of classes where the data set does not tell it.
        reduce_zero_label: where the data set does not tell it; None: False.

    Raises:
        UserError: as `TfdsRecords`; the number of classes is not known, or the arguments contradict the data set.
    """

    def __init__(
        self,
        name: str,
        *,
        data_dir: epath.PathLike,
        split: str,
        num_classes: int | None = None,
        reduce_zero_label: bool | None = None,
    ):
        self._given = {"num_classes": num_classes, "reduce_zero_label": reduce_zero_label}
        super().__init__(name, data_dir=data_dir, split=split)

    def _use(self, info) -> list[Any]:
        check_features(info.features, self.name)
        found = {name: value for name, value in self._given.items() if value is not None}
        told = {} if info.metadata is None else dict(info.metadata)
        for name, value in found.items():
            if told.get(name, value) != value:
                raise UserError(f"{name} is {value}, but the data set {self.name!r} has {told[name]}", argument=name)
        found |= {name: told[name] for name in self._given if told.get(name) is not None}
        if "num_classes" not in found:
            raise UserError(f"the data set {self.name!r} does not tell its number of classes: give num_classes")
        self.num_classes = int(found["num_classes"])
        if not 1 <= self.num_classes <= MAX_CLASSES:
            raise UserError(f"{self.name} has {self.num_classes} classes: expected 1 to {MAX_CLASSES}")
        names = told.get("class_names")
        self.class_names = tuple(map(shown, names)) if names else None
        self.reduce_zero_label = bool(found.get("reduce_zero_label", False))
        return [self.num_classes, names, self.reduce_zero_label]

    def __getstate__(self):
        return super().__getstate__() | {"_given": self._given}

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        return read_sizes(lambda index: io.BytesIO(self[index]["image"]), len(self), self.name)

    def __getitem__(self, index: int) -> Record:
        record = self._records[index]
        return {"image": record["image"], "mask": record["mask"]}


def check_features(features, name: str) -> None:
    """Raises a UserError if no 8-bit `image` and `mask` are among the features, which the message lists."""
    import tensorflow_datasets as tfds

    found = feature_dict(features)
    if not all(isinstance(found.get(key), tfds.features.Image) for key in ("image", "mask")):
        raise UserError(
            f"data set {name!r} is not for semantic segmentation: expected the features image (Image) and mask "
            f"(Image), found {listed(features)}"
        )
    for key in ("image", "mask"):
        check_image(found[key], name)
