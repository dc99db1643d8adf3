"""Checks of the values of a config, before anything is built from it."""

import math
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from polaformer_jax.config import ATTENTIONS, DTYPES, SEQUENCE_TASKS
from polaformer_jax.errors import UserError

_CHOICES = {
    "task.name": ("image", *SEQUENCE_TASKS),
    "task.attention": ATTENTIONS,
    "data.on_error": ("stop", "skip"),
    "data.on_change": ("stop", "accept"),
    "model.dtype": DTYPES,
    "model.param_dtype": ("float32", "float64"),
    "train.on_nonfinite": ("stop", "skip"),
    "schedule.name": ("cosine", "one_cycle"),
    "debug.transfer_guard": (None, "log", "disallow"),
    "eval.weights": ("raw", "ema"),
    "checkpoint.best_metric": ("accuracy", "loss"),
}
# What numbers must satisfy: the requirement in words, the test, and the fields. "or None" is part of the words.
_RANGES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    (
        "it must be positive and finite",
        lambda x: 0 < x < math.inf,
        (
            *("model.img_size", "train.batch_size", "train.accumulate", "optimizer.lr_base_batch", "optimizer.eps"),
            *("eval.every", "eval.batch_size", "checkpoint.every_steps", "checkpoint.keep_last", "data.prefetch"),
            *("data.buckets", "log.every", "distributed.heartbeat_s"),
        ),
    ),
    (
        "it must not be negative, and finite",
        lambda x: 0 <= x < math.inf,
        (
            *("seed", "data.workers", "augment.mixup", "augment.cutmix", "optimizer.lr", "optimizer.weight_decay"),
            *("schedule.warmup", "schedule.warmup_lr", "schedule.min_lr", "schedule.cooldown"),
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
    problems += _sequence_problems(config) if config.task.name in SEQUENCE_TASKS else _image_problems(config)
    if problems:
        raise UserError("the config cannot work:\n" + "\n".join(f"  {problem}" for problem in problems))


def _image_problems(config) -> list[str]:
    problems = []
    if config.data.source == "lra" or config.model.name == "pola_sequence":
        problems.append(
            f"task.name={config.task.name!r} with data.source={config.data.source!r}, model.name={config.model.name!r}:"
            " sequence models and data belong to sequence tasks, see the recipe lra"
        )
    for field in ("crop_area", "crop_aspect"):
        low_high = tuple(config.augment[field])
        if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1]:
            problems.append(f"augment.{field}={low_high}: it is a pair (low, high) with 0 < low <= high")
        elif field == "crop_area" and low_high[1] > 1:
            problems.append(f"augment.crop_area={low_high}: a crop is at most the whole image, 1.0")
    if config.eval.crop != config.model.img_size:
        problems.append(f"eval.crop={config.eval.crop}: it must equal model.img_size={config.model.img_size}")
    if config.eval.resize < config.eval.crop:
        problems.append(f"eval.resize={config.eval.resize}: it must be at least eval.crop={config.eval.crop}")
    return problems


def _sequence_problems(config) -> list[str]:
    name, tokenisation = config.task.name, config.task.tokenisation
    problems = [
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
    if (decay := config.optimizer.layer_decay) is not None:
        problems.append(f"optimizer.layer_decay={decay}: it is for image models")
    return problems
