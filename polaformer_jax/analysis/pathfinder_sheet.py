"""A sheet of Pathfinder examples with their labels, to be judged by eye.

Below each picture is a plan of it: the two target curves in colour, their discs, and the distractors in grey.
"""

from matplotlib.figure import Figure
from matplotlib.patches import Circle

from polaformer_jax.data.lra.facts import TASKS
from polaformer_jax.data.lra.pathfinder import SIDE
from polaformer_jax.data.lra.pathfinder_pictures import DISC_RADIUS, Examples
from polaformer_jax.files import figures
from polaformer_jax.files.figures import INK

COLUMNS = 8
_COLOURS, _LINES = ("#c2410c", "#1d4ed8"), "#b8c0c8"


def draw_sheet(examples: Examples) -> Figure:
    """A figure of the examples."""
    count = len(examples.labels)
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    figure = figures.new(1.6 * columns, 3.4 * rows + 0.5, pad=0.04)
    figure.suptitle("Pathfinder-32: do the discs\nend the same curve?", x=0.01, ha="left", color=INK, fontsize=12)
    grid = figure.subplots(2 * rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color(_LINES)
        axes.set_visible(False)
    for number in range(count):
        row, column = 2 * (number // columns), number % columns
        picture, plan = grid[row, column], grid[row + 1, column]
        picture.imshow(examples.images[number], cmap="gray", vmin=0, vmax=255, extent=(0, SIDE, SIDE, 0))
        picture.set_title(TASKS["pathfinder"].class_names[examples.labels[number]], fontsize=9, color=INK, pad=3)
        _draw_plan(plan, examples.curves, number)
        for axes in (picture, plan):
            axes.set_visible(True)
    return figure


def _draw_plan(axes, curves, number: int) -> None:
    distractors = curves.distractors[number].reshape(-1, 2, 2)
    for dashes, colour in zip((distractors, *curves.targets[number]), (_LINES, *_COLOURS), strict=True):
        axes.plot(dashes[:, :, 0].T, dashes[:, :, 1].T, color=colour, linewidth=1.6, solid_capstyle="butt")
    for disc in curves.discs[number]:
        axes.add_patch(Circle(disc, DISC_RADIUS, color=INK))
    axes.set_xlim(0, SIDE)
    axes.set_ylim(SIDE, 0)
    axes.set_aspect("equal")
