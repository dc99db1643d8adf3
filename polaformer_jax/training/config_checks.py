"""Checks of the values of a config, before anything is built from it."""

import math
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from polaformer_jax.config import ATTENTIONS, DTYPES, HEADS, SEQUENCE_TASKS, defaults
from polaformer_jax.errors import UserError

_CHOICES = {
    "task.name": ("image", "segmentation", *SEQUENCE_TASKS),
    "model.attention": ATTENTIONS,
    "data.on_error": ("stop", "skip"),
    "data.on_change": ("stop", "accept"),
    "model.dtype": DTYPES,
    "model.param_dtype": ("float32", "float64"),
    "train.on_nonfinite": ("stop", "skip"),
    "train.loss_pixels": ("all", "labelled"),
    "schedule.name": ("cosine", "poly", "one_cycle"),
    "debug.transfer_guard": (None, "log", "disallow"),
    "eval.weights": ("raw", "ema"),
    "checkpoint.best_metric": ("accuracy", "loss", "miou"),
}
# What numbers must satisfy: the requirement in words, the test, and the fields. "or None" is part of the words.
_RANGES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    (
        "it must be positive and finite",
        lambda x: 0 < x < math.inf,
        (
            *("model.img_size", "train.batch_size", "train.accumulate", "optimizer.lr_base_batch", "optimizer.eps"),
            *("eval.every", "eval.batch_size", "checkpoint.every_steps", "checkpoint.keep_last", "data.prefetch"),
            *("data.buckets", "log.every", "distributed.heartbeat_s", "schedule.power"),
        ),
    ),
    (
        "it must not be negative, and finite",
        lambda x: 0 <= x < math.inf,
        (
            *("seed", "data.workers", "augment.mixup", "augment.cutmix", "optimizer.lr", "optimizer.weight_decay"),
            *("schedule.warmup", "schedule.warmup_lr", "schedule.min_lr", "schedule.cooldown"),
            *("train.auxiliary_weight", "optimizer.head_factor"),
        ),
    ),
    (
        "it must be in [0, 1)",
        lambda x: 0 <= x < 1,
        ("optimizer.b1", "optimizer.b2", "checkpoint.best_after", "train.label_smoothing"),
    ),
    (
        "it is a probability, in [0, 1]",
        lambda x: 0 <= x <= 1,
        ("augment.flip", "augment.erase_prob", "augment.mix_prob", "augment.switch_prob"),
    ),
    (
        "it must be positive and finite, or None",
        lambda x: 0 < x < math.inf,
        ("checkpoint.every_minutes", "watchdog.step_s", "watchdog.input_s"),
    ),
    ("it must be positive, or None", lambda x: x > 0, ("optimizer.clip_norm", "optimizer.clip_value")),
    ("it must be in [0, 1), or None", lambda x: 0 <= x < 1, ("ema.decay",)),
    ("it must be in (0, 1], or None", lambda x: 0 < x <= 1, ("optimizer.layer_decay",)),
    ("it must be in (0, 1]", lambda x: 0 < x <= 1, ("augment.max_class_share",)),
)


# Fields that only segmentation uses.
_OF_SEGMENTATION = (
    *("model.head", "model.head_channels", "model.auxiliary_channels", "train.loss_pixels", "train.auxiliary_weight"),
    *("data.image_dir", "data.mask_dir", "data.reduce_zero_label", "optimizer.head_factor"),
    *("augment.scale", "augment.ratio", "augment.max_class_share", "augment.distortion"),
    *("eval.scale", "eval.window", "eval.stride", "eval.scales", "eval.flip"),
)


def check(config: ml_collections.ConfigDict) -> None:
    """Checks the values of a config before anything is built.

    Raises:
        UserError: lists every field whose value cannot work, and what could.
    """

    def value(field: str) -> Any:
        part, name = field.split(".") if "." in field else (None, field)
        return config[name] if part is None else config[part][name]

    problems = [
        f"{field}={value(field)!r}: it is one of {', '.join(map(str, choices))}"
        for field, choices in _CHOICES.items()
        if value(field) not in choices
    ]
    for words, fits, fields in _RANGES:
        for number, field in ((value(field), field) for field in fields):
            if not (words.endswith("or None") if number is None else fits(number)):
                problems.append(f"{field}={number}: {words}")
    start, stop = config.log.profile_start, config.log.profile_stop
    if (start is None) != (stop is None) or (start is not None and not 0 <= start < stop):
        problems.append(f"log.profile_start={start} and log.profile_stop={stop}: both None, or 0 <= start < stop")
    length = config.train.epochs or config.train.steps or 0
    if bool(config.train.epochs) == bool(config.train.steps) or not 0 < length < math.inf:
        problems.append(
            f"train.epochs={config.train.epochs} and train.steps={config.train.steps}:"
            " exactly one of them must be given, the other be None"
        )
    if "float64" in (config.model.dtype, config.model.param_dtype) and not jax.config.jax_enable_x64:
        problems.append("model.dtype, model.param_dtype: float64 needs the environment variable JAX_ENABLE_X64=1")
    if config.ema.decay is None and config.eval.weights == "ema":
        problems.append("eval.weights='ema': there is no moving average without ema.decay")
    if config.init.freeze_backbone and config.optimizer.layer_decay is not None:
        problems.append("init.freeze_backbone with optimizer.layer_decay: only the head is trained, at the full rate")
    if "attention" in config.task:
        problems.append(f"task.attention={config.task.attention!r}: it is model.attention now")
    unused = [("alpha", "attention", config.model.attention != "polarity")]
    unused += [("kernel_size", "convolution", config.model.convolution is False)]
    for name, chosen, is_unused in unused:
        if (value := config.model[name]) is not None and is_unused:
            problems.append(
                f"model.{name}={value}: with model.{chosen}={config.model[chosen]!r} there is none; set it to None"
            )
    kind = "sequences" if config.task.name in SEQUENCE_TASKS else config.task.name
    of_kind = {"sequences": _sequence_problems, "segmentation": _segmentation_problems, "image": _image_problems}
    problems += of_kind.get(kind, lambda _: [])(config)
    if problems:
        raise UserError("the config cannot work:\n" + "\n".join(f"  {problem}" for problem in problems))


def _image_problems(config) -> list[str]:
    problems = [*_of_images(config), *_without_head(config)]
    if config.data.source == "masks":
        problems.append("data.source='masks': with task.name='image' it is tfds or folder; masks are for segmentation")
    for field in ("crop_area", "crop_aspect"):
        problems += _pair_problems(config, f"augment.{field}")
    if config.augment.crop_area[-1] > 1:
        problems.append(f"augment.crop_area={config.augment.crop_area}: a crop is at most the whole image, 1.0")
    if config.eval.crop != config.model.img_size:
        problems.append(f"eval.crop={config.eval.crop}: it must equal model.img_size={config.model.img_size}")
    if config.eval.resize < config.eval.crop:
        problems.append(f"eval.resize={config.eval.resize}: it must be at least eval.crop={config.eval.crop}")
    return problems


def _of_images(config) -> list[str]:
    """What all tasks on images refuse."""
    if config.data.source != "lra" and config.model.name != "pola_sequence":
        return []
    return [
        f"task.name={config.task.name!r} with data.source={config.data.source!r}, model.name={config.model.name!r}:"
        " sequence models and data belong to sequence tasks, see the recipe lra"
    ]


def _without_head(config) -> list[str]:
    """What all tasks but segmentation refuse."""
    unset, problems = defaults(), []
    for field in _OF_SEGMENTATION:
        part, name = field.split(".")
        if _plain(config[part][name]) != _plain(unset[part][name]):
            problems.append(
                f"{field}={config[part][name]!r}: it is of segmentation, and task.name={config.task.name!r}"
            )
    if config.checkpoint.best_metric == "miou":
        problems.append("checkpoint.best_metric='miou': only segmentation has it; take accuracy or loss")
    return problems


def _plain(value: Any) -> Any:
    """As it was before it was stored as JSON."""
    return tuple(value) if isinstance(value, list) else value


def _pair_problems(config, field: str) -> list[str]:
    part, name = field.split(".")
    pair = tuple(config[part][name])
    if len(pair) == 2 and 0 < pair[0] <= pair[1] < math.inf:
        return []
    return [f"{field}={pair}: it is a pair (low, high) with 0 < low <= high"]


def _segmentation_problems(config) -> list[str]:
    problems = [*_of_images(config), *_pair_problems(config, "augment.ratio")]
    if config.data.source == "folder":
        problems.append("data.source='folder': with task.name='segmentation' it is tfds or masks")
    if config.model.head not in HEADS:
        problems.append(f"model.head={config.model.head!r}: with task.name='segmentation' it is {' or '.join(HEADS)}")
    if config.checkpoint.best_metric == "accuracy":
        problems.append("checkpoint.best_metric='accuracy': of segmentation it is miou or loss")
    for part, name in (("augment", "scale"), ("eval", "scale")):
        scale = config[part][name]
        if scale is not None and (len(scale) != 2 or not all(type(side) is int and side > 0 for side in scale)):
            problems.append(f"{part}.{name}={scale}: it is a pair of sides in pixels, such as (2048, 512), or None")
    scales = tuple(config.eval.scales)
    numbers = all(isinstance(scale, int | float) and 0 < scale < math.inf for scale in scales)
    if not scales or not numbers or len(set(scales)) < len(scales):
        problems.append(f"eval.scales={scales}: positive numbers, each once, such as (0.5, 1.0, 2.0)")
    window, stride = config.eval.window, config.eval.stride
    if window is not None and (window < 32 or window % 32):
        problems.append(f"eval.window={window}: it must be a multiple of 32, or None")
    if stride is not None and (window is None or not 0 < stride <= window or stride % 32):
        problems.append(f"eval.stride={stride}: it must be a multiple of 32, and at most eval.window={window}")
    if config.augment.rand_augment is not None or any(
        config.augment[name] for name in ("erase_prob", "mixup", "cutmix")
    ):
        problems.append("augment.rand_augment, erase_prob, mixup, cutmix: they are of classification")
    if config.train.label_smoothing:
        problems.append(f"train.label_smoothing={config.train.label_smoothing}: of segmentation it is 0")
    return problems


def _sequence_problems(config) -> list[str]:
    name, tokenisation = config.task.name, config.task.tokenisation
    problems = _without_head(config)
    problems += [
        f"{field}={value!r}: with task.name={name!r} it is {expected!r}"
        for field, value, expected in (
            ("data.source", config.data.source, "lra"),
            ("model.name", config.model.name, "pola_sequence"),
        )
        if value != expected
    ]
    if tokenisation not in SEQUENCE_TASKS[name]:
        listed = ", ".join(map(str, SEQUENCE_TASKS[name]))
        problems.append(f"task.tokenisation={tokenisation!r}: with task.name={name!r} it is {listed}")
    for field in ("optimizer.layer_decay", "model.convolution", "model.gate", "model.mlp_ratio"):
        part, name = field.split(".")
        if (value := config[part][name]) is not None:
            problems.append(f"{field}={value}: it is for image models")
    return problems
