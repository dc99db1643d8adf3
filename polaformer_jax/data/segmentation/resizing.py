"""Sizes and resizing as in mmsegmentation 1.2: OpenCV's bilinear for images, nearest for labels.

Sizes are (height, width). Images are (h, w, 3) uint8, labels (h, w) uint8.
"""

import functools
from types import ModuleType

import numpy as np

from polaformer_jax.errors import UserError

Size = tuple[int, int]  # (height, width)


@functools.cache
def opencv() -> ModuleType:
    """OpenCV with one thread: worker processes run in parallel already.

    Raises:
        UserError: it is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise UserError(f'segmentation needs OpenCV ({error}): pip install "polaformer_jax[train]"') from error
    cv2.setNumThreads(0)
    return cv2


def scaled_size(size: Size, factor: float) -> Size:
    """Both sides times a factor, rounded half up, at least one pixel.

    The reference has no lower bound, and fails on images that are much longer than wide.
    """
    height, width = size
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def fitted_size(size: Size, box: tuple[int, int]) -> Size:
    """The largest size of the same aspect in a box, whose longer side bounds the longer side of the image."""
    return scaled_size(size, min(max(box) / max(size), min(box) / min(size)))


def multiple(size: Size, of: int) -> Size:
    """Both sides rounded up to multiples of a number."""
    height, width = size
    return -(-height // of) * of, -(-width // of) * of


def resize(image: np.ndarray, size: Size) -> np.ndarray:
    """Bilinear, without antialiasing."""
    return _resized(image, size, "INTER_LINEAR")


def resize_labels(labels: np.ndarray, size: Size) -> np.ndarray:
    """Nearest: no label that was not there before."""
    return _resized(labels, size, "INTER_NEAREST")


def _resized(pixels: np.ndarray, size: Size, method: str) -> np.ndarray:
    if pixels.shape[:2] == tuple(size):
        return pixels
    cv2 = opencv()
    return cv2.resize(pixels, (size[1], size[0]), interpolation=getattr(cv2, method))


def mirror(pixels: np.ndarray) -> np.ndarray:
    """Left to right, of images and of labels."""
    return opencv().flip(pixels, 1)


def padded(pixels: np.ndarray, size: Size, value: int) -> np.ndarray:
    """Enlarged to a size at the bottom and at the right."""
    height, width = pixels.shape[:2]
    margins = [(0, size[0] - height), (0, size[1] - width)] + [(0, 0)] * (pixels.ndim - 2)
    return np.pad(pixels, margins, constant_values=value)
