"""Looks a config through before anything is built: every problem is found, all are reported at once."""

import math

import jax

from polaformer_jax.data.lra import facts as lra
from polaformer_jax.errors import UserError
from polaformer_jax.models.pola_sequence import ATTENTIONS
from polaformer_jax.training.checkpoints import GREATER_IS_BETTER

SEQUENCES = tuple(lra.TASKS)
CHOICES = {
    "task.name": ("image", *SEQUENCES),
    "task.attention": ATTENTIONS,
    "data.on_error": ("stop", "skip"),
    "model.dtype": ("bfloat16", "float32", "float64"),
    "model.param_dtype": ("float32", "float64"),
    "train.on_nonfinite": ("stop", "skip"),
    "schedule.name": ("cosine", "one_cycle"),
    "debug.transfer_guard": (None, "log", "disallow"),
    "eval.weights": ("raw", "ema"),
    "checkpoint.best_metric": tuple(GREATER_IS_BETTER),
}
POSITIVE = (
    "model.img_size",
    "train.batch_size",
    "train.accumulate",
    "optimizer.lr_base_batch",
    "optimizer.eps",
    "eval.every",
    "eval.batch_size",
    "checkpoint.every_steps",
    "checkpoint.keep_last",
    "data.prefetch",
    "data.buckets",
    "log.every",
    "distributed.heartbeat_s",
)
NOT_NEGATIVE = (
    "seed",
    "data.workers",
    "augment.mixup",
    "augment.cutmix",
    "optimizer.lr",
    "optimizer.weight_decay",
    "schedule.warmup",
    "schedule.warmup_lr",
    "schedule.min_lr",
    "schedule.cooldown",
)


def check_config(config) -> None:
    """Raises one UserError that lists every field whose value cannot work, and what could."""
    problems = []

    def value(field: str):
        part = config
        for name in field.split("."):
            part = part[name]
        return part

    for field, choices in CHOICES.items():
        if value(field) not in choices:
            problems.append(f"{field}={value(field)!r}: it is one of {', '.join(map(str, choices))}")
    for fields, fits, text in (
        (POSITIVE, lambda number: 0 < number < math.inf, "it must be positive and finite"),
        (NOT_NEGATIVE, lambda number: 0 <= number < math.inf, "it must not be negative, and finite"),
        (("optimizer.b1", "optimizer.b2"), lambda number: 0 <= number < 1, "it must be in [0, 1)"),
    ):
        problems += [f"{field}={value(field)}: {text}" for field in fields if not fits(value(field))]
    for field in ("clip_norm", "clip_value"):
        if config.optimizer[field] is not None and not config.optimizer[field] > 0:
            problems.append(f"optimizer.{field}={config.optimizer[field]}: it must be positive, or None")
    if not 0 <= config.checkpoint.best_after < 1:
        problems.append(f"checkpoint.best_after={config.checkpoint.best_after}: it must be in [0, 1)")

    for field in ("checkpoint.every_minutes", "watchdog.step_s", "watchdog.input_s"):
        if value(field) is not None and not 0 < value(field) < math.inf:
            problems.append(f"{field}={value(field)}: it must be positive and finite, or None")
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
    if not 0 <= config.train.label_smoothing < 1:
        problems.append(f"train.label_smoothing={config.train.label_smoothing}: it must be in [0, 1)")
    for field in ("flip", "erase_prob", "mix_prob", "switch_prob"):
        if not 0 <= config.augment[field] <= 1:
            problems.append(f"augment.{field}={config.augment[field]}: it is a probability")
    if config.ema.decay is not None and not 0 <= config.ema.decay < 1:
        problems.append(f"ema.decay={config.ema.decay}: it must be in [0, 1), or None")
    if config.ema.decay is None and config.eval.weights == "ema":
        problems.append("eval.weights='ema': there is no moving average without ema.decay")
    if config.optimizer.layer_decay is not None and not 0 < config.optimizer.layer_decay <= 1:
        problems.append(f"optimizer.layer_decay={config.optimizer.layer_decay}: it must be in (0, 1], or None")
    if config.init.freeze_backbone and config.optimizer.layer_decay is not None:
        problems.append(
            "init.freeze_backbone with optimizer.layer_decay: only the head is trained, whose rate is whole"
        )
    problems += _sequence_problems(config) if config.task.name in SEQUENCES else _image_problems(config)
    if problems:
        raise UserError("the config cannot work:\n" + "\n".join(f"  {problem}" for problem in problems))


def _image_problems(config) -> list[str]:
    problems = []
    if config.data.source == "lra" or config.model.name == "pola_sequence":
        problems.append(
            f"task.name={config.task.name!r} with data.source={config.data.source!r}, model.name={config.model.name!r}:"
            " the model and the data of sequences belong to their tasks, see configs/lra.py"
        )
    for field in ("crop_area", "crop_aspect"):
        low_high = tuple(config.augment[field])
        if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1]:
            problems.append(f"augment.{field}={low_high}: it is a pair (low, high) with 0 < low <= high")
    if len(tuple(config.augment.crop_area)) == 2 and config.augment.crop_area[1] > 1:
        problems.append(f"augment.crop_area={tuple(config.augment.crop_area)}: a crop is at most the whole image, 1.0")
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
    allowed = lra.facts_of(name).tokenisations
    if tokenisation not in allowed:
        listed = ", ".join(map(str, allowed))
        problems.append(f"task.tokenisation={tokenisation!r}: with task.name={name!r} it is {listed}")
    if config.optimizer.layer_decay is not None:
        problems.append(f"optimizer.layer_decay={config.optimizer.layer_decay}: it is for the models of images")
    return problems
