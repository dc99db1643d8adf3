"""How concentrated the attention of trained models is: rows of a CSV file, and two pictures of them."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from polaformer_jax.analysis.attention_rows import WITHOUT_POWER
from polaformer_jax.files import figures


@dataclasses.dataclass(frozen=True)
class Row:
    """The entropy of one head's attention rows, as a fraction of that of uniform attention.

    Attributes:
        run: name of the work directory.
        model: name of the model.
        variant: what its attention is, in words; see `images.Variant`.
        seed: of the run.
        accuracy: of the run, in %.
        block: counted from 0; of image models "stage.block".
        attention: "softmax", "relu"; of polarity-aware attention "same" and "opposite", its two streams, and these with
            ", p = 1", the same without the power.
        examples: number of test examples.
        entropy, deviation: mean and standard deviation over the examples.
    """

    run: str
    model: str
    variant: str
    seed: int
    accuracy: float
    block: str
    attention: str
    head: int
    examples: int
    entropy: float
    deviation: float


def draw(rows: Sequence[Row]) -> Figure:
    """A panel for each block: for each run and attention the heads' means, and bars of one standard deviation.

    Open marks are without the power.
    """
    blocks = _blocks(rows) or ["–"]  # without results the picture is empty
    lines = list(dict.fromkeys((row.run, row.attention) for row in rows))
    figure = figures.new(2 + 4.2 * len(blocks), 1.2 + 0.42 * len(lines))
    panels = figure.subplots(1, len(blocks), sharex=True, sharey=True, squeeze=False)[0]
    panels[0].invert_yaxis()  # of all panels, which share it: the first run is on top
    for axes, block in zip(panels, blocks, strict=True):
        for place, (run, name) in enumerate(lines):
            heads = [row for row in rows if (row.run, row.attention, row.block) == (run, name, block)]
            colour = figures.ATTENTION_COLOURS[name.removesuffix(WITHOUT_POWER)]
            for i, row in enumerate(heads):
                axes.errorbar(
                    row.entropy,
                    place + 0.16 * (i - (len(heads) - 1) / 2),
                    xerr=row.deviation,
                    fmt="o",
                    color=colour,
                    markerfacecolor="white" if name.endswith(WITHOUT_POWER) else colour,
                    markersize=5,
                    linewidth=1.2,
                )
        figures.tidy(axes)
        axes.grid(visible=False, axis="y")
        axes.set_title(f"block {block}", loc="left", fontweight="bold")
        axes.set_xlabel("entropy of a row / log n")
        axes.set_yticks(range(len(lines)), [f"{figures.plain(run)}: {name}" for run, name in lines])
    return figure


def _blocks(rows: Sequence[Row]) -> list[str]:
    """Blocks in the order of the model."""
    return sorted({row.block for row in rows}, key=lambda block: tuple(map(int, block.split("."))))


@dataclasses.dataclass(frozen=True)
class Sharpness:
    """A run's accuracy in %, and the mean entropy over its blocks, streams and heads."""

    model: str
    attention: str
    entropy: float
    accuracy: float


def sharpness(rows: Sequence[Row]) -> list[Sharpness]:
    """One for each run, of its attention as it was trained; each block counts alike."""
    found = []
    for run, model in dict.fromkeys((row.run, row.model) for row in rows):
        own = [row for row in rows if (row.run, row.model) == (run, model) and WITHOUT_POWER not in row.attention]
        blocks = _blocks(own)
        means = [np.nanmean([row.entropy for row in own if row.block == block]) for block in blocks]
        attention = "polarity" if own[0].attention in ("same", "opposite") else own[0].attention
        found.append(Sharpness(model, attention, float(np.mean(means)), own[0].accuracy))
    return found


def correlation(found: Sequence[Sharpness]) -> float | None:
    """Spearman's correlation of entropy and accuracy: -1 if sharper runs were always better; None below three runs."""
    from scipy.stats import spearmanr

    if len(found) < 3:
        return None
    return float(spearmanr([one.entropy for one in found], [one.accuracy for one in found]).statistic)


def draw_sharpness(rows: Sequence[Row], models: dict[str, str]) -> Figure:
    """A panel for each model: the accuracy of each run by the entropy of its attention. `models`: titles by name."""
    found = sharpness(rows)
    figure = figures.new(10.5, 3.9)
    for axes, (model, title) in zip(figure.subplots(1, len(models), squeeze=False)[0], models.items(), strict=True):
        own = [one for one in found if one.model == model]
        for attention in dict.fromkeys(one.attention for one in own):
            points = [(one.entropy, one.accuracy) for one in own if one.attention == attention]
            axes.plot(
                *zip(*points, strict=True),
                "o",
                color=figures.ATTENTION_COLOURS[attention],
                label=attention,
                markersize=6,
            )
        figures.tidy(axes)
        value = correlation(own)
        axes.set_title(
            title if value is None else f"{title}: rank correlation {value:.2f}", loc="left", fontweight="bold"
        )
        axes.set_xlabel("mean entropy of a row / log n")
        axes.set_ylabel("test accuracy, %")
        if own:
            axes.legend(frameon=False)
    return figure
