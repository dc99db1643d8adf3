"""Time and memory against the number of tokens, as a picture with logarithmic axes."""

import itertools
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from polaformer_jax.benchmark.programs import GIB
from polaformer_jax.benchmark.sweep import Point
from polaformer_jax.files import figures
from polaformer_jax.files.figures import INK

COLOURS = {"polarity": "#2364aa", "relu": "#9aa5b1", "softmax": "#c8382c"}
NAMES = {"relu": "relu (linear)"}


def draw(
    points: Sequence[Point], *, modes: Sequence[str], attentions: Sequence[str], crossovers: Mapping[str, int | None]
) -> Figure:
    """Milliseconds above, memory below, a column for each mode.

    Args:
        points: those that were skipped are not drawn.
        crossovers: for each mode, the length marked by a dotted line; None: no line.
    """
    figure = figures.new(5.2 * len(modes), 7)
    grid = figure.subplots(2, len(modes), squeeze=False, sharex=True, sharey="row")
    lengths = sorted({point.tokens for point in points})
    for (row, title), (column, mode) in itertools.product(enumerate(("time", "memory")), enumerate(modes)):
        axes = grid[row][column]
        figures.logarithmic(axes, lengths)
        axes.set_title(f"{mode}: {title}", loc="left", color=INK, fontweight="bold")
        for attention in attentions:
            values = {
                point.tokens: 1e3 * point.timing.median if row == 0 else point.program.memory / GIB
                for point in points
                if (point.attention, point.mode) == (attention, mode) and point.timing is not None
            }
            axes.plot(
                list(values),
                list(values.values()),
                color=COLOURS[attention],
                label=NAMES.get(attention, attention),
                linewidth=1.8,
                marker="o",
                markersize=4,
            )
        if row == 0 and crossovers[mode] is not None:
            axes.axvline(crossovers[mode], color=COLOURS["polarity"], linewidth=0.9, linestyle=":")
            axes.set_title(f"polarity faster: {crossovers[mode]:,}", loc="right", color=COLOURS["polarity"], fontsize=9)
    grid[0][0].set_ylabel("ms per batch (median)", color=INK)
    grid[1][0].set_ylabel("GiB, as reported by the compiler", color=INK)
    for axes in grid[1]:
        axes.set_xlabel("tokens", color=INK)
    grid[0][0].legend(loc="upper left", frameon=False, labelcolor=INK)
    return figure
