"""The learning rate as a function of the step: `cosine`, the images' recipe, or `one_cycle`, the sequences'.

Cosine: linear warm-up, cosine, then a constant cooldown. Source: the official trainer (timm's cosine scheduler, stepped
after every update), hence two of its habits: step t is taken with the rate f(max(t - 1, 0)), so the first two steps
share the warm-up rate; and the cosine counts from step 0, so the rate drops a little where the warm-up ends.

One cycle: linear up, then linear down. Source: PyTorch's `OneCycleLR` with `anneal_strategy="linear"`, as the code of
Nyströmformer and Skyformer calls it for the Long Range Arena: step t is taken with the rate f(t), the peak comes at
step `warmup` - 1 and the least rate at the last step.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from polaformer_jax.errors import UserError

# PyTorch's defaults, which that code keeps: the first rate is the peak's 25th part, the last the first's 10,000th.
FIRST_PART, LAST_PART = 25.0, 1e4


@dataclasses.dataclass(frozen=True)
class Durations:
    """How long a run is, in optimizer steps."""

    unit: int  # steps in one unit of `config.train`: those of an epoch, or 1
    warmup: int
    main: int  # warm-up included
    total: int  # cooldown included


def durations(config, *, num_examples: int) -> Durations:
    """Converts the config's epochs or steps.

    Args:
      config: the whole config; either `train.epochs` or `train.steps` is set, and `schedule` counts in the same unit.
      num_examples: size of the training set. An epoch has `num_examples // batch_size` steps.

    Raises:
      UserError: the training set is smaller than a batch, or the run would have no step.
    """
    unit = 1
    if config.train.epochs:
        unit = num_examples // config.train.batch_size
        if unit == 0:
            raise UserError(
                f"train.batch_size={config.train.batch_size} is larger than the training set ({num_examples} examples):"
                " lower it, or give the length of the run as train.steps"
            )
    length = config.train.epochs or config.train.steps
    main = round(length * unit)
    warmup = round(config.schedule.warmup * unit)
    if main < 1 or warmup > main:
        raise UserError(
            f"a run of {length:g} with schedule.warmup={config.schedule.warmup:g} has {main} steps and {warmup} steps"
            " of warm-up: it needs at least one step, and no more warm-up than that"
        )
    return Durations(unit=unit, warmup=warmup, main=main, total=main + round(config.schedule.cooldown * unit))


def learning_rate(config, length: Durations) -> Callable[[jax.Array], jax.Array]:
    """The schedule of a config.

    Returns:
      A function from a step, counted from 0, to the learning rate that the step is taken with. All rates of the config
      are multiplied by `train.batch_size / optimizer.lr_base_batch`.
    """
    scale = config.train.batch_size / config.optimizer.lr_base_batch
    peak = config.optimizer.lr * scale
    if config.schedule.name == "one_cycle":
        return one_cycle(peak, warmup=length.warmup, steps=length.main)
    start = config.schedule.warmup_lr * scale
    least = config.schedule.min_lr * scale

    def rate(step: jax.Array) -> jax.Array:
        u = jnp.maximum(step - 1, 0).astype(jnp.result_type(float))
        warmup = start + u * ((peak - start) / max(length.warmup, 1))
        cosine = least + 0.5 * (peak - least) * (1 + jnp.cos(jnp.pi * u / length.main))
        return jnp.where(u < length.warmup, warmup, jnp.where(u < length.main, cosine, least))

    return rate


def one_cycle(peak: float, *, warmup: int, steps: int) -> Callable[[jax.Array], jax.Array]:
    """In straight lines from peak / 25 to the peak at step `warmup` - 1, and to peak / 250,000 at step `steps` - 1."""
    first = peak / FIRST_PART
    last = first / LAST_PART
    top = warmup - 1

    def rate(step: jax.Array) -> jax.Array:
        t = jnp.asarray(step).astype(jnp.result_type(float))
        up = first + (peak - first) * t / max(top, 1)
        down = peak + (last - peak) * (t - top) / max(steps - 1 - top, 1)
        return jnp.where(t <= top, jnp.where(top > 0, up, peak), jnp.maximum(down, last))

    return rate
