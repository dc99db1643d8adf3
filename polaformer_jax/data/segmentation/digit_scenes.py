"""Scenes of scikit-learn's handwritten digits with a class for each pixel: a data set that needs no download.

Prepared and read like ADE20K, so that the smallest run takes the same code path as the largest. A digit is printed on a
sticker that is cut out around it, and labelled as far as the sticker goes: its strokes alone are thinner than what
logits at a quarter of the resolution can draw. There is at most one in each cell of 32 pixels, the largest stride of
the models: with digits anywhere, small models could not tell one from another after 900 steps.

Pixels are the same everywhere: all is computed with integers, and random numbers are the raw output of PCG64, whose
stream NumPy guarantees (NEP 19), unlike those of its generators' methods.
"""

import io

import numpy as np
import tensorflow_datasets as tfds
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from polaformer_jax.data import digits
from polaformer_jax.data.segmentation.tfds_source import metadata

CLASSES = ("background", *map(str, range(10)))
SCENES = {"train": 2400, "test": 200}
SIZES = ((64, 96), (96, 128), (128, 64))  # (height, width), multiples of a cell

_CELL = 32  # pixels; each holds a digit, or none once in `_EMPTY` times
_EMPTY = 6
_MARGIN = 1  # of a sticker around the ink, in pixels of the stored digit
_SIDE = (24, 32)  # of a digit with its margin, in pixels: 2.4 to 3.2 times its own 8 + 2
_INK = 16  # of the darkest pixel of a digit
_EDGE = 2  # ink around half of it over which one colour fades into the other
_BACKGROUND, _STICKER, _DIGIT = (70, 160), (0, 40), (200, 255)  # red, green and blue, each
_TEXTURE, _NOISE = 18, 9  # largest changes of the background, and of each value
_GRAIN = 8  # pixels between the points of the texture

_DESCRIPTION = """\
Scenes of handwritten digits (8 by 8 pixels, scikit-learn's copy of the test set of the UCI ML "Optical Recognition of
Handwritten Digits" data set), printed in light colours on dark stickers of 24 to 32 pixels, on textured backgrounds of
64 x 96, 96 x 128 and 128 x 64 pixels (height x width), one at a random place in most cells of 32 x 32. The mask holds 0
for the background and 1 to 10 for the stickers of the digits 0 to 9. 2,400 training scenes of the 1,437 training digits
of `sklearn_digits`, 200 test scenes of its 360 test digits.

Licence of the digits: Creative Commons Attribution 4.0 International (CC BY 4.0); E. Alpaydin and C. Kaynak, UCI
Machine Learning Repository.
"""


class DigitScenes(tfds.core.GeneratorBasedBuilder):
    """Builder of the data set `digit_scenes` (image (h, w, 3) and mask (h, w, 1), uint8 as PNG)."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                    "mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
                }
            ),
            supervised_keys=("image", "mask"),
            homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
            metadata=tfds.core.MetadataDict(metadata(len(CLASSES), class_names=list(CLASSES), reduce_zero_label=False)),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # nothing to download
        return {split: self._examples(split) for split in SCENES}

    def _generate_examples(self):  # the splits' generators are given above
        raise NotImplementedError

    def _examples(self, split: str):
        images, labels = split_digits(split)
        for number in range(SCENES[split]):
            image, mask = scene(images, labels, (list(SCENES).index(split), number))
            yield number, {"image": io.BytesIO(_png(image)), "mask": io.BytesIO(_png(mask))}


def split_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The digits of a split: ink (n, 8, 8) int64 of 0 to 16, and labels (n,)."""
    from sklearn.datasets import load_digits

    found = load_digits()
    test = np.isin(np.arange(len(found.target)), digits.test_indices(found.target))
    chosen = test if split == "test" else ~test
    return found.images[chosen].astype(np.int64), found.target[chosen]


def scene(images: np.ndarray, labels: np.ndarray, seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A scene of some of these digits.

    Args:
        images, labels: see `split_digits`.
        seed: integers that determine the scene.

    Returns:
        The image (h, w, 3) and the mask (h, w), uint8.
    """
    draw = _Draws(seed)
    height, width = SIZES[draw.between(0, len(SIZES) - 1)]
    image = _background(draw, height, width)
    mask = np.zeros((height, width), np.uint8)
    for top, left, side in _boxes(draw, height, width):
        part = np.s_[top : top + side, left : left + side]
        index = draw.between(0, len(labels) - 1)
        ink = np.pad(images[index], _MARGIN)
        sticker, unit = _enlarged(_dilated(ink), (side, side))
        image[part] = _painted(image[part], _colour(draw, _STICKER), sticker, unit)
        image[part] = _painted(image[part], _colour(draw, _DIGIT), *_enlarged(ink, (side, side)))
        mask[part][sticker >= _INK // 2 * unit] = labels[index] + 1
    image += draw.noise(_NOISE, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8), mask


class _Draws:
    """Random integers that depend on the seed only."""

    def __init__(self, seed: tuple[int, ...]):
        self._bits = np.random.PCG64(np.random.SeedSequence(seed))

    def between(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + int(self._bits.random_raw()) % (high - low + 1)

    def noise(self, amplitude: int, shape: tuple[int, ...]) -> np.ndarray:
        """Integers from -amplitude to amplitude, int64."""
        raw = self._bits.random_raw(int(np.prod(shape))) >> np.uint64(32)
        return (raw % np.uint64(2 * amplitude + 1)).astype(np.int64).reshape(shape) - amplitude


def _background(draw: _Draws, height: int, width: int) -> np.ndarray:
    """A gradient between two colours with a texture, (h, w, 3) int64."""
    first, second = _colour(draw, _BACKGROUND), _colour(draw, _BACKGROUND)
    down, right = draw.between(0, 4), draw.between(0, 4)
    place = down * np.arange(height)[:, None] * width + right * np.arange(width) * height  # (h, w)
    most = max(1, (down + right) * height * width)
    gradient = (first * (most - place[..., None]) + second * place[..., None]) // most  # (h, w, 3)
    coarse = draw.noise(_TEXTURE, (height // _GRAIN, width // _GRAIN))
    texture, unit = _enlarged(coarse, (height, width))
    return gradient + (texture // unit)[..., None]


def _colour(draw: _Draws, values: tuple[int, int]) -> np.ndarray:
    return np.array([draw.between(*values) for _ in range(3)])


def _painted(image: np.ndarray, colour: np.ndarray, ink: np.ndarray, unit: int) -> np.ndarray:
    """The image (h, w, 3) with a colour where the ink (h, w) is more than half of the darkest; at half, both alike."""
    share = np.clip((ink - (_INK // 2 - _EDGE) * unit) * 256 // (2 * _EDGE * unit), 0, 256)[..., None]  # of 256
    return (image * (256 - share) + colour * share) // 256


def _dilated(ink: np.ndarray) -> np.ndarray:
    """The most ink in the margin around each pixel."""
    size = 2 * _MARGIN + 1
    return sliding_window_view(np.pad(ink, _MARGIN), (size, size)).max(axis=(2, 3))


def _boxes(draw: _Draws, height: int, width: int) -> list[tuple[int, int, int]]:
    """Boxes (top, left, side), each at a random place within its cell."""
    boxes = []
    for top in range(0, height, _CELL):
        for left in range(0, width, _CELL):
            if draw.between(1, _EMPTY) > 1:
                side = draw.between(*_SIDE)
                boxes.append((top + draw.between(0, _CELL - side), left + draw.between(0, _CELL - side), side))
    return boxes


def _enlarged(values: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, int]:
    """(h, w) integers, bilinearly enlarged to a size and multiplied by a unit; and the unit."""
    unit = 1
    for axis, length in enumerate(size):
        cells = values.shape[axis]
        # Pixel i lies at ((2 i + 1) cells / length - 1) / 2 of the cells' centres; all times 2 length.
        place = np.clip((2 * np.arange(length) + 1) * cells - length, 0, (cells - 1) * 2 * length)
        low, share = np.divmod(place, 2 * length)
        high = np.minimum(low + 1, cells - 1)
        share = share.reshape([-1, 1] if axis == 0 else [1, -1])
        values = values.take(low, axis) * (2 * length - share) + values.take(high, axis) * share
        unit *= 2 * length
    return values, unit


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()
