"""Time and memory of a segmenter against the size of its images, as a picture with logarithmic axes."""

import itertools
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from polaformer_jax.benchmark.image_size_case import ATTENTIONS, MODES, Row, measured
from polaformer_jax.benchmark.programs import GIB
from polaformer_jax.files import figures
from polaformer_jax.files.figures import INK

COLOURS = {"polarity": "#2364aa", "softmax": "#c8382c", "softmax_reduced": "#e39a2d"}
MARKERS = {"polarity": "o", "softmax": "s", "softmax_reduced": "^"}
NAMES = {
    "polarity": "polarity (linear)",
    "softmax": "softmax, all keys",
    "softmax_reduced": "softmax, keys reduced as in PVT",
}
_FAINT = "#8a95a1"
_GUIDES = {1: ("as the pixels", ":"), 2: ("as their square", "-.")}  # by the power of the number of pixels


def draw(rows: Sequence[Row]) -> Figure:
    """Milliseconds above, memory below, a column for each mode.

    Filled marks were run. Hollow ones were not: the compiler reports that they need more memory than the limit.
    """
    modes = [mode for mode in MODES if any(row.case.mode == mode for row in rows)]
    attentions = [name for name in ATTENTIONS if any(row.case.attention == name for row in rows)]
    sizes = sorted({row.case.img_size for row in rows})
    figure = figures.new(5.2 * len(modes), 7.6)
    grid = figure.subplots(2, len(modes), squeeze=False, sharex=True, sharey="row")
    for (row, title), (column, mode) in itertools.product(enumerate(("time", "memory")), enumerate(modes)):
        axes = grid[row][column]
        figures.logarithmic(axes, sizes)
        axes.set_title(f"{mode}: {title}", loc="left", color=INK, fontweight="bold")
        for name in attentions:
            _line(axes, measured(rows, mode, name), name, memory=row == 1)
    for axes in grid[1]:
        limit = rows[0].program.limit / GIB
        axes.axhline(limit, color=_FAINT, linewidth=0.9)
        axes.text(sizes[0], 1.1 * limit, f"limit: {limit:,.3g} GiB", color=_FAINT, fontsize=9, va="bottom")
        axes.set_xlabel("side of the image in pixels", color=INK)
    for axes in grid.flat:
        _guides(axes, sizes)
    grid[0][0].set_ylabel("ms per image (median)", color=INK)
    grid[1][0].set_ylabel("GiB, as reported by the compiler", color=INK)
    grid[0][0].legend(loc="upper left", frameon=False, labelcolor=INK, fontsize=9)
    return figure


def _line(axes: Axes, rows: Sequence[Row], name: str, *, memory: bool) -> None:
    style = {"color": COLOURS[name], "marker": MARKERS[name], "markersize": 5, "linewidth": 1.8}
    ran = [row for row in rows if row.timing is not None]
    values = [row.program.memory / GIB if memory else 1e3 * row.timing.median for row in ran]
    axes.plot([row.case.img_size for row in ran], values, label=NAMES[name], **style)
    left_out = [row for row in rows if row.timing is None and row.program.memory is not None]
    if memory and left_out:
        shown = ran[-1:] + left_out  # from the last that was run
        values = [row.program.memory / GIB for row in shown]
        hollow = {"markerfacecolor": "white", "linestyle": "--", "zorder": 1.9}
        axes.plot([row.case.img_size for row in shown], values, **{**style, **hollow, "linewidth": 1.2})


def _guides(axes: Axes, sizes: Sequence[int]) -> None:
    """Lines of constant slope, from the lower left corner of what is drawn, whose limits stay as they are."""
    low, high = axes.get_ylim()
    for power, (label, style) in _GUIDES.items():
        values = [1.3 * low * (size / sizes[0]) ** (2 * power) for size in sizes]
        axes.plot(sizes, values, color=_FAINT, linestyle=style, linewidth=1, label=label, zorder=1.5)
    axes.set_ylim(low, high)
