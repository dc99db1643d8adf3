"""Images as the model saw them, next to maps of where one of its blocks looks."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from polaformer_jax.analysis.attention_maps import (
    AttentionMaps,
    attention_maps,
    last_linear_block,
    resolve_block,
    resolve_token,
)
from polaformer_jax.data.images.normalisation import normalise
from polaformer_jax.errors import UserError
from polaformer_jax.files import figures
from polaformer_jax.files.figures import FAINT, INK
from polaformer_jax.inference.images import evaluation_transform, read_image
from polaformer_jax.models.backbone import Backbone
from polaformer_jax.models.model_config import STRIDES

MARK = "#35c2ff"
COLOURS = "inferno"
MOST_IMAGES = 32  # rows of one picture
TITLES = {"same": "same-signed stream", "opposite": "opposite-signed stream", "softmax": "softmax"}


class Where(NamedTuple):
    """Which block is shown, and for which query token: (row, column), or None for the average over all."""

    stage: int
    block: int
    token: tuple[int, int] | None


def check_request(path: epath.PathLike, *, images: int) -> None:
    """Raises a UserError, before any work, if a picture of this many images cannot be written to `path`."""
    figures.check_name(path, "picture", suffixes=(".png",))
    if images > MOST_IMAGES:
        raise UserError(f"a picture shows at most {MOST_IMAGES} images, found {images}: draw several pictures")


def choose(
    model: Backbone, *, stage: int | None = None, block: int | None = None, token: Sequence[str | int] | None = None
) -> Where:
    """What to show; by default the last linear block, averaged over all tokens.

    Raises:
        UserError: the model has no such stage, block or token.
    """
    if stage is None and block is None:
        stage, block = last_linear_block(model)
    elif stage is None:
        stage, _ = last_linear_block(model)
    try:
        stage, block = resolve_block(model, stage, -1 if block is None else block)
        if token is not None:
            if not all(str(number).lstrip("-").isdecimal() for number in token):
                raise ValueError(f"token {','.join(map(str, token))}: expected ROW,COLUMN, two integers")
            token = resolve_token(tuple(int(number) for number in token), model.config.img_size // STRIDES[stage])
    except ValueError as error:
        raise UserError(str(error)) from error
    return Where(stage, block, token)


def draw(
    model: Backbone,
    files: Sequence[epath.PathLike],
    results: Sequence[Mapping[str, Any]],
    *,
    where: Where,
) -> Figure:
    """One row per image: the model's input and prediction, and a map of each stream of the block, its heads averaged.

    Args:
        files: the images.
        results: what `prediction.predict` returned for them.
    """
    transform = evaluation_transform(model)
    images = [read_image(file, transform) for file in files]
    maps = [
        attention_maps(model, normalise(image[None]), stage=where.stage, block=where.block, token=where.token)
        for image in images  # one by one: a batch would hold the weights of all at once
    ]
    streams = list(maps[0].streams)
    rows, columns = len(images), 1 + len(streams)
    figure = figures.new(3.1 * columns + 0.8, 3.45 * rows + 0.55, pad=0.08)
    figure.suptitle(_headline(model, where, maps[0]), x=0.01, ha="left", color=INK, fontsize=10, fontweight="bold")
    for panels, image, result, found in zip(
        figure.subplots(rows, columns, squeeze=False), images, results, maps, strict=True
    ):
        _draw_row(figure, panels, image, result, found, where, side=model.config.img_size // STRIDES[where.stage])
    return figure


def _headline(model: Backbone, where: Where, maps: AttentionMaps) -> str:
    streams = list(maps.streams)
    kind = {"same": "polarity-aware", "relu": "linear, relu"}.get(streams[0], streams[0])
    heads = next(iter(maps.streams.values())).weights.shape[1]
    whose = f"token ({where.token[0]}, {where.token[1]})" if where.token else "average over all tokens"
    side = model.config.img_size // STRIDES[where.stage]
    of_heads = "1 head" if heads == 1 else f"mean of {heads} heads"
    return f"Stage {where.stage}, block {where.block} ({kind}, {side}×{side} tokens): {whose}, {of_heads}"


def _draw_row(figure: Figure, panels, image: np.ndarray, result, maps: AttentionMaps, where: Where, *, side: int):
    best = result["predictions"][0]
    size = image.shape[0]
    place = {"extent": (0, size, size, 0), "interpolation": "nearest"}  # one token, one flat square
    panels[0].imshow(image, **place)
    said = f"{figures.plain(_short(best['name'], 24))}, {100 * best['probability']:.1f} %"
    file = figures.plain(_short(os.path.basename(result["image"]), 34))
    panels[0].set_title(f"{file}\n{said}", fontsize=9, color=INK)
    # In units of the weights of a token that attends equally to all keys within its reach.
    weights = {name: stream.weights[0].mean(axis=0) for name, stream in maps.streams.items()}
    uniform = math.exp(-maps.uniform_entropy) if where.token else 1 / next(iter(weights.values())).size
    values = {name: weight / uniform for name, weight in weights.items()}
    colours = ScalarMappable(_scale(values.values()), COLOURS)  # one for both streams, so that they can be compared
    grey = 64 + image.mean(axis=-1) / 2  # of medium lightness: it must not be mistaken for the map's
    for axes, (name, value) in zip(panels[1:], values.items(), strict=True):
        axes.imshow(grey, cmap="gray", vmin=0, vmax=255, **place)
        axes.imshow(value, cmap=COLOURS, norm=colours.norm, alpha=0.75, **place)
        entropy = maps.streams[name].entropy[0]
        seen = entropy[~np.isnan(entropy)]
        text = f"entropy {seen.mean():.2f} of {maps.uniform_entropy:.2f} nats" if seen.size else _without_entropy(value)
        axes.set_title(f"{TITLES[name]}\n{text}", fontsize=9, color=INK, parse_math=False)
    bar = figure.colorbar(colours, ax=panels[-1], fraction=0.046, pad=0.03)
    bar.ax.yaxis.get_major_formatter().set_useOffset(False)
    bar.outline.set_visible(False)
    bar.set_label("weight, uniform = 1", color=INK, fontsize=8)
    bar.ax.tick_params(labelsize=8, labelcolor=INK, color=FAINT)
    for axes in panels:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color(FAINT)
        if where.token is not None:
            cell = size / side
            corner = where.token[1] * cell, where.token[0] * cell
            axes.add_patch(Rectangle(corner, cell, cell, fill=False, edgecolor=MARK, linewidth=1.8))


def _without_entropy(weights: np.ndarray) -> str:
    return "weights of both signs" if np.any(weights) else "no weights at all"


def _scale(maps: Iterable[np.ndarray]) -> Normalize:
    """From the smallest to the largest value; wider where they hardly differ, so that rounding errors get no colour."""
    joined = np.concatenate([values.ravel() for values in maps])
    low, high = joined.min(), joined.max()
    spare = max(0, 0.02 - (high - low)) / 2
    return Normalize(low - spare, high + spare)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
