"""What the project's pictures share: ink, axes, a canvas without a window or global state, and how they are written."""

import io
import os

from etils import epath
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from polaformer_jax.errors import UserError
from polaformer_jax.files import atomic

INK, FAINT = "#1f2933", "#d5dbe1"
SUFFIXES = (".png", ".svg")


def new(width: float, height: float, *, pad: float = 0.1) -> Figure:
    """An empty figure of this size, and with so much room around its parts, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=pad, h_pad=pad)
    return figure


def tidy(axes: Axes) -> None:
    """Leaves out what says nothing, and moves the rest to the background."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(which="both", color=FAINT, labelcolor=INK)
    axes.grid(color=FAINT, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)


def check_name(flag: str, path: epath.PathLike, *, suffixes: tuple[str, ...] = SUFFIXES) -> None:
    """Raises a UserError, before any work, if no picture of such a name can be written."""
    if epath.Path(path).suffix not in suffixes or epath.Path(path).is_dir():
        raise UserError(f"{flag} {os.fspath(path)}: expected the name of a {' or '.join(suffixes)} file")


def save(figure: Figure, path: epath.PathLike) -> None:
    """Writes a PNG or, by its name, an SVG file, whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format=epath.Path(path).suffix[1:], dpi=140, facecolor="white")
    atomic.write(path, content.getvalue())


def save_as_asked(figure: Figure, flag: str, path: epath.PathLike) -> None:
    """The same for a command's option; a UserError names it if the file cannot be written."""
    try:
        save(figure, path)
    except OSError as error:
        raise UserError(f"{flag} {os.fspath(path)} cannot be written: {error}") from error
