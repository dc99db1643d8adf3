"""What all pictures share: colours, axes, a canvas without a window or global state, and how they are written."""

import io
import os
import warnings
from collections.abc import Sequence

import matplotlib
from etils import epath
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from polaformer_jax.errors import UserError
from polaformer_jax.files import atomic, names, paths

INK, FAINT = "#1f2933", "#d5dbe1"
# Of attentions; "same" and "opposite" are the streams of polarity-aware attention.
ATTENTION_COLOURS = {"polarity": "#2364aa", "same": "#2364aa", "opposite": "#73bfb8"}
ATTENTION_COLOURS |= {"relu": "#e09f3e", "softmax": "#c8382c"}
SUFFIXES = (".png", ".svg")


def new(width: float, height: float, *, pad: float = 0.1) -> Figure:
    """An empty figure of this size, with padding `pad` around its parts, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=pad, h_pad=pad)
    return figure


def tidy(axes: Axes) -> None:
    """Removes what carries no information, and moves the rest to the background."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(which="both", color=FAINT, labelcolor=INK)
    axes.grid(color=FAINT, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)


def logarithmic(axes: Axes, ticks: Sequence[float]) -> None:
    """Tidy axes, both logarithmic, with these ticks below, and numbers in full."""
    tidy(axes)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def plain(name: str) -> str:
    """A name from outside as text of a picture: escaped (see `names.shown`), and never read as a formula."""
    return names.shown(name).replace("$", r"\$")


def check_name(path: epath.PathLike, argument: str, *, suffixes: tuple[str, ...] = SUFFIXES) -> None:
    """Raises a UserError, before any work, if a picture of this name, the value of `argument`, cannot be written."""
    path = paths.given(path, argument)
    if path.suffix not in suffixes or path.is_dir():
        raise UserError(f"picture {os.fspath(path)!r}: expected the name of a {' or '.join(suffixes)} file")
    atomic.check_target(path, "picture", argument=argument)


def save(figure: Figure, path: epath.PathLike) -> None:
    """Writes a PNG or, by its suffix, an SVG file, completely or not at all. The same figure gives the same file.

    Raises:
        UserError: the file cannot be written.
    """
    content, kind = io.BytesIO(), paths.given(path).suffix[1:]
    # Without a time, and with names of the parts of an SVG file that are not random.
    options = {"metadata": {"Date": None}} if kind == "svg" else {}
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "polaformer_jax"}):
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a box is drawn in its place
        figure.savefig(content, format=kind, dpi=140, facecolor="white", **options)
    with atomic.reported("picture", path):
        atomic.write(path, content.getvalue())
