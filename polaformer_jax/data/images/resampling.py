"""Bicubic resizing, affine maps and mirroring of uint8 RGB images: Pillow's pixels, in a fraction of its time.

The official pipeline runs Pillow's C code, and spends two thirds of its time per training image in these operations.
These loops, compiled by Numba, take the same steps in the same order, so that they give the same values, bit for bit:
Pillow's `Resample.c` (fixed-point weights, 8 bits between the passes) and `Geometry.c` (double precision).

Pillow 13 resizes vertically first where the height shrinks more, and so changes pixels by up to 20 levels; here the
horizontal pass always comes first, as in all versions before, with which the official weights were trained and
evaluated. The values here do not depend on the version of Pillow.
"""

import math

import numpy as np
from absl import logging
from numba import njit

_BITS = 22  # of the fixed-point weights: what 8 bits of a pixel and 2 of headroom leave of 32
_HALF = np.int32(1 << (_BITS - 1))
_SHARPNESS = -0.5  # the parameter a of the cubic kernel, for both uses
_BLOCK = 16  # pixels of a row that are transposed together


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes an image, bicubic and antialiased.

    Args:
        image: (h, w, 3) uint8, neither side zero; any strides.
        size: (height, width) of the result.

    Returns:
        (height, width, 3) uint8: `Image.resize(..., Image.Resampling.BICUBIC)` of Pillow before version 13.
    """
    _check(image)
    if min(*image.shape, *size) < 1:
        raise ValueError(f"resize of {image.shape} to {size}: expected no side of 0")
    return _resize(_transposed(_read_only(image)), *size)


def affine(image: np.ndarray, matrix: tuple[float, ...], fill: tuple[int, int, int]) -> np.ndarray:
    """Applies an affine map, bicubic; the result has the size of the image.

    Args:
        image: (h, w, 3) uint8.
        matrix: (a, b, c, d, e, f): the pixel at (x, y) of the result is taken from (ax + by + c, dx + ey + f).
        fill: the colour of pixels that come from outside.

    Returns:
        (h, w, 3) uint8: `Image.transform(size, AFFINE, matrix, BICUBIC, fillcolor=fill)` of Pillow.
    """
    _check(image)
    image = _read_only(np.ascontiguousarray(image))
    return _affine(image, np.array(matrix, np.float64), np.array(fill, np.uint8))


def rotate(image: np.ndarray, degrees: float, fill: tuple[int, int, int]) -> np.ndarray:
    """Rotates counter-clockwise around the centre: `Image.rotate(degrees, BICUBIC, fillcolor=fill)` of Pillow."""
    height, width = image.shape[:2]
    angle = -math.radians(degrees % 360)
    # To 15 digits, as Pillow rounds them, so that right angles are exact.
    a, b = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return affine(image, (a, b, a * -x + b * -y + x, -b, a, -b * -x + a * -y + y), fill)


def mirror(image: np.ndarray) -> np.ndarray:
    """Mirrors (h, w, 3) uint8 left to right; contiguous. (NumPy takes five times as long for pixels of three bytes.)"""
    _check(image)
    return _mirror(_read_only(np.ascontiguousarray(image)))


def _check(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image of {image.dtype} {image.shape}: expected uint8 (height, width, 3)")


def _read_only(image: np.ndarray) -> np.ndarray:
    """A read-only view: otherwise Numba would compile a function for writeable and again for read-only arrays."""
    view = image.view()
    view.flags.writeable = False
    return view


def _compiled(**options):
    """Compiles a function with Numba, and keeps it on disk where Numba finds a folder for that."""

    def decorate(function):
        try:
            return njit(function, cache=True, nogil=True, **options)
        except RuntimeError as error:  # it can write neither beside this file nor below a home
            logging.log_first_n(
                logging.WARNING,
                "every process compiles its resampling anew, for a few seconds (%s); NUMBA_CACHE_DIR may name a folder",
                1,
                error,
            )
            return njit(function, nogil=True, **options)

    return decorate


@_compiled()
def _weights(before: int, after: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `after` pixels of a line of `before`: where its window begins, how long it is, and its weights."""
    scale = before / after
    stretch = max(scale, 1.0)  # antialiasing: the kernel grows with the pixels
    support = 2 * stretch
    begin, length = np.empty(after, np.int32), np.empty(after, np.int32)
    weights = np.zeros((after, int(math.ceil(support)) * 2 + 1), np.int32)
    kernel = np.empty(weights.shape[1], np.float64)
    for i in range(after):
        centre = (i + 0.5) * scale
        first = max(int(centre - support + 0.5), 0)
        count = min(int(centre + support + 0.5), before) - first
        total = 0.0
        for k in range(count):
            x = abs((k + first - centre + 0.5) * (1.0 / stretch))
            if x < 1:
                kernel[k] = ((_SHARPNESS + 2) * x - (_SHARPNESS + 3)) * x * x + 1
            elif x < 2:
                kernel[k] = (((x - 5) * x + 8) * x - 4) * _SHARPNESS
            else:
                kernel[k] = 0.0
            total += kernel[k]
        for k in range(count):
            weight = kernel[k] / total * (1 << _BITS)
            weights[i, k] = int(weight - 0.5) if weight < 0 else int(weight + 0.5)
        begin[i], length[i] = first, count
    return begin, length, weights


@_compiled()
def _pass(lines: np.ndarray, size: int) -> np.ndarray:
    """Resizes (n, m) uint8 along its first axis, to (size, m): whole lines at a time, so that it is vectorised."""
    count, width = lines.shape
    if size == count:
        return lines
    begin, length, weights = _weights(count, size)
    out = np.empty((size, width), np.uint8)
    total = np.empty(width, np.int32)
    for i in range(size):
        total[:] = _HALF
        first, k = begin[i], 0
        while k + 1 < length[i]:  # two at a time: fewer passes through `total`
            one, two = lines[first + k], lines[first + k + 1]
            weight_one, weight_two = weights[i, k], weights[i, k + 1]
            for j in range(width):
                total[j] += np.int32(one[j]) * weight_one + np.int32(two[j]) * weight_two
            k += 2
        if k < length[i]:
            one, weight_one = lines[first + k], weights[i, k]
            for j in range(width):
                total[j] += np.int32(one[j]) * weight_one
        line = out[i]
        for j in range(width):
            line[j] = min(max(total[j] >> _BITS, 0), 255)
    return out


@_compiled()
def _transposed(image: np.ndarray) -> np.ndarray:
    """(h, w, 3) -> (w, h, 3), contiguous."""
    height, width, _ = image.shape
    out = np.empty((width, height, 3), np.uint8)
    for begin in range(0, width, _BLOCK):
        for y in range(height):
            for x in range(begin, min(begin + _BLOCK, width)):
                for c in range(3):
                    out[x, y, c] = image[y, x, c]
    return out


@_compiled()
def _mirror(image: np.ndarray) -> np.ndarray:
    height, width, _ = image.shape
    out = np.empty((height, width, 3), np.uint8)
    for y in range(height):
        for x in range(width):
            for c in range(3):
                out[y, x, c] = image[y, width - 1 - x, c]
    return out


@_compiled()
def _resize(columns: np.ndarray, height: int, width: int) -> np.ndarray:
    """(w, h, 3) -> (height, width, 3): first along w, then along h."""
    before_width, before_height, _ = columns.shape
    columns = _pass(columns.reshape(before_width, -1), width).reshape(width, before_height, 3)
    rows = _transposed(columns)  # (h, width, 3)
    return _pass(rows.reshape(before_height, -1), height).reshape(height, width, 3)


@_compiled(inline="always")
def _cubic(v1: float, v2: float, v3: float, v4: float, d: float) -> float:
    """Interpolates between v2 and v3, at d in [0, 1)."""
    return v2 + d * ((-v1 + v3) + d * ((2 * (v1 - v2) + v3 - v4) + d * (-v1 + v2 - v3 + v4)))


@_compiled()
def _affine(image: np.ndarray, matrix: np.ndarray, fill: np.ndarray) -> np.ndarray:
    height, width, _ = image.shape
    a, b, c, d, e, f = matrix
    out = np.empty((height, width, 3), np.uint8)
    for row in range(height):
        for column in range(width):
            x = a * (column + 0.5) + b * (row + 0.5) + c
            y = d * (column + 0.5) + e * (row + 0.5) + f
            if not (0 <= x < width and 0 <= y < height):
                for channel in range(3):
                    out[row, column, channel] = fill[channel]
                continue
            x -= 0.5
            y -= 0.5
            x2, y2 = int(math.floor(x)), int(math.floor(y))
            dx, dy = x - x2, y - y2
            # Beyond an edge, its pixels are repeated.
            x1, x3, x4 = max(x2 - 1, 0), min(x2 + 1, width - 1), min(x2 + 2, width - 1)
            y1, y3, y4 = max(y2 - 1, 0), min(y2 + 1, height - 1), min(y2 + 2, height - 1)
            x2, y2 = max(x2, 0), max(y2, 0)
            for channel in range(3):
                # With no fraction on one axis (shearing, translating) the other's four pixels give the same value.
                if dy == 0:
                    v = _across(image, y2, x1, x2, x3, x4, channel, dx)
                elif dx == 0:
                    v = _cubic(
                        float(image[y1, x2, channel]),
                        float(image[y2, x2, channel]),
                        float(image[y3, x2, channel]),
                        float(image[y4, x2, channel]),
                        dy,
                    )
                else:
                    v = _cubic(
                        _across(image, y1, x1, x2, x3, x4, channel, dx),
                        _across(image, y2, x1, x2, x3, x4, channel, dx),
                        _across(image, y3, x1, x2, x3, x4, channel, dx),
                        _across(image, y4, x1, x2, x3, x4, channel, dx),
                        dy,
                    )
                out[row, column, channel] = np.uint8(min(max(v, 0.0), 255.0))
    return out


@_compiled(inline="always")
def _across(image, y, x1, x2, x3, x4, channel, dx) -> float:
    return _cubic(
        float(image[y, x1, channel]),
        float(image[y, x2, channel]),
        float(image[y, x3, channel]),
        float(image[y, x4, channel]),
        dx,
    )
