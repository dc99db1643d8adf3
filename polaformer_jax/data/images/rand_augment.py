"""RandAugment as in timm's "increasing" variant, which the official recipe uses.

Source: Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space", 2020 (arXiv
1909.13719); operations and constants from timm. Policies use timm's notation: `rand-m9-mstd0.5-inc1`. Each operation is
a function `(image, magnitude, sign) -> image` of (h, w, 3) uint8 arrays: magnitudes run from 0 to 10, and a larger one
always changes the image more. Pixel values are those of Pillow's own operations.
"""

import dataclasses
import functools
import re
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from polaformer_jax.data.images import resampling
from polaformer_jax.errors import UserError

FILL = (124, 116, 104)  # colour of pixels from outside the image: ImageNet's mean
MAX_MAGNITUDE = 10.0

_Op = Callable[[np.ndarray, float, float], np.ndarray]


def _pillow(op: Callable[[Image.Image, float, float], Image.Image]) -> _Op:
    """Turns an operation on Pillow images into one on arrays."""

    @functools.wraps(op)
    def on_arrays(image: np.ndarray, magnitude: float, sign: float) -> np.ndarray:
        return np.asarray(op(Image.fromarray(image), magnitude, sign))

    return on_arrays


@_pillow
def _auto_contrast(image: Image.Image, magnitude: float, sign: float) -> Image.Image:
    return ImageOps.autocontrast(image)


@_pillow
def _equalize(image: Image.Image, magnitude: float, sign: float) -> Image.Image:
    return ImageOps.equalize(image)


@_pillow
def _invert(image: Image.Image, magnitude: float, sign: float) -> Image.Image:
    return ImageOps.invert(image)


# Every constant below is computed as (magnitude / 10) * c, in this order: another order rounds differently.


@_pillow
def _posterize(image: Image.Image, magnitude: float, sign: float) -> Image.Image:
    bits = 4 - int((magnitude / 10) * 4)
    # At magnitude 10, one draw in 44 of the official policy, no bit is left: black. Pillow (13) rejects 0 bits.
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


@_pillow
def _solarize(image: Image.Image, magnitude: float, sign: float) -> Image.Image:
    return ImageOps.solarize(image, 256 - int((magnitude / 10) * 256))


@_pillow
def _solarize_add(image: Image.Image, magnitude: float, sign: float) -> Image.Image:
    """Adds to values below 128."""
    added = int((magnitude / 10) * 110)
    return image.point([min(255, value + added) if value < 128 else value for value in range(256)] * 3)


def _enhance(enhancer: type) -> _Op:
    @_pillow
    def op(image: Image.Image, magnitude: float, sign: float) -> Image.Image:
        return enhancer(image).enhance(1 + sign * ((magnitude / 10) * 0.9))

    return op


def _rotate(image: np.ndarray, magnitude: float, sign: float) -> np.ndarray:
    return resampling.rotate(image, sign * ((magnitude / 10) * 30), FILL)


def _shear_x(image: np.ndarray, magnitude: float, sign: float) -> np.ndarray:
    return resampling.affine(image, (1, sign * ((magnitude / 10) * 0.3), 0, 0, 1, 0), FILL)


def _shear_y(image: np.ndarray, magnitude: float, sign: float) -> np.ndarray:
    return resampling.affine(image, (1, 0, 0, sign * ((magnitude / 10) * 0.3), 1, 0), FILL)


def _translate_x(image: np.ndarray, magnitude: float, sign: float) -> np.ndarray:
    return resampling.affine(image, (1, 0, sign * ((magnitude / 10) * 0.45) * image.shape[1], 0, 1, 0), FILL)


def _translate_y(image: np.ndarray, magnitude: float, sign: float) -> np.ndarray:
    return resampling.affine(image, (1, 0, 0, 0, 1, sign * ((magnitude / 10) * 0.45) * image.shape[0]), FILL)


OPS: dict[str, _Op] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """One drawn operation.

    Attributes:
        op: a key of `OPS`.
        applied: False leaves the image unchanged.
        magnitude: 0 to 10.
        sign: +1 or -1: the direction, for the operations that have two.
    """

    op: str
    applied: bool
    magnitude: float
    sign: float

    def __call__(self, image: np.ndarray) -> np.ndarray:
        return OPS[self.op](image, self.magnitude, self.sign) if self.applied else image


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandAugment:
    """A few operations drawn at random, one after the other: `augment(image, rng) -> image`, (h, w, 3) uint8.

    Args:
        magnitude: mean strength of an operation, 0 to 10.
        std: standard deviation of the strength, which is drawn for each operation and clipped to [0, 10].
        num_ops: number of operations drawn per image, with replacement.
        probability: probability that each of them is applied.
        ops: names of the operations to draw from.
    """

    magnitude: float
    std: float = 0.0
    num_ops: int = 2
    probability: float = 0.5
    ops: tuple[str, ...] = tuple(OPS)

    def __post_init__(self):
        if not 0 <= self.magnitude <= MAX_MAGNITUDE:
            raise UserError(f"RandAugment's magnitude (m) is {self.magnitude}, expected 0 to {MAX_MAGNITUDE:g}")
        if not 0 <= self.std < 100:
            # In timm, 100 and more selects another distribution, the uniform one.
            raise UserError(f"RandAugment's standard deviation (mstd) is {self.std}, expected 0 to below 100")
        if not 0 <= self.probability <= 1:
            raise UserError(f"RandAugment's p is {self.probability}, expected a probability")
        if self.num_ops < 1:
            raise UserError(f"RandAugment's number of operations (n) is {self.num_ops}, expected at least 1")
        unknown = [op for op in self.ops if op not in OPS]
        if unknown or not self.ops:
            raise UserError(f"RandAugment has no operations {unknown}, expected some of: {', '.join(OPS)}")

    @classmethod
    def parse(cls, policy: str) -> "RandAugment":
        """Reads a policy such as `rand-m9-mstd0.5-inc1`.

        Args:
            policy: `rand`, then parts in any order: `m` magnitude (required), `mstd` its standard deviation (0), `n`
                operations per image (2), `p` probability of each (0.5), `inc1` (required) for operations whose effect
                always grows with the magnitude.

        Raises:
            UserError: names the part that is not understood, out of range, given twice or missing.
        """
        understood = "expected rand-mMAGNITUDE[-mstdX][-nCOUNT][-pPROBABILITY]-inc1, e.g. rand-m9-mstd0.5-inc1"
        head, *parts = policy.split("-") if isinstance(policy, str) else [policy]
        if head != "rand":
            raise UserError(f"RandAugment policy {policy!r} does not begin with 'rand': {understood}")
        values: dict[str, float] = {}
        for part in parts:
            match = re.fullmatch(r"(mstd|inc|m|n|p)(\d+\.?\d*|\.\d+)", part, re.ASCII)
            if not match or (match[1] == "n" and not match[2].isdigit()):
                raise UserError(f"RandAugment policy {policy!r}: part {part!r} is not understood; {understood}")
            if match[1] in values:
                raise UserError(f"RandAugment policy {policy!r} has {match[1]!r} twice; {understood}")
            values[match[1]] = float(match[2])
        if values.pop("inc", 0) != 1:
            raise UserError(
                f"RandAugment policy {policy!r}: only increasing operations are implemented, add -inc1; {understood}"
            )
        if "m" not in values:
            raise UserError(f"RandAugment policy {policy!r} has no magnitude; {understood}")
        return cls(
            magnitude=values["m"],
            std=values.get("mstd", 0.0),
            num_ops=int(values.get("n", 2)),
            probability=values.get("p", 0.5),
        )

    def draw(self, rng: np.random.Generator) -> list[Choice]:
        """Draws the operations for an image: four numbers each, in a fixed order, whether applied or not."""
        return [self._draw_one(rng) for _ in range(self.num_ops)]

    def _draw_one(self, rng: np.random.Generator) -> Choice:
        op = self.ops[int(rng.integers(len(self.ops)))]
        applied = rng.random() < self.probability
        magnitude = min(max(self.magnitude + self.std * rng.standard_normal(), 0.0), MAX_MAGNITUDE)
        return Choice(op=op, applied=applied, magnitude=magnitude, sign=1.0 if rng.random() < 0.5 else -1.0)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        for choice in self.draw(rng):
            image = choice(image)
        return image
