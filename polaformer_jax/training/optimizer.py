"""AdamW as the official recipe uses it, built from Optax, and the learning rate as a function of the step.

There are three schedules. `cosine`, the recipe of images: linear warm-up, cosine, then a constant cooldown. Source: the
official trainer (timm's cosine scheduler, stepped after every update), hence two of its properties: step t is taken
with the rate f(max(t - 1, 0)), so the first two steps share the warm-up rate; and the cosine counts from step 0, so the
rate drops a little where the warm-up ends.

`poly`, the recipe of segmentation: (1 - step / steps) ** power, which a linear warm-up multiplies. Source: mmcv's
`PolyLrUpdaterHook` (0.x), as the configs of Swin Transformer and PVT call it: step t is taken with the rate f(t).

`one_cycle`, the recipe of sequences: linear up, then linear down. Source: PyTorch's `OneCycleLR` with
`anneal_strategy="linear"`, as the code of Nyströmformer and Skyformer calls it for the Long Range Arena: step t is
taken with the rate f(t), the peak is at step `warmup` - 1 and the minimum at the last step.
"""

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from polaformer_jax.errors import UserError

# Tables that the official trainer exempts from weight decay. `positional_encoding`, `pos_embed`, `power` and the
# attention's `scale` are not exempt there, so not here.
UNDECAYED = ("relative_position_bias_table", "absolute_pos_embed")


def make_optimizer(config, rate: Callable[[jax.Array], jax.Array], *, trainable=None) -> optax.GradientTransformation:
    """Clipping by value, then by the global norm, where configured; then AdamW with decoupled weight decay.

    Args:
        config: the config's `optimizer` part.
        rate: the learning rate of a step, counted from 0.
        trainable: nested dict of bools like the parameters; frozen ones never change, and have no moments. None: all
            are trainable.
    """
    adamw = optax.adamw(
        rate,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    parts = [] if config.clip_value is None else [optax.clip(config.clip_value)]
    parts += [] if config.clip_norm is None else [clip_by_global_norm(config.clip_norm)]
    parts.append(adamw)
    if config.layer_decay is not None:
        parts.append(scale_by_depth(config.layer_decay))
    if config.head_factor != 1:
        parts.append(scale_heads(config.head_factor))
    optimizer = optax.chain(*parts) if len(parts) > 1 else adamw
    if trainable is None:
        return optimizer
    labels = jax.tree.map(lambda trains: "train" if trains else "freeze", trainable)
    return optax.partition({"train": optimizer, "freeze": optax.set_to_zero()}, labels)


def head_only(params) -> dict:
    """True for the parameters of the classifier, or of a segmenter's heads. Same structure as `params`."""
    if "backbone" in params:
        return jax.tree_util.tree_map_with_path(lambda path, _: _keys(path)[0] != "backbone", params)
    return jax.tree_util.tree_map_with_path(lambda path, _: _keys(path)[0] == "head", params)


def scale_heads(factor: float) -> optax.GradientTransformation:
    """Scales the updates of all that is not the `backbone` of a segmenter."""

    def update(updates, state, params=None):
        del params
        heads = head_only(updates)
        return jax.tree.map(lambda u, is_head: u * factor if is_head else u, updates, heads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_depth(decay: float) -> optax.GradientTransformation:
    """Layer-wise learning-rate decay: the update of a layer is scaled by decay^(layers above it).

    The classifier and the final normalisation have the full rate, the last block `decay` times as much, and so on down
    to the first patch embedding. Layers between two stages count as the last block before them. As in BEiT
    (Bao et al., arXiv 2106.08254) and the fine-tuning of Swin Transformer.
    """

    def update(updates, state, params=None):
        del params
        depths = layer_depths(updates)
        top = max(jax.tree.leaves(depths))
        return jax.tree.map(lambda u, depth: u * decay ** (top - depth), updates, depths), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def layer_depths(params) -> dict:
    """The number of each parameter's layer: 0 for the first patch embedding, then one per block, the head last."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    blocks: dict[int, int] = {}  # number of blocks by stage
    for path, _ in flat:
        place = _place(_keys(path))
        if place is not None and place[1] is not None:
            blocks[place[0]] = max(blocks.get(place[0], 0), place[1] + 1)

    def depth(path, _) -> int:
        place = _place(_keys(path))
        if place is None:
            return sum(blocks.values()) + 1
        stage, block = place
        before = sum(count for i, count in blocks.items() if i < stage)
        return before if block is None else before + block + 1

    return jax.tree_util.tree_map_with_path(depth, params)


def _place(keys: tuple) -> tuple[int, int | None] | None:
    """(stage, block) of a parameter; block is None for layers that lead to the stage. None after the stages."""
    if keys[0] == "backbone":  # of a segmenter
        keys = keys[1:]
    name = str(keys[0])
    if name == "layers":  # Pola-Swin: layers.STAGE.blocks.BLOCK, layers.STAGE.downsample leads to the next stage
        return (keys[1], keys[3]) if keys[2] == "blocks" else (keys[1] + 1, None)
    if name in ("patch_embed", "absolute_pos_embed"):
        return 0, None
    if match := re.fullmatch(r"(block|patch_embed|pos_embed)([1-4])", name):  # Pola-PVT
        return int(match[2]) - 1, keys[1] if match[1] == "block" else None
    return None


def _keys(path) -> tuple:
    return tuple(getattr(entry, "key", entry) for entry in path)


def decay_mask(params) -> dict:
    """True for the parameters that decay: all but 1-D ones, biases and `UNDECAYED`. Same structure as `params`."""

    def decays(path, leaf) -> bool:
        name = str(getattr(path[-1], "key", path[-1]))
        return leaf.ndim > 1 and name != "bias" and name not in UNDECAYED

    return jax.tree_util.tree_map_with_path(decays, params)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales gradients by min(1, max_norm / (norm + 1e-6)).

    As `torch.nn.utils.clip_grad_norm_` does it; `optax.clip_by_global_norm` omits the 1e-6, which shows in the
    seventh digit of the loss.
    """

    def update(updates, state, params=None):
        del params
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


# PyTorch's defaults, which that code keeps: the first rate is 1/25 of the peak, the last 1/10,000 of the first.
FIRST_PART, LAST_PART = 25.0, 1e4


@dataclasses.dataclass(frozen=True)
class Durations:
    """How long a run is, in optimizer steps."""

    unit: int  # steps in one unit of `config.train`: those of an epoch, or 1
    warmup: int
    main: int  # warm-up included
    total: int  # cooldown included


def durations(config, *, num_examples: int) -> Durations:
    """Converts the config's epochs or steps to optimizer steps.

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
            " of warm-up: it needs at least one step, and at most as many steps of warm-up"
        )
    return Durations(unit=unit, warmup=warmup, main=main, total=main + round(config.schedule.cooldown * unit))


def learning_rate(config, length: Durations) -> Callable[[jax.Array], jax.Array]:
    """The schedule of a config.

    Returns:
        A function from a step, counted from 0, to the learning rate of that step. All rates of the config are
        multiplied by `train.batch_size / optimizer.lr_base_batch`.
    """
    scale = config.train.batch_size / config.optimizer.lr_base_batch
    peak = config.optimizer.lr * scale
    if config.schedule.name == "one_cycle":
        return one_cycle(peak, warmup=length.warmup, steps=length.main)
    start = config.schedule.warmup_lr * scale
    least = config.schedule.min_lr * scale
    if config.schedule.name == "poly":
        return poly(
            peak, start=start, least=least, power=config.schedule.power, warmup=length.warmup, steps=length.main
        )

    def rate(step: jax.Array) -> jax.Array:
        u = jnp.maximum(step - 1, 0).astype(jnp.result_type(float))
        warmup = start + u * ((peak - start) / max(length.warmup, 1))
        cosine = least + 0.5 * (peak - least) * (1 + jnp.cos(jnp.pi * u / length.main))
        return jnp.where(u < length.warmup, warmup, jnp.where(u < length.main, cosine, least))

    return rate


def poly(
    peak: float, *, start: float, least: float, power: float, warmup: int, steps: int
) -> Callable[[jax.Array], jax.Array]:
    """least + (peak - least) * (1 - t / steps) ** power, times a factor that rises from start / peak to 1."""
    first = start / peak if peak else 1.0

    def rate(step: jax.Array) -> jax.Array:
        t = jnp.asarray(step).astype(jnp.result_type(float))
        regular = least + (peak - least) * jnp.maximum(1 - t / steps, 0) ** power
        return regular * jnp.where(t < warmup, 1 - (1 - t / max(warmup, 1)) * (1 - first), 1)

    return rate


def one_cycle(peak: float, *, warmup: int, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Linear from peak / 25 to the peak at step `warmup` - 1, then linear to peak / 250,000 at step `steps` - 1."""
    first = peak / FIRST_PART
    last = first / LAST_PART
    top = warmup - 1

    def rate(step: jax.Array) -> jax.Array:
        t = jnp.asarray(step).astype(jnp.result_type(float))
        up = first + (peak - first) * t / max(top, 1)
        down = peak + (last - peak) * (t - top) / max(steps - 1 - top, 1)
        return jnp.where(t <= top, jnp.where(top > 0, up, peak), jnp.maximum(down, last))

    return rate
