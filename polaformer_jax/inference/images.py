"""Images as people have them (files, bytes, Pillow's, arrays), and as a model takes them."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from polaformer_jax.data.images.normalisation import normalise
from polaformer_jax.data.images.transforms import EvalImageTransform, decode, to_rgb
from polaformer_jax.data.records import CorruptRecordError
from polaformer_jax.errors import UserError, WeightsError
from polaformer_jax.files import paths
from polaformer_jax.files.names import shown
from polaformer_jax.models.backbone import Backbone
from polaformer_jax.models.segmenter import Segmenter

# A file (local, or in a bucket), the content of one, an image of Pillow, or an array of numbers of 8 bits: (h, w, 3),
# with an alpha channel, which is ignored, (h, w, 4), or grey (h, w).
ImageLike = epath.PathLike | bytes | Image.Image | np.ndarray | jax.Array

NAMED_PROBLEMS = 10  # at most this many unreadable images are named in an error


def preprocess(model: Backbone, images: ImageLike | Iterable[ImageLike]) -> jax.Array:
    """Images as a model takes them, resized, cropped and normalised: `model(pf.preprocess(model, "photo.jpg"))`.

    They are prepared as `model.info.preprocess` says, as in the training; without it by the official rule (see
    `evaluation_transform`).

    Args:
        images: one, or several: paths of files (local, or `gs://`), the bytes of files, Pillow images, or uint8 arrays
            (height, width, 3), which need not have one size.

    Returns:
        (batch, img_size, img_size, 3) float32.

    Raises:
        UserError: images cannot be read or decoded; it names up to 10 of them.
    """
    transform = evaluation_transform(model)
    images = as_list(images)
    pixels, problems = np.zeros((len(images), transform.crop, transform.crop, 3), np.uint8), []
    for number, image in enumerate(images):
        try:
            pixels[number] = read_image(image, transform, number)
        except UserError as error:
            problems.append(str(error))
    raise_problems(problems, len(images))
    return normalise(pixels)


def evaluation_transform(model: Backbone) -> EvalImageTransform:
    """How images become the model's input, up to normalisation.

    `model.info.preprocess`, such as `{"resize": 256, "crop": 224}`, is applied; without it the official rule: resize to
    256 for a crop of 224, in the same proportion for other sizes, but no crop from 384 pixels on. The aspect ratio is
    not kept.

    Raises:
        UserError: the model does not take images.
        WeightsError: `preprocess` does not fit the model's image size.
    """
    if isinstance(model, Segmenter):
        raise UserError("the model segments images: pf.segment(model, images), or `polaformer predict --out DIR`")
    if not isinstance(model, Backbone):
        raise UserError(f"the model is a {type(model).__name__}, which does not take images")
    size = model.config.img_size
    resize, crop = size if size >= 384 else round(size * 256 / 224), size
    if (given := model.info.preprocess) is not None:
        resize, crop = given["resize"], given["crop"]
        if crop != size:
            raise WeightsError(f"metadata preprocess={given!r}: its crop does not fit the model's img_size, {size}")
    return EvalImageTransform(resize=resize, crop=crop, num_classes=max(model.config.num_classes, 1))


def as_list(images: ImageLike | Iterable[ImageLike]) -> list[ImageLike]:
    """The images one by one; a single one is a list of one."""
    single = isinstance(images, str | os.PathLike | bytes | Image.Image) or getattr(images, "ndim", 4) < 4
    if not single and not isinstance(images, Iterable):
        raise UserError(f"images is a {type(images).__name__}, expected an image or several", argument="images")
    return [images] if single else list(images)


def name_of(image: ImageLike, number: int) -> str:
    """What an image is called in results and errors: its path, such as can be printed, or its number."""
    return shown(os.fspath(image)) if isinstance(image, str | os.PathLike) else f"image {number}"


def read_image(image: ImageLike, transform: EvalImageTransform, number: int = 0) -> np.ndarray:
    """An image as the model sees it: (S, S, 3) uint8.

    Args:
        number: of the image in its batch, for errors about images that have no name.

    Raises:
        UserError: see `read_pixels`.
    """
    return transform.prepared(read_pixels(image, number))


def read_pixels(image: ImageLike, number: int = 0) -> np.ndarray:
    """An image at its own size: (h, w, 3) uint8.

    Raises:
        UserError: it cannot be read or decoded, or is no image; the message names it.
    """
    try:
        return _pixels(image)
    except OSError as error:
        raise UserError(f"{name_of(image, number)}: {error.strerror or error}") from error
    except CorruptRecordError as error:
        raise UserError(f"{name_of(image, number)}: {error}") from error


def _pixels(image: Any) -> np.ndarray:
    """(h, w, 3) uint8"""
    if isinstance(image, str | os.PathLike):
        return decode(paths.given(image).read_bytes())
    if isinstance(image, bytes):
        return decode(image)
    if isinstance(image, Image.Image):
        try:
            return to_rgb(image)
        except Exception as error:  # Pillow decodes here what it only opened before
            raise CorruptRecordError(f"corrupt image: {error}") from error
    if not hasattr(image, "dtype"):
        raise CorruptRecordError(f"a {type(image).__name__}, expected a path, bytes, a Pillow image or a uint8 array")
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))):
        hint = ", channels last" if pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4) else ""
        range_of = "" if pixels.dtype == np.uint8 else ", values from 0 to 255"
        raise CorruptRecordError(
            f"an array of {pixels.dtype} {pixels.shape}, expected uint8 (height, width, 3){hint}{range_of}"
        )
    if not pixels.size:
        raise CorruptRecordError(f"an array without pixels, {pixels.shape}")
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    return np.ascontiguousarray(pixels[..., :3] if pixels.shape[2] > 1 else np.repeat(pixels, 3, axis=2))


def raise_problems(problems: Sequence[str], count: int) -> None:
    """Raises one UserError for the images, of `count`, that cannot be read; nothing if there are none."""
    if not problems:
        return
    listed = "".join(f"\n  {problem}" for problem in problems[:NAMED_PROBLEMS])
    more = f"\n  and {len(problems) - NAMED_PROBLEMS} more" if len(problems) > NAMED_PROBLEMS else ""
    raise UserError(f"{len(problems)} of {count} images cannot be read:{listed}{more}")
