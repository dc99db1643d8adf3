"""The memory traffic of a compiled training step as a picture."""

import math

from matplotlib.figure import Figure

from polaformer_jax.aot.attribution import WITHOUT_PASSES, Traffic
from polaformer_jax.aot.compiling import Program
from polaformer_jax.files import figures

GIB = 2**30
LEAST = 0.005  # of all traffic: parts with less are left out
FORWARD, BACKWARD, OUTSIDE, PADDING = "#0072b2", "#e69f00", "#909ba6", "#d5dbe1"


def traffic(program: Program) -> Figure:
    """A bar for each part of the model, in GiB per step and chip: forward, backward, and what of both is padding."""
    parts: dict[str, list[Traffic]] = {}
    for row in program.traffic:  # the parts that move most first
        parts.setdefault(row.module, []).append(row)
    parts = {name: rows for name, rows in parts.items() if sum(row.bytes for row in rows) >= LEAST * program.moved}
    figure = figures.new(7.2, 1.2 + 0.32 * max(len(parts), 1))
    axes = figure.subplots()
    figures.tidy(axes)
    axes.grid(visible=False, axis="y")
    labels: set[str] = set()
    for place, rows in enumerate(parts.values()):
        start = 0.0
        lengths = [(*_kind(row), row.bytes - row.padding) for row in sorted(rows, key=lambda row: row.backward)]
        for label, colour, length in (*lengths, ("padding of tiles", PADDING, sum(row.padding for row in rows))):
            if not length:
                continue
            shown = "_" + label if label in labels else label  # in the legend once
            labels.add(label)
            axes.barh(place, length / GIB, left=start / GIB, height=0.72, color=colour, label=shown)
            start += length
        axes.text(start / GIB, place, f" {start / GIB:.2f}", va="center", fontsize=8, color=figures.INK)
    axes.set_yticks(range(len(parts)), [figures.plain(name) for name in parts])
    axes.invert_yaxis()
    axes.set_xlabel("GiB per step and chip")
    title = f"{figures.plain(program.model)}, batch {program.batch:,} on {math.prod(program.mesh)} chips"
    axes.set_title(f"{title}: {program.moved / GIB:.1f} GiB", loc="left", fontsize=10, color=figures.INK)
    if labels:
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def _kind(row: Traffic) -> tuple[str, str]:
    if row.module in WITHOUT_PASSES:
        return "outside the passes", OUTSIDE
    return ("backward", BACKWARD) if row.backward else ("forward", FORWARD)
