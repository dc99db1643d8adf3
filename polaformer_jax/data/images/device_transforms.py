"""Augmentation on the device, inside the compiled step: random erasing, mixup and CutMix on whole batches.

Everything is a function of the whole batch and a key. Random numbers are drawn for the whole batch at once, so that
they are the same on any number of devices (JAX's generator gives each device its part of them).

Sources: Zhong et al., "Random Erasing Data Augmentation" (arXiv 1708.04896); Zhang et al., "mixup" (arXiv 1710.09412);
Yun et al., "CutMix" (arXiv 1905.04899); details as in timm, which the official trainer uses.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

ERASED_AREA = (0.02, 1 / 3)  # share of the image
ERASED_ASPECT = (0.3, 1 / 0.3)
ERASE_TRIES = 10


class Mixed(NamedTuple):
    """A batch after mixing.

    Attributes:
        images: (B, S, S, 3).
        share: (B,) the fraction of each target that is the example's own; the rest is its partner's, example B - 1 - i.
    """

    images: jax.Array
    share: jax.Array


def random_erasing(images: jax.Array, key: jax.Array, *, probability: float) -> jax.Array:
    """Replaces one box by standard normal noise, with the given probability for each image.

    The box's area is uniform between 2 % and a third of the image, its aspect log-uniform between 0.3 and 1 / 0.3. The
    first of ten draws that is smaller than the image is used; if there is none, the image is unchanged.

    Args:
        images: (B, S, S, 3), normalised.
    """
    batch, height, width, _ = images.shape
    chosen, area_key, aspect_key, top_key, left_key, noise_key = jax.random.split(key, 6)
    tries = (batch, ERASE_TRIES)
    area = jax.random.uniform(area_key, tries, jnp.float32, minval=ERASED_AREA[0], maxval=ERASED_AREA[1]) * (
        height * width
    )
    low, high = (math.log(aspect) for aspect in ERASED_ASPECT)
    aspect = jnp.exp(jax.random.uniform(aspect_key, tries, jnp.float32, minval=low, maxval=high))
    h, w = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (h < height) & (w < width)
    first = jnp.argmax(fits, axis=1)[:, None]
    h, w = (jnp.take_along_axis(side, first, axis=1)[:, 0] for side in (h, w))
    # A position is uniform over the (H - h + 1)(W - w + 1) places where the box fits.
    top = jnp.floor(jax.random.uniform(top_key, (batch,), jnp.float32) * (height - h + 1))
    left = jnp.floor(jax.random.uniform(left_key, (batch,), jnp.float32) * (width - w + 1))
    erase = jax.random.bernoulli(chosen, probability, (batch,)) & fits.any(axis=1)
    inside = _inside(top, top + h, height)[:, :, None] & _inside(left, left + w, width)[:, None, :]  # (B, S, S)
    noise = jax.random.normal(noise_key, images.shape, images.dtype)
    return jnp.where((inside & erase[:, None, None])[..., None], noise, images)


def mix(
    images: jax.Array,
    mask: jax.Array,
    key: jax.Array,
    *,
    mixup: float,
    cutmix: float,
    probability: float,
    switch_probability: float,
) -> Mixed:
    """Mixes each image with the one at the mirrored batch position, by mixup or CutMix, the same for the whole batch.

    Args:
        images: (B, S, S, 3).
        mask: (B,) False where there is no valid image; an invalid one is never a partner.
        mixup, cutmix: the a in the share's Beta(a, a) distribution; 0 disables the method.
        probability: probability of mixing the batch at all.
        switch_probability: probability of CutMix where both methods are enabled.
    """
    batch, height, width, _ = images.shape
    mix_key, switch_key, mixup_key, cutmix_key, row_key, column_key = jax.random.split(key, 6)
    if not mixup and not cutmix:
        return Mixed(images, jnp.ones(batch, jnp.float32))
    switch = switch_probability if mixup and cutmix else float(cutmix > 0)
    cut = jax.random.bernoulli(switch_key, switch)
    share = jnp.where(
        cut,
        jax.random.beta(cutmix_key, cutmix or 1.0, cutmix or 1.0, dtype=jnp.float32),
        jax.random.beta(mixup_key, mixup or 1.0, mixup or 1.0, dtype=jnp.float32),
    )
    mixes = jax.random.bernoulli(mix_key, probability)

    # The box of CutMix, centred anywhere and cut off at the edges; the share is the rest of the image.
    side = jnp.sqrt(1 - share)
    row = jax.random.randint(row_key, (), 0, height)
    column = jax.random.randint(column_key, (), 0, width)
    half_h, half_w = (jnp.floor(size * side).astype(jnp.int32) // 2 for size in (height, width))
    rows = _inside(jnp.clip(row - half_h, 0)[None], jnp.clip(row + half_h, max=height)[None], height)[0]
    columns = _inside(jnp.clip(column - half_w, 0)[None], jnp.clip(column + half_w, max=width)[None], width)[0]
    box = rows[:, None] & columns[None, :]  # (S, S)
    share = jnp.where(cut, 1 - jnp.mean(box, dtype=jnp.float32), share)

    both = mixes & mask & mask[::-1]  # (B,)
    share = jnp.where(both, share, 1.0)
    partner = images[::-1]
    own = share.astype(images.dtype).reshape(-1, 1, 1, 1)
    pasted = jnp.where((box[None] & both[:, None, None])[..., None], partner, images)
    blended = images * own + partner * (1 - own)
    # Where nothing is mixed the image is unchanged, bit for bit.
    blended = jnp.where(both.reshape(-1, 1, 1, 1), blended, images)
    return Mixed(jnp.where(cut, pasted, blended), share)


def mixed_targets(
    labels: jax.Array, share: jax.Array, *, num_classes: int, label_smoothing: float, dtype=jnp.float32
) -> jax.Array:
    """(B, classes) in `dtype`: smoothed one-hot targets, mixed with those of the mirrored batch.

    Args:
        labels: (B,).
        share: see `Mixed`.
    """
    off = label_smoothing / num_classes
    own = off + (1 - label_smoothing) * jax.nn.one_hot(labels, num_classes, dtype=dtype)
    share = share.astype(dtype)[:, None]
    return own * share + own[::-1] * (1 - share)


def _inside(start: jax.Array, stop: jax.Array, size: int) -> jax.Array:
    """(B, size): which positions are in [start, stop)."""
    position = jnp.arange(size)[None, :]
    return (position >= start[:, None]) & (position < stop[:, None])
