"""Sources of images with masks, and the one that a config names."""

from typing import Protocol, runtime_checkable

import numpy as np

from polaformer_jax.data.records import Source
from polaformer_jax.errors import UserError


@runtime_checkable
class SegmentationSource(Source, Protocol):
    """As `records.Source`, of records `{"image": encoded bytes, "mask": encoded bytes (PNG)}`.

    Attributes:
        num_classes: labels are in `[0, num_classes)`, or 255, once 0 is reduced where that is needed.
        reduce_zero_label: whether 0 in the masks means none of the classes: a transform maps it to 255, and k to k - 1.
        sizes: (height, width) of each image, (n, 2) int32, read from the headers on first use; (0, 0) for an image
            that cannot be read.
    """

    reduce_zero_label: bool

    @property
    def sizes(self) -> np.ndarray: ...


def _open_masks(data, split: str, num_classes: int | None) -> SegmentationSource:
    from polaformer_jax.data.segmentation import folder_source

    return folder_source.MaskFolderSource(
        data.data_dir,
        split,
        image_dir=data.image_dir or folder_source.IMAGE_DIR,
        mask_dir=data.mask_dir or folder_source.MASK_DIR,
        num_classes=num_classes,
        reduce_zero_label=getattr(data, "reduce_zero_label", None),
        name=data.name,
    )


def _open_tfds(data, split: str, num_classes: int | None) -> SegmentationSource:
    from polaformer_jax.data.segmentation import tfds_source

    return tfds_source.MaskTfdsSource(
        data.name,
        data_dir=data.data_dir,
        split=split,
        num_classes=num_classes,
        reduce_zero_label=getattr(data, "reduce_zero_label", None),
    )


# Each opener imports its own module, so that a run pays only for the source that it uses.
_OPENERS = {"masks": _open_masks, "tfds": _open_tfds}


def open_source(data, split: str, num_classes: int | None = None) -> SegmentationSource:
    """Opens the data set that a config names; only reads, and never downloads or prepares anything.

    Args:
        data: the config's `data` part: `source` (`masks` or `tfds`), `name`, `data_dir`, `reduce_zero_label` (None: as
            the data says), and for folders `image_dir` and `mask_dir` (None: as in ADE20K).
        split: a split of that data set; for tfds, also slices such as `train[:90%]`.
        num_classes: the number of classes, needed where the data does not tell it.

    Raises:
        UserError: see `MaskFolderSource` and `MaskTfdsSource`; an unknown source.
    """
    if data.source not in _OPENERS:
        raise UserError(
            f"data.source is {data.source!r}, expected one of: {', '.join(sorted(_OPENERS))} (for segmentation)"
        )
    return _OPENERS[data.source](data, split, num_classes)
