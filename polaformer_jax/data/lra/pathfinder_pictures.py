"""Draws Pathfinder's curves as 32 x 32 grey pictures, light on black, and makes its examples.

Antialiasing is by drawing at twice the resolution, with soft edges there, and averaging. A dash of half a pixel's
thickness covers at most half of a pixel; the contrast of the curves (2) scales that to full intensity, and the contrast
of a dash (0.75) keeps it below the discs. Sources as in `pathfinder`.
"""

import math
from typing import NamedTuple

import numpy as np

from polaformer_jax.data.lra import pathfinder
from polaformer_jax.data.lra.pathfinder import LENGTH, SIDE, Curves

THICKNESS = 0.5
ANTIALIAS = 2
SNAKE_CONTRAST, PADDLE_CONTRAST = 2.0, 0.75
DISC_RADIUS = 1.5
BLOCK = 500  # pictures made at once; the result does not depend on it


class Examples(NamedTuple):
    """Examples in the order of their indices.

    Attributes:
        images: (n, SIDE, SIDE) uint8.
        labels: (n,) uint8, 1 where the discs are at the ends of the same curve.
        curves: what was drawn.
    """

    images: np.ndarray
    labels: np.ndarray
    curves: Curves


def make_examples(seed: int, indices: np.ndarray) -> Examples:
    """The examples with these indices; example i is a function of (seed, i)."""
    curves = pathfinder.grow(seed, indices)
    return Examples(draw(curves), curves.labels.astype(np.uint8), curves)


def draw(curves: Curves) -> np.ndarray:
    """(n, SIDE, SIDE) uint8."""
    count = len(curves.labels)
    dashes = np.concatenate([curves.targets.reshape(count, -1, 2, 2), curves.distractors.reshape(count, -1, 2, 2)], 1)
    picture, which = np.nonzero(~np.isnan(dashes[:, :, 0, 0]))
    lines = coverage(count, picture, dashes[picture, which], THICKNESS / 2, LENGTH)
    discs = np.repeat(curves.discs.reshape(-1, 1, 2), 2, axis=1)  # lines of zero length
    blobs = coverage(count, np.repeat(np.arange(count), 2), discs, DISC_RADIUS, 0.0)
    light = np.maximum(np.minimum(SNAKE_CONTRAST * PADDLE_CONTRAST * lines, 1.0), blobs)
    return np.rint(255 * light).astype(np.uint8)


def coverage(count: int, picture: np.ndarray, lines: np.ndarray, radius: float, length: float) -> np.ndarray:
    """(count, SIDE, SIDE) how much of each pixel is within `radius` of one of the lines (m, 2, 2) of its picture."""
    fine, edge = SIDE * ANTIALIAS, 0.5 / ANTIALIAS  # coverage falls from 1 to 0 between `edge` inside and outside
    begins = lines[:, 0]
    unit = (lines[:, 1] - begins) / length if length else np.zeros_like(begins)
    window = np.arange(math.ceil((length + 2 * (radius + edge)) * ANTIALIAS) + 1)
    low = np.floor((lines.min(axis=1) - radius - edge) * ANTIALIAS).astype(np.int64)  # (m, 2)
    columns, rows = (low[:, axis, None] + window for axis in (0, 1))  # (m, W)
    dx = ((columns + 0.5) / ANTIALIAS - begins[:, 0, None])[:, None, :]
    dy = ((rows + 0.5) / ANTIALIAS - begins[:, 1, None])[:, :, None]
    ux, uy = unit[:, 0, None, None], unit[:, 1, None, None]
    along, across = dx * ux + dy * uy, dy * ux - dx * uy  # (m, W, W); a line of zero length has no direction
    distance = np.hypot(along - np.clip(along, 0, length), across) if length else np.hypot(*np.broadcast_arrays(dx, dy))
    covered = np.clip((radius + edge - distance) / (2 * edge), 0, 1)
    line, row, column = np.nonzero(covered)
    y, x = rows[line, row], columns[line, column]
    inside = (x >= 0) & (x < fine) & (y >= 0) & (y < fine)
    canvas = np.zeros(count * fine * fine)
    at = (picture[line] * fine + y) * fine + x
    np.maximum.at(canvas, at[inside], covered[line, row, column][inside])
    return canvas.reshape(count, SIDE, ANTIALIAS, SIDE, ANTIALIAS).mean(axis=(2, 4))
