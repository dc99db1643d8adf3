"""From a `Segmenter` to classes of the pixels of whole images, at the size that they had before they were resized.

Scores are resized as MMSegmentation does it: from stride 4 to the size of the model's input, then to the image's own
size, both bilinearly. Here both steps are one product with small matrices along each axis, by blocks of rows, since
scores of 150 classes at full size would be the largest array by far.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from polaformer_jax.models.maps import bilinear_weights, resize_bilinear
from polaformer_jax.models.segmenter import Segmenter

ROWS = 64  # of a block
_MULTIPLE = 128  # of the sides to which the maps of one image are padded


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferenceMode:
    """How images are segmented.

    Attributes:
        window: side of square windows that are segmented one by one, in pixels, a multiple of 32; scores are averaged
            where windows overlap. None: the whole image at once.
        stride: from window to window, in pixels.
        flip: also the mirrored image; probabilities are averaged.
    """

    window: int | None = None
    stride: int | None = None
    flip: bool = False


class ScoreMap(NamedTuple):
    """The scores of images that the model took in one size.

    Attributes:
        scores: (B, h', w', classes), float32 at least.
        size: (height, width) of the model's input.
    """

    scores: jax.Array
    size: tuple[int, int]


def score_maps(model: Segmenter, images: Sequence[jax.Array], mode: InferenceMode) -> list[ScoreMap]:
    """The scores from which `by_blocks` computes probabilities: for each size of the images, and mirrored ones.

    Args:
        images: the same normalised images in several sizes, each (B, h, w, 3), h and w multiples of 32.
    """
    maps = []
    for image in images:
        maps.append(ScoreMap(_scores(model, image, mode), image.shape[1:3]))
        if mode.flip:
            maps.append(ScoreMap(_scores(model, image[:, :, ::-1], mode)[:, :, ::-1], image.shape[1:3]))
    return maps


def _scores(model: Segmenter, images: jax.Array, mode: InferenceMode) -> jax.Array:
    """Scores at stride 4 of whole images; at full size where they are averaged over windows."""
    if mode.window is None:
        return _full(model(images, train=False).logits)
    height, width = images.shape[1:3]
    side, stride = mode.window, mode.stride or mode.window
    shape = min(side, height), min(side, width)
    corners = [(top, left) for top in starts(height, side, stride) for left in starts(width, side, stride)]
    windows = jnp.stack([images[:, top : top + side, left : left + side] for top, left in corners])
    logits = jax.lax.map(lambda window: _full(model(window, train=False).logits), windows)  # compiled once
    total = jnp.zeros((*images.shape[:3], logits.shape[-1]), logits.dtype)
    counts = np.zeros((1, height, width, 1))
    for scores, (top, left) in zip(logits, corners, strict=True):
        place = (slice(None), slice(top, top + shape[0]), slice(left, left + shape[1]))
        total = total.at[place].add(resize_bilinear(scores, shape))
        counts[place] += 1
    return total / jnp.asarray(counts, total.dtype)


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along an axis: every `stride` pixels, the last where it ends with the image."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride + window, length) - window, 0) for i in range(count)]


def by_blocks(
    maps: Sequence[ScoreMap],
    size: jax.Array,
    shape: tuple[int, int],
    reduce: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Applies a function to the log-probabilities at each image's own size, block of rows by block.

    Args:
        maps: as `score_maps` returns them.
        size: (B, 2) int32, each image's own (height, width).
        shape: (H, W), the size to which images of a batch are padded; H is a multiple of `ROWS`, or less.
        reduce: from log-probabilities (B, rows, W, classes) and the numbers of the rows (rows,) to a pytree. Beyond an
            image's own size the values have no meaning.

    Returns:
        What `reduce` returned, stacked along a leading axis, one entry for each block.
    """
    rows, (height, width) = min(ROWS, shape[0]), shape
    if height % rows:
        raise ValueError(f"maps are padded to {height} rows, expected a multiple of {ROWS}")
    down = [_weights(one, 0, size, height) for one in maps]  # (B, H, h')
    across = [_weights(one, 1, size, width) for one in maps]  # (B, W, w')

    def block(first: jax.Array):
        total = None
        for one, vertical, horizontal in zip(maps, down, across, strict=True):
            part = jax.lax.dynamic_slice_in_dim(vertical, first, rows, axis=1)  # (B, rows, h')
            x = _product("brh,bhwk->brwk", part, one.scores)
            x = _product("bcw,brwk->brck", horizontal, x)  # (B, rows, W, classes)
            logs = jax.nn.log_softmax(x)
            total = logs if total is None else jnp.logaddexp(total, logs)
        return reduce(total - jnp.log(jnp.asarray(len(maps), total.dtype)), first + jnp.arange(rows))

    return jax.lax.map(block, jnp.arange(0, height, rows))


def _product(subscripts: str, weights: jax.Array, x: jax.Array) -> jax.Array:
    # At full precision, for weights of pixels: TPUs would round both to bfloat16.
    return jnp.einsum(subscripts, weights, x, precision=jax.lax.Precision.HIGHEST)


def _weights(scores: ScoreMap, axis: int, size: jax.Array, padded: int) -> jax.Array:
    """(B, padded, h' or w'): matrices that resize an axis to the model's input, and from there to `size`."""
    length, middle, dtype = scores.scores.shape[1 + axis], scores.size[axis], scores.scores.dtype
    second = bilinear_weights(middle, size[:, axis], padded, dtype)  # (B, padded, middle)
    if length == middle:
        return second
    first = bilinear_weights(length, jnp.full(1, middle), middle, dtype)[0]  # (middle, length)
    return jnp.einsum("bpm,ml->bpl", second, first, precision=jax.lax.Precision.HIGHEST)


def _full(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def label_map(
    model: Segmenter, images: Sequence[jax.Array], size: tuple[int, int], mode: InferenceMode
) -> tuple[np.ndarray, np.ndarray]:
    """`label_maps` of one image, at its own size, for which few programs are compiled.

    Args:
        images: the normalised image in one or several sizes, each (h, w, 3).
        size: its own (height, width).

    Returns:
        (height, width) uint8 and (height, width) float32 at least.
    """
    shape = tuple(-(-side // _MULTIPLE) * _MULTIPLE for side in size)
    found = label_maps(model, [image[None] for image in images], jnp.asarray([size], jnp.int32), shape, mode)
    labels, probability = (np.asarray(x)[0, : size[0], : size[1]] for x in found)
    return labels, probability


def label_maps(
    model: Segmenter, images: Sequence[jax.Array], size: jax.Array, shape: tuple[int, int], mode: InferenceMode
) -> tuple[jax.Array, jax.Array]:
    """The most probable class of each pixel, and its probability.

    Args:
        images: as for `score_maps`.
        size, shape: as for `by_blocks`; H is a multiple of `ROWS`, or less.

    Returns:
        (B, H, W) uint8 and (B, H, W) float32 at least. Beyond an image's own size they have no meaning.
    """
    graphdef, params = nnx.split(model)
    return _label_maps(params, list(images), size, graphdef=graphdef, shape=shape, mode=mode)


@functools.partial(jax.jit, static_argnames=("graphdef", "shape", "mode"))
def _label_maps(params, images: list[jax.Array], size: jax.Array, *, graphdef, shape, mode: InferenceMode):
    maps = score_maps(nnx.merge(graphdef, params), images, mode)

    def best(logs: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.argmax(logs, -1).astype(jnp.uint8), jnp.exp(jnp.max(logs, -1))  # (B, rows, W)

    def joined(blocks: jax.Array) -> jax.Array:
        return jnp.moveaxis(blocks, 0, 1).reshape(size.shape[0], *shape)

    return jax.tree.map(joined, by_blocks(maps, size, shape, best))
