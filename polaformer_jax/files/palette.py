"""Colours of classes, in pictures of segmented images."""

import colorsys

import numpy as np

UNLABELLED = (0, 0, 0)
# Of the first classes: of different hue and lightness, readable with the common colour-vision deficiencies (Okabe and
# Ito, 2008, and lighter and darker ones between them).
_FIRST = (
    *((144, 155, 166), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0)),
    *((204, 121, 167), (122, 78, 45), (148, 226, 170), (88, 60, 160)),
)


def palette(classes: int) -> np.ndarray:
    """(classes, 3) uint8 RGB; the colours of the first classes do not depend on how many there are."""
    colours = list(_FIRST[:classes])
    for i in range(len(colours), classes):
        hue, step = (i * 0.618033988749895) % 1, i // 3
        red, green, blue = colorsys.hsv_to_rgb(hue, (0.55, 0.8, 0.95)[i % 3], (0.95, 0.75, 0.55)[step % 3])
        colours.append(tuple(round(255 * x) for x in (red, green, blue)))
    return np.array(colours, np.uint8).reshape(-1, 3)


def coloured(labels: np.ndarray, classes: int) -> np.ndarray:
    """Labels (h, w), in which numbers from `classes` on mean none -> colours (h, w, 3) uint8."""
    table = np.vstack([palette(classes), np.array([UNLABELLED], np.uint8)])
    return table[np.minimum(labels, classes)]
