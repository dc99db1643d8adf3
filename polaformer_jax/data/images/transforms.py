"""Image transforms on the host: decode, random resized crop, flip, RandAugment; for evaluation resize and crop.

The pixels are those of Pillow, which the official pipeline uses (torchvision and timm call it). The parts are functions
`(image, ..., rng) -> image` of (h, w, 3) uint8 arrays; a transform is a small frozen dataclass that chains them, and
can be pickled to worker processes and compared. All random numbers are drawn from the generator that is passed in.
"""

import dataclasses
import io
import math

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from polaformer_jax.data.images import resampling
from polaformer_jax.data.images.rand_augment import RandAugment
from polaformer_jax.data.records import CorruptRecordError, Example, OnError, Record, check_label
from polaformer_jax.errors import UserError

_OF_16_BITS = ("PNG", "PPM")  # formats whose images of mode "I" are of 16 bits in some versions of Pillow


def decode(data: bytes) -> np.ndarray:
    """Decodes to RGB, (h, w, 3) uint8. EXIF orientation is ignored, as the official loader does.

    Grey images of 16 bits are scaled to 8. Pillow's own guard against decompression bombs stays active: more than 179
    million pixels are an error.

    Raises:
        CorruptRecordError: replaces whatever Pillow raises on broken data, which is more than OSError; or the range of
            the pixels is not known.
    """
    pixels = _decode_plain_jpeg(data)
    if pixels is not None:
        return pixels
    try:
        image = Image.open(io.BytesIO(data))
        # `open` reads only the header; the pixels must be decoded here, where a failure can be attributed to this
        # image.
        image.load()
        return to_rgb(image)
    except Exception as error:
        # Pillow's own message for this error holds only a memory address.
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise CorruptRecordError(f"corrupt image ({len(data)} bytes): {reason}") from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """The pixels of a Pillow image, (h, w, 3) uint8; grey ones of 16 bits are scaled to 8.

    Raises:
        ValueError: the range of its pixels is not known. Or what Pillow raises on broken data.
    """
    image = _eight_bits(image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image with 8 bits for each channel. `convert` would cut larger numbers off at 255: a white image.

    Raises:
        ValueError: its numbers have no known range.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _OF_16_BITS):
        return Image.fromarray(((np.asarray(image, np.int64) + 128) // 257).astype(np.uint8))  # 65535 becomes 255
    if image.mode in ("I", "F"):
        kind = {"I": "integers of 32 bits", "F": "floats"}[image.mode]
        raise ValueError(f"pixels are {kind}, whose range is not known: convert it to 8 bits")
    return image


def _decode_plain_jpeg(data: bytes) -> np.ndarray | None:
    """Decodes an ordinary JPEG file straight into an array with the library that Pillow uses: a third faster.

    None for all others, including those for which libjpeg gives so much as a warning: Pillow decides about them.
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours != "YCbCr" or height * width > (Image.MAX_IMAGE_PIXELS or 0):
            return None
        return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True)
    except ValueError:
        return None


def random_crop_box(
    width: int, height: int, rng: np.random.Generator, *, area: tuple[float, float], aspect: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draws a box (left, top, right, bottom) as torchvision's `RandomResizedCrop` does.

    Area is uniform in `area` (share of the image), aspect ratio log-uniform in `aspect`, position uniform; after ten
    boxes that do not fit, it is the largest central box whose aspect is in range.
    """
    for _ in range(10):
        target = width * height * rng.uniform(*area)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return left, top, left + w, top + h
    # A ratio may leave less than a pixel of a one-pixel-wide image: torchvision would fail, here one pixel is kept.
    w = min(width, max(1, round(height * aspect[1])))
    h = min(height, max(1, round(width / aspect[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_resized_crop(
    image: np.ndarray,
    size: int,
    rng: np.random.Generator,
    *,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> np.ndarray:
    """A random box of the image, resized to (size, size, 3) bicubically."""
    left, top, right, bottom = random_crop_box(image.shape[1], image.shape[0], rng, area=area, aspect=aspect)
    return resampling.resize(image[top:bottom, left:right], (size, size))


def random_flip(image: np.ndarray, rng: np.random.Generator, *, probability: float) -> np.ndarray:
    """Mirrors left to right with the given probability."""
    flip = rng.random() < probability  # always drawn: later draws get the same numbers for any probability
    return resampling.mirror(image) if flip else image


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The central (size, size) box, rounded as torchvision does."""
    top, left = round((image.shape[0] - size) / 2), round((image.shape[1] - size) / 2)
    return image[top : top + size, left : left + size]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ImageTransform:
    num_classes: int
    on_error: OnError = "stop"

    def __post_init__(self):
        if self.on_error not in ("stop", "skip"):
            raise UserError(f"on_error is {self.on_error!r}, expected 'stop' or 'skip'")
        if self.num_classes < 1:
            raise UserError(f"num_classes is {self.num_classes}, expected at least 1")

    @property
    def size(self) -> int:
        raise NotImplementedError

    def blank(self, label: int = 0) -> Example:
        image = np.zeros((self.size, self.size, 3), np.uint8)
        return {"image": image, "label": np.int32(label), "mask": np.bool_(False)}

    def _example(self, image: np.ndarray, label: np.int32) -> Example:
        return {"image": image, "label": label, "mask": np.bool_(True)}  # (S, S, 3) uint8


@dataclasses.dataclass(frozen=True)
class TrainImageTransform(_ImageTransform):
    """Random resized crop, flip, RandAugment: `{"image": bytes, "label"}` to (image_size, image_size, 3) uint8.

    Args:
        image_size: side of the result in pixels.
        crop_area: smallest and largest share of the image that a crop covers.
        crop_aspect: smallest and largest width / height of a crop.
        flip: probability of mirroring left to right.
        rand_augment: policy such as `rand-m9-mstd0.5-inc1` (see `RandAugment.parse`); None omits it.
        num_classes, on_error: see `check_label` and `Transform`.
    """

    image_size: int
    _: dataclasses.KW_ONLY
    crop_area: tuple[float, float] = (0.08, 1.0)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    rand_augment: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.image_size < 1:
            raise UserError(f"image_size is {self.image_size}, expected at least 1")
        for name, upper in (("crop_area", 1.0), ("crop_aspect", math.inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= upper:
                raise UserError(f"{name} is ({low}, {high}), expected 0 < low <= high <= {upper}")
            object.__setattr__(self, name, (float(low), float(high)))  # a list in a config becomes a tuple
        if not 0 <= self.flip <= 1:
            raise UserError(f"flip is {self.flip}, expected a probability")
        augment = None if self.rand_augment is None else RandAugment.parse(self.rand_augment)
        object.__setattr__(self, "_augment", augment)

    @property
    def size(self) -> int:
        return self.image_size

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        if rng is None:
            raise ValueError("a training transform needs a random generator")
        label = check_label(record["label"], self.num_classes)
        image = decode(record["image"])
        image = random_resized_crop(image, self.image_size, rng, area=self.crop_area, aspect=self.crop_aspect)
        image = random_flip(image, rng, probability=self.flip)
        if self._augment is not None:
            image = self._augment(image, rng)
        return self._example(image, label)


def train_transform(config) -> TrainImageTransform:
    """The host-side part of the augmentation that a config describes."""
    augment = config.augment
    return TrainImageTransform(
        config.model.img_size,
        crop_area=tuple(augment.crop_area),
        crop_aspect=tuple(augment.crop_aspect),
        flip=augment.flip,
        rand_augment=augment.rand_augment,
        num_classes=config.model.num_classes,
        on_error=config.data.on_error,
    )


@dataclasses.dataclass(frozen=True)
class EvalImageTransform(_ImageTransform):
    """Resizes to (resize, resize) **without keeping the aspect**, bicubic, then takes the central (crop, crop).

    The official evaluation does it this way; `resize == crop` crops nothing.
    """

    resize: int
    crop: int

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.crop <= self.resize:
            raise UserError(f"evaluation crop is {self.crop}, expected 1 to the resize of {self.resize}")

    @property
    def size(self) -> int:
        return self.crop

    def __call__(self, record: Record, rng: np.random.Generator | None = None) -> Example:
        label = check_label(record["label"], self.num_classes)
        return self._example(self.prepared(decode(record["image"])), label)

    def prepared(self, image: np.ndarray) -> np.ndarray:
        """(h, w, 3) uint8 -> (crop, crop, 3) uint8"""
        return center_crop(resampling.resize(image, (self.resize, self.resize)), self.crop)
