"""Curves of Pathfinder: are two discs at the ends of the same dashed curve? `pathfinder_pictures` draws them.

Two target curves of 14 dashes grow in turn from the middle of the picture; shorter curves are distractors. A curve
turns at its pivots, which are in the middle of the gaps, `LENGTH + 2 MARGIN` apart; the direction from a pivot is drawn
with weights cos²(min(CONTINUITY |turn|, 90°)) among those that lead into free space. If a target curve gets stuck, the
whole picture is started again; a distractor that gets stuck is tried elsewhere, and finally omitted.

Source: Linsley et al., "Learning long-range spatial dependencies with horizontal gated recurrent units" (arXiv
1805.08315) and Tay et al. (arXiv 2011.04006), the hard set at 32 x 32.

Picture i is a function of (seed, i). Many pictures are grown at once in arrays, each with its own stream of random
numbers. Directions are whole steps on a circle, so that rounding gives the same result on all machines.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

SIDE = 32  # pixels; all lengths below are in pixels
DASHES = 14
DISTRACTORS, DISTRACTOR_DASHES = 5, 4
LENGTH, MARGIN = 2.0, 1.0
SEED_DISTANCE = 7.0
CONTINUITY = 1.0
STEPS = 64  # directions on the circle

_STRIDE = LENGTH + 2 * MARGIN
_CELLS = 3  # cells of the map of free space per pixel, along each axis
_PHASES = 3  # positions distinguished within a cell, along each axis
_BORDER = 4  # pixels around the picture that the map includes; a dash that is tried may reach this far
_MAP = (SIDE + 2 * _BORDER) * _CELLS
CLEARANCE = 1.5  # between any two dashes except neighbours on a curve, to the precision of the map's cells
RIM = 1.0  # distance of dashes from the edge of the picture
_SEVERAL = 255  # in the map: near more than one dash
_TRIES = 12  # places tried for a distractor

_ANGLES = [2 * math.pi * step / STEPS for step in range(STEPS)]
_UNIT = np.array([(math.cos(angle), math.sin(angle)) for angle in _ANGLES])  # (STEPS, 2) x and y
_TURNS = np.arange(-STEPS // 4 + 1, STEPS // 4)  # a turn of 90 degrees has no weight
_WEIGHTS = np.array(
    [math.cos(min(CONTINUITY * abs(2 * math.pi * turn / STEPS), math.pi / 2)) ** 2 for turn in _TURNS.tolist()]
)
_ON_DASH = np.array([0.0, 0.5, 1.0]) * LENGTH + MARGIN  # points that must be free, from the pivot before the dash
_REACH_X, _REACH_Y = (_UNIT[:, axis, None] * _ON_DASH for axis in (0, 1))  # (STEPS, points)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Curves(NamedTuple):
    """What n pictures show; positions are (x, y) in pixels from the upper left corner of the picture.

    Attributes:
        labels: (n,) bool, whether the discs are at the ends of the same curve.
        targets: (n, 2, DASHES, 2, 2): curve, dash, its start and end, x and y.
        distractors: (n, DISTRACTORS, DISTRACTOR_DASHES, 2, 2), NaN where one is omitted.
        discs: (n, 2, 2): the disc at the end of curve `marked`, then the one at the start of a curve.
        marked: (n,) the target curve that ends in the first disc.
        restarts: (n,) how often the picture was started again.
    """

    labels: np.ndarray
    targets: np.ndarray
    distractors: np.ndarray
    discs: np.ndarray
    marked: np.ndarray
    restarts: np.ndarray


def grow(seed: int, indices: np.ndarray) -> Curves:
    """The curves of the pictures with these indices."""
    canvas = _Canvas(seed, np.asarray(indices, np.uint64))
    everyone = np.arange(len(indices))
    # Drawn once: a restart must not favour the label of pictures that are easy to draw.
    coins = canvas.uniform(everyone, 2) < 0.5
    labels, marked = coins[:, 0], coins[:, 1].astype(np.int64)
    targets, restarts = _grow_targets(canvas, everyone)
    distractors = [_grow_distractor(canvas, everyone, number) for number in range(DISTRACTORS)]
    begun = np.where(labels, marked, 1 - marked)
    discs = np.stack([targets[everyone, marked, -1, 1], targets[everyone, begun, 0, 0]], axis=1)
    return Curves(labels, targets, np.stack(distractors, axis=1), discs, marked, restarts)


class _Canvas:
    """The occupied space and the random numbers of many pictures. `who` holds indices of pictures on the canvas."""

    def __init__(self, seed: int, indices: np.ndarray):
        blank = np.full((_MAP, _MAP), _SEVERAL, np.uint8)
        rim = int((_BORDER + RIM) * _CELLS)
        blank[rim:-rim, rim:-rim] = 0
        self._blank = blank.reshape(-1)
        # (pictures, cells), row by row: 0, or the number of the dash that is near.
        self._cells = np.tile(self._blank, (len(indices), 1))
        self._state = _mix(_mix(np.full(len(indices), seed % 2**64, np.uint64)) + indices)

    def uniform(self, who: np.ndarray, count: int) -> np.ndarray:
        """(who, count) the next numbers in [0, 1) of each picture's stream: Steele et al., "SplitMix" (2014)."""
        steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        bits = _mix(self._state[who, None] + steps[None, :])
        self._state[who] += steps[-1]
        return (bits >> np.uint64(11)) * 2.0**-53

    def clear(self, who: np.ndarray) -> None:
        self._cells[who] = self._blank

    def copy(self, who: np.ndarray) -> np.ndarray:
        return self._cells[who]

    def restore(self, who: np.ndarray, cells: np.ndarray) -> None:
        self._cells[who] = cells

    def is_free(self, who: np.ndarray, pivots: np.ndarray, ways: np.ndarray, before: np.ndarray | int) -> np.ndarray:
        """(who, w): is there space for dashes from pivots (who, 2) in directions (who, w), after dashes `before`?"""
        x, y = ((pivots + _BORDER) * _CELLS).T[:, :, None, None]
        columns = (x + _REACH_X[ways] * _CELLS).astype(np.int64)  # (who, w, points)
        rows = (y + _REACH_Y[ways] * _CELLS).astype(np.int64)
        near = self._cells.reshape(-1)[(who[:, None, None] * _MAP + rows) * _MAP + columns]
        return ((near == 0) | (near == np.reshape(before, (-1, 1, 1)))).all(axis=-1)

    def take(self, who: np.ndarray, pivots: np.ndarray, ways: np.ndarray, numbers: np.ndarray) -> None:
        """Marks the cells that are near dashes from pivots (who, 2) in directions (who,) with the dashes' numbers."""
        x, y = ((pivots + _BORDER) * _CELLS).T
        column, row = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
        phase = (((y - row) * _PHASES).astype(np.int64), ((x - column) * _PHASES).astype(np.int64))
        origin = (who * _MAP + row) * _MAP + column
        at = origin[:, None] + _stamps()[ways, *phase]
        cells = self._cells.reshape(-1)
        cells[at] = np.where(cells[at] == 0, numbers[:, None], _SEVERAL)

    def turn(
        self, who: np.ndarray, pivots: np.ndarray, headings: np.ndarray, before: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws new directions at pivots (who, 2), and returns them with whether a free one existed."""
        ways = (headings[:, None] + _TURNS) % STEPS  # (who, turns)
        weights = np.cumsum(_WEIGHTS * self.is_free(who, pivots, ways, before), axis=1)
        at = self.uniform(who, 1) * weights[:, -1:]
        chosen = np.minimum((weights <= at).sum(axis=1), len(_TURNS) - 1)
        return ways[np.arange(len(who)), chosen], weights[:, -1] > 0


@functools.cache
def _stamps() -> np.ndarray:
    """(STEPS, PHASES, PHASES, k) cells near a dash, from the cell of its pivot, by direction and y and x within a cell.

    Cells are tested at their centres; where there are fewer than k, one of them is repeated.
    """
    reach = math.ceil((MARGIN + LENGTH + CLEARANCE) * _CELLS) + 1
    window = np.arange(-reach, reach + 1)
    within = (np.arange(_PHASES) + 0.5) / _PHASES
    along = (window + 0.5 - within[:, None]) / _CELLS  # (phase, W) in pixels from the pivot
    dx, dy = along[None, None, :, None, :], along[None, :, None, :, None]
    ux, uy = (_UNIT[:, axis, None, None, None, None] for axis in (0, 1))
    forward, across = dx * ux + dy * uy, dy * ux - dx * uy  # (STEPS, phase y, phase x, W, W)
    beyond = forward - np.clip(forward, MARGIN, MARGIN + LENGTH)
    near = beyond**2 + across**2 < CLEARANCE**2
    offsets = window[:, None] * _MAP + window
    found = [offsets[one] for one in near.reshape(-1, *near.shape[-2:])]
    most = max(map(len, found))
    padded = [np.pad(one, (0, most - len(one)), mode="edge") for one in found]
    return np.array(padded).reshape(*near.shape[:3], most)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _dashes(pivots: np.ndarray, headings: np.ndarray) -> np.ndarray:
    """(..., 2, 2) start and end of the dashes from these pivots."""
    return pivots[..., None, :] + _UNIT[headings][..., None, :] * _ON_DASH[[0, -1], None]


def _grow_targets(canvas: _Canvas, everyone: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    count = len(everyone)
    pivots, headings = np.zeros((count, 2, DASHES, 2)), np.zeros((count, 2, DASHES), np.int64)
    grown, restarts = np.zeros(count, np.int64), np.zeros(count, np.int64)  # dashes of both curves together
    active = everyone
    while len(active):
        new = active[grown[active] == 0]
        canvas.clear(new)
        _plant(canvas.uniform(new, 5), new, pivots, headings)
        curve, dash = grown[active] % 2, grown[active] // 2
        good = np.empty(len(active), bool)
        first = dash == 0  # it already has a direction, but that of curve 2 may run into curve 1
        who, at = active[first], curve[first]
        good[first] = canvas.is_free(who, pivots[who, at, 0], headings[who, at, 0][:, None], 0)[:, 0]
        who, at, now = active[~first], curve[~first], dash[~first]
        heading = headings[who, at, now - 1]
        pivots[who, at, now] = pivots[who, at, now - 1] + _STRIDE * _UNIT[heading]
        before = grown[who] - 1  # a dash's number is its place in the order of drawing, from 1; curves take turns
        headings[who, at, now], good[~first] = canvas.turn(who, pivots[who, at, now], heading, before)
        who, at, now = active[good], curve[good], dash[good]
        grown[who] += 1
        canvas.take(who, pivots[who, at, now], headings[who, at, now], grown[who])
        restarts[active[~good]] += 1
        grown[active[~good]] = 0
        active = active[grown[active] < 2 * DASHES]
    return _dashes(pivots, headings), restarts


def _plant(draws: np.ndarray, who: np.ndarray, pivots: np.ndarray, headings: np.ndarray) -> None:
    """Sets where curves start, from five random numbers per picture."""
    low = 2 * SEED_DISTANCE
    tail = low + draws[:, :2] * (SIDE - 2 * low)
    away, *own = (draws[:, 2:] * STEPS).astype(np.int64).T
    for curve, begin in enumerate((tail, tail + SEED_DISTANCE * _UNIT[away])):
        headings[who, curve, 0] = own[curve]
        pivots[who, curve, 0] = begin - MARGIN * _UNIT[own[curve]]


def _grow_distractor(canvas: _Canvas, everyone: np.ndarray, number: int) -> np.ndarray:
    """(n, DISTRACTOR_DASHES, 2, 2) one more distractor in each picture, NaN where no place was found for it."""
    found = np.full((len(everyone), DISTRACTOR_DASHES, 2, 2), np.nan)
    missing = everyone
    for _ in range(_TRIES):
        cells, draws = canvas.copy(missing), canvas.uniform(missing, 3)
        pivots, headings = RIM + draws[:, :2] * (SIDE - 2 * RIM), (draws[:, 2] * STEPS).astype(np.int64)
        grown = np.zeros((len(missing), DISTRACTOR_DASHES, 2, 2))
        alive = canvas.is_free(missing, pivots, headings[:, None], 0)[:, 0]
        for dash in range(DISTRACTOR_DASHES):
            at = np.flatnonzero(alive)
            label = 2 * DASHES + 1 + number * DISTRACTOR_DASHES + dash
            if dash:
                pivots[at] += _STRIDE * _UNIT[headings[at]]
                before = np.full(len(at), label - 1)
                headings[at], alive[at] = canvas.turn(missing[at], pivots[at], headings[at], before)
                at = np.flatnonzero(alive)
            grown[at, dash] = _dashes(pivots[at], headings[at])
            canvas.take(missing[at], pivots[at], headings[at], np.full(len(at), label))
        found[missing[alive]] = grown[alive]
        canvas.restore(missing[~alive], cells[~alive])
        missing = missing[~alive]
    return found
