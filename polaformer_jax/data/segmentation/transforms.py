"""Transforms of images with masks: mmsegmentation's pipelines of ADE20K, for training and for evaluation.

Training: resize, crop, flip, distort, pad; evaluation: resize, with the labels at the size of the image. As in
`data.images.transforms`, all random numbers are drawn from the generator that is passed in.

EXIF orientation is ignored, in images as in masks; the reference turns the images only.
"""

import dataclasses
import math

import numpy as np

from polaformer_jax.data.images.transforms import decode
from polaformer_jax.data.records import Example, OnError, Record
from polaformer_jax.data.segmentation import resizing
from polaformer_jax.data.segmentation.distortion import photometric_distortion
from polaformer_jax.data.segmentation.labels import IGNORED, MAX_CLASSES, decode_labels
from polaformer_jax.data.segmentation.resizing import Size
from polaformer_jax.errors import UserError

Box = tuple[slice, slice]  # rows, columns

IMAGE_MULTIPLE = 32  # of the sides of images that are evaluated: the models' largest stride
LABEL_MULTIPLE = 128  # of the sides of padded labels, so that batches have few shapes
CROPS = 10  # further boxes that are drawn while one class fills too much of the crop


def random_scale(
    size: Size, rng: np.random.Generator, *, scale: tuple[int, int] | None, ratio_range: tuple[float, float]
) -> Size:
    """Draws the size that an image is resized to: as large as fits into `scale` times a ratio, or its own times it."""
    ratio = rng.uniform(*ratio_range)
    if scale is None:
        return resizing.scaled_size(size, ratio)
    return resizing.fitted_size(size, tuple(max(1, int(side * ratio)) for side in scale))


def random_crop_box(labels: np.ndarray, size: int, rng: np.random.Generator, *, max_class_share: float) -> Box:
    """Draws a box of at most (size, size): the index of a part of an image and of its labels.

    It is drawn again up to ten times while one class has `max_class_share` of its labelled pixels or more, or all
    of them; the last one is taken as it is. With 1, the first one is taken.
    """
    box = _random_box(labels.shape, size, rng)
    if max_class_share < 1:
        for _ in range(CROPS):
            counts = np.bincount(labels[box].ravel(), minlength=IGNORED + 1)[:IGNORED]
            if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < max_class_share:
                break
            box = _random_box(labels.shape, size, rng)
    return box


def _random_box(shape: Size, size: int, rng: np.random.Generator) -> Box:
    top, left = (int(rng.integers(max(side - size, 0) + 1)) for side in shape)
    return slice(top, top + size), slice(left, left + size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SegmentationTransform:
    num_classes: int
    reduce_zero_label: bool = False
    on_error: OnError = "stop"

    def __post_init__(self):
        if self.on_error not in ("stop", "skip"):
            raise UserError(f"on_error is {self.on_error!r}, expected 'stop' or 'skip'")
        if not 1 <= self.num_classes <= MAX_CLASSES:
            raise UserError(f"num_classes is {self.num_classes}, expected 1 to {MAX_CLASSES}: labels have 8 bits")

    def _decoded(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """Image (h, w, 3) and labels (h, w), uint8."""
        image = decode(record["image"])
        labels = decode_labels(
            record["mask"], size=image.shape[:2], num_classes=self.num_classes, reduce_zero=self.reduce_zero_label
        )
        return image, labels


@dataclasses.dataclass(frozen=True)
class TrainSegmentationTransform(_SegmentationTransform):
    """Random resize, crop, flip and distortion, then padding to the size of the crop.

    Examples are `{"image": uint8 (S, S, 3), "label": uint8 (S, S), "size": int32 (2,), "mask": bool}`, where S is
    `crop_size` and `size` is (height, width) of the part at the top left that is image. The rest is padding: image 0,
    label 255. (The reference pads normalised images with 0, which is the mean colour: multiply by that part.)

    Args:
        crop_size: side of the result in pixels.
        scale: the box of two sides, in any order, that images are resized into before they are cropped; it is
            multiplied by a random ratio. None: their own size is.
        ratio_range: smallest and largest ratio.
        max_class_share: see `random_crop_box`.
        flip: probability of mirroring left to right.
        distortion: whether brightness, contrast, saturation and hue are changed.
        reduce_zero_label, num_classes, on_error: see `labels.decode_labels` and `records.Transform`.
    """

    crop_size: int
    _: dataclasses.KW_ONLY
    scale: tuple[int, int] | None = (2048, 512)
    ratio_range: tuple[float, float] = (0.5, 2.0)
    max_class_share: float = 0.75
    flip: float = 0.5
    distortion: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.crop_size < 1:
            raise UserError(f"crop_size is {self.crop_size}, expected at least 1")
        _check_scale(self.scale)
        low, high = self.ratio_range
        if not 0 < low <= high < math.inf:
            raise UserError(f"ratio_range is ({low}, {high}), expected 0 < low <= high")
        if not 0 < self.max_class_share <= 1:
            raise UserError(f"max_class_share is {self.max_class_share}, expected more than 0 and at most 1")
        if not 0 <= self.flip <= 1:
            raise UserError(f"flip is {self.flip}, expected a probability")

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        if rng is None:
            raise ValueError("a training transform needs a random generator")
        image, labels = self._decoded(record)
        size = random_scale(labels.shape, rng, scale=self.scale, ratio_range=self.ratio_range)
        image, labels = resizing.resize(image, size), resizing.resize_labels(labels, size)
        box = random_crop_box(labels, self.crop_size, rng, max_class_share=self.max_class_share)
        image, labels = image[box], labels[box]
        if rng.random() < self.flip:
            image, labels = resizing.mirror(image), resizing.mirror(labels)
        if self.distortion:
            image = photometric_distortion(image, rng)
        whole = (self.crop_size, self.crop_size)
        return {
            "image": resizing.padded(image, whole, 0),
            "label": resizing.padded(labels, whole, IGNORED),
            "size": np.array(labels.shape, np.int32),
            "mask": np.bool_(True),
        }

    def blank(self, label: int = 0) -> Example:
        """An example without image and labels, `mask` False."""
        del label  # of a mask there is none
        return _blank({"image": (self.crop_size, self.crop_size)}, (self.crop_size, self.crop_size))


@dataclasses.dataclass(frozen=True)
class EvalSegmentationTransform(_SegmentationTransform):
    """Resizes images, once for each test-time scale, and leaves labels at the size of the image.

    Images are resized into `scale` times the test-time scale, keeping their aspect, and then up to the next multiples
    of 32, which changes the aspect a little, as PVT's `AlignResize` and mmsegmentation's `ResizeToMultiple` do.

    Examples are `{"image": uint8 (h, w, 3), "label": uint8 (H, W), "size": int32 (2,), "mask": bool}`, where `size` is
    (height, width) of the stored image, and H and W are these rounded up to multiples of 128; the rest is padded with
    255. With test-time scales there are `image_0.5`, `image_1.0`, ... in place of `image` (see `image_sizes`).

    Args:
        scale: the box of two sides, in any order; None: images keep their size.
        scales: test-time scales, of which `(1.0,)` means none.
        reduce_zero_label, num_classes, on_error: see `labels.decode_labels` and `records.Transform`.
    """

    scale: tuple[int, int] | None
    _: dataclasses.KW_ONLY
    scales: tuple[float, ...] = (1.0,)

    def __post_init__(self):
        super().__post_init__()
        _check_scale(self.scale)
        if not self.scales or len(set(self.scales)) < len(self.scales):
            raise UserError(f"scales is {self.scales}, expected one number or more, each once")
        if not all(0 < scale < math.inf for scale in self.scales):
            raise UserError(f"scales is {self.scales}, expected positive numbers")

    def image_sizes(self, size: Size) -> dict[str, Size]:
        """The name of each array of the image, and its (height, width), for a stored image of this size."""
        return {name: resizing.multiple(self._fitted(size, scale), IMAGE_MULTIPLE) for name, scale in self._names()}

    def label_size(self, size: Size) -> Size:
        """(height, width) of the padded labels of an image of this size."""
        return resizing.multiple(size, LABEL_MULTIPLE)

    def __call__(self, record: Record, rng: np.random.Generator | None = None) -> Example:
        image, labels = self._decoded(record)
        return {
            **self.prepared(image),
            "label": resizing.padded(labels, self.label_size(labels.shape), IGNORED),
            "size": np.array(labels.shape, np.int32),
            "mask": np.bool_(True),
        }

    def prepared(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of an image (h, w, 3) uint8, under their names."""
        found = {}
        for name, scale in self._names():
            resized = resizing.resize(image, self._fitted(image.shape[:2], scale))  # twice, as the reference
            found[name] = resizing.resize(resized, resizing.multiple(resized.shape[:2], IMAGE_MULTIPLE))
        return found

    def blank(self, label: int = 0) -> Example:
        """An example of the smallest size with `mask` False. In a batch it gets the shape of the others."""
        del label  # of a mask there is none
        return self.blank_of((1, 1))

    def blank_of(self, size: Size) -> Example:
        """An example with `mask` False, of the shape of those of images of this size."""
        return _blank(self.image_sizes(size), self.label_size(size))

    def _names(self) -> list[tuple[str, float]]:
        if tuple(self.scales) == (1.0,):
            return [("image", 1.0)]
        return [(f"image_{float(scale)}", scale) for scale in self.scales]

    def _fitted(self, size: Size, scale: float) -> Size:
        """Of an image of this size at a test-time scale, before it is rounded up."""
        if self.scale is None:
            return resizing.scaled_size(size, scale)
        return resizing.fitted_size(size, tuple(max(1, int(side * scale)) for side in self.scale))


def _blank(image_sizes: dict[str, Size], label_size: Size) -> Example:
    images = {name: np.zeros((*size, 3), np.uint8) for name, size in image_sizes.items()}
    labels = np.full(label_size, IGNORED, np.uint8)
    return {**images, "label": labels, "size": np.zeros(2, np.int32), "mask": np.bool_(False)}


def _check_scale(scale: tuple[int, int] | None) -> None:
    if scale is not None and (len(scale) != 2 or min(scale) < 1):
        raise UserError(f"scale is {scale}, expected two sides of at least 1 pixel, or None")
