"""The one schema of all configs: every field, its default, its meaning, and every check.

A recipe (`configs/`, `training.recipes`) is a Python file with a function `get_config(arg)` that starts from
`defaults()`, changes what differs and returns it locked, so that a misspelt field is an error. Any field can be
overridden on the command line: `--config.optimizer.lr=1e-3`. ml_collections is imported where it is needed: models take
their choices from here and need no config.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from polaformer_jax.errors import UserError

if TYPE_CHECKING:
    import ml_collections

DTYPES = ("bfloat16", "float32", "float64")
ATTENTIONS = ("polarity", "softmax", "relu")
ATTENTION_IMPLEMENTATIONS = ("auto", "xla", "pallas")
_LISTOPS_TOKENISATIONS = ("brackets", "no_brackets")
# The tasks on sequences, with their tokenisations; (None,) where there is only one.
SEQUENCE_TASKS: dict[str, tuple[str | None, ...]] = {
    "listops": _LISTOPS_TOKENISATIONS,
    "text": (None,),
    "retrieval": (None,),
    "pathfinder": (None,),
    "image_lra": (None,),
    "listops_short": _LISTOPS_TOKENISATIONS,
}
# How a result is computed, which takes other memory and time and changes nothing but rounding. Where a training resumes
# with other values, or an evaluation has other ones than the training, they are logged.
HOW_COMPUTED = ("mesh", "model.remat", "model.attention_impl")
# What a run does about a fault that it meets: errors advise to go on with other values, which are logged.
ON_FAULTS = ("data.on_error", "data.on_change", "train.on_nonfinite")
# Fields that say how, where, on what and how visibly a run runs. All others make its identity: they change its result.
NOT_IDENTITY = (
    *(*HOW_COMPUTED, *ON_FAULTS, "distributed", "log", "checkpoint", "watchdog", "debug"),
    *("data.workers", "data.prefetch", "data.data_dir", "eval.batch_size"),
)
# What function the weights of a run stand for, from the stored example to the logits: an evaluation must have the same.
FUNCTION = ("task", "model", "eval.resize", "eval.crop")
# Parts of FUNCTION that an evaluation may change: precision is logged too, and drop_path acts in training only.
EVALUATION_MAY_CHANGE = (*HOW_COMPUTED, "model.dtype", "model.drop_path")


def is_within(field: str, names: tuple[str, ...]) -> bool:
    """Whether a field is one of these, or in one of these parts of the config."""
    return any(field == name or field.startswith(f"{name}.") for name in names)


def defaults() -> "ml_collections.ConfigDict":
    """A new, unlocked config. Learning rates, weight decay and the schedule are the official ones for ImageNet."""
    import ml_collections
    from ml_collections.config_dict import placeholder

    config = ml_collections.ConfigDict()
    config.seed = 0  # of everything random: initial weights, order of the data, augmentation, stochastic depth

    config.task = task = ml_collections.ConfigDict()
    # "image": image classification; sequences, of the Long Range Arena: "listops", "text", "retrieval", "pathfinder",
    # "image_lra", and "listops_short", which is not part of it.
    task.name = "image"
    task.tokenisation = placeholder(str)  # of ListOps: "brackets", or "no_brackets" (closing brackets dropped)
    task.attention = "polarity"  # of sequence models; "softmax" and linear "relu" are the baselines

    config.model = model = ml_collections.ConfigDict()
    model.name = "pola_pvt_t"  # one of polaformer_jax.list_models()
    model.img_size = 224  # pixels, square
    model.num_classes = placeholder(int)  # None: as many as the data set has
    model.num_classes = 1000
    model.drop_path = placeholder(float)  # largest rate of stochastic depth; None: the model's default
    model.dtype = "bfloat16"  # of activations and matrix products: bfloat16, float32 (or float64)
    model.param_dtype = "float32"  # of stored parameters
    model.remat = False  # recompute each block's activations in the backward pass: less memory, more time
    # Polarity-aware attention by "xla" operations, by one "pallas" kernel, or "auto": the kernel on TPUs.
    model.attention_impl = "auto"
    model.attn_type = placeholder(str)  # this and the next five: None is the model's default
    model.window_size = placeholder(int)  # Pola-Swin only
    model.softmax_window_size = placeholder(int)  # Pola-Swin only
    model.alpha = placeholder(float)
    model.kernel_size = placeholder(int)
    model.flags = placeholder(str)  # PolaFormer++ only: l or v for each block, "ll,lv,vvvv,vv"; one letter for a stage

    config.init = init = ml_collections.ConfigDict()
    init.weights = placeholder(str)  # weights file to start from, or to evaluate; None: random initialisation
    init.freeze_backbone = False  # train the classifier only

    config.data = data = ml_collections.ConfigDict()
    # "tfds": prepared as ArrayRecord; "folder": DATA_DIR/{train,val}/CLASS/*.jpeg; "lra": Long Range Arena.
    data.source = "tfds"
    data.name = "imagenet2012"  # for a folder, only used in messages
    data.data_dir = "data"  # for a folder, the one that holds train/ and val/
    data.train_split = "train"
    data.eval_split = "validation"
    data.test_split = placeholder(str)  # the best checkpoint is reported on it; None: on eval_split
    # Sequences are batched by length and padded to one of this many lengths, each compiled once; 1: all are padded to
    # the maximum length.
    data.buckets = 8
    # Worker processes that read, decode and augment, and as many for evaluation; 0: done in the main process.
    data.workers = 8
    data.prefetch = 1  # batches prefetched by each worker (which holds up to 2 * prefetch + 2 in memory)
    data.on_error = "stop"  # on a record that cannot be decoded: "stop", or "skip" and count it
    # On other examples than those that the run was begun with: "stop", or "accept" them and go on, which is recorded.
    data.on_change = "stop"

    config.augment = augment = ml_collections.ConfigDict()
    augment.crop_area = (0.08, 1.0)  # of random resized crops: fraction of the image's area
    augment.crop_aspect = (3 / 4, 4 / 3)  # and width / height
    augment.flip = 0.5  # probability of a horizontal flip
    augment.rand_augment = placeholder(str)  # policy such as "rand-m9-mstd0.5-inc1"; None: no RandAugment
    augment.erase_prob = 0.0  # probability of erasing a random box of an image
    augment.mixup = 0.0  # a of the Beta(a, a) distribution of the mixing weight; 0: no mixup
    augment.cutmix = 0.0  # the same for CutMix
    augment.mix_prob = 1.0  # probability of mixing a batch at all
    augment.switch_prob = 0.5  # probability of CutMix instead of mixup, where both are enabled

    config.train = train = ml_collections.ConfigDict()
    train.epochs = placeholder(float)  # exactly one of epochs and steps is set, the other is None
    train.steps = placeholder(int)
    train.batch_size = 1024  # examples per optimizer update, over all devices and hosts
    train.accumulate = 1  # micro-batches of a batch, one after the other: less memory
    train.label_smoothing = 0.1
    train.on_nonfinite = "stop"  # on a non-finite loss or gradient: "stop" the run, or "skip" and count the step

    config.optimizer = optimizer = ml_collections.ConfigDict()
    optimizer.lr = 5e-4  # at a batch of lr_base_batch; this, warmup_lr and min_lr scale with train.batch_size
    optimizer.lr_base_batch = 512
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.05
    optimizer.clip_norm = placeholder(float)  # maximum global norm of the gradient; None: no clipping
    optimizer.clip_value = placeholder(float)  # maximum absolute value, before clip_norm; None: no clipping
    optimizer.layer_decay = placeholder(float)  # factor of the learning rate from each layer to the one below

    config.schedule = schedule = ml_collections.ConfigDict()
    # "cosine", or "one_cycle": linear from lr / 25 to lr at the end of the warm-up, then linear to lr / 250,000.
    schedule.name = "cosine"
    schedule.warmup = 5.0  # in the unit of train (epochs or steps), like cooldown
    schedule.warmup_lr = 1e-6  # this and min_lr are used by "cosine"
    schedule.min_lr = 1e-5
    schedule.cooldown = 0.0  # at min_lr, after the cosine; added to epochs or steps

    config.ema = ema = ml_collections.ConfigDict()
    ema.decay = placeholder(float)  # of the exponential moving average (EMA) of the weights; None: no EMA

    config.eval = evaluation = ml_collections.ConfigDict()
    evaluation.every = 1.0  # in the unit of train; and always at the end
    evaluation.batch_size = 1024
    evaluation.weights = "raw"  # "raw" or "ema": reported, and used to choose the best checkpoint
    evaluation.resize = 256  # pixels, both sides (the aspect is not kept, as in the official evaluation)
    evaluation.crop = 224  # central crop, the model's input; equals model.img_size

    config.checkpoint = checkpoint = ml_collections.ConfigDict()
    checkpoint.every_steps = 1000  # and after each evaluation
    checkpoint.every_minutes = placeholder(float)  # and at this interval; None: not by time
    checkpoint.every_minutes = 30.0
    checkpoint.keep_last = 2
    checkpoint.best_metric = "accuracy"  # or "loss": the best evaluated checkpoint is also kept
    checkpoint.best_after = 0.0  # checkpoints before this fraction of the steps cannot be the best

    config.mesh = mesh = ml_collections.ConfigDict()
    mesh.data = -1  # replicas of the state; -1: as many as the devices allow, devices / fsdp
    mesh.fsdp = 1  # devices over which parameters, optimizer state and EMA of a replica are sharded

    config.log = log = ml_collections.ConfigDict()
    log.every = 50  # steps
    log.pictures = True  # plot curves, confusion matrix and test images at the end
    log.profile_start = placeholder(int)  # first step of a trace for TensorBoard's profiler; None: no trace
    log.profile_stop = placeholder(int)  # the step before which it ends

    config.distributed = distributed = ml_collections.ConfigDict()
    distributed.coordinator = placeholder(str)  # HOST:PORT of process 0; None: from the environment, if set there
    distributed.num_processes = placeholder(int)
    distributed.process_id = placeholder(int)
    distributed.heartbeat_s = 60  # a process silent for this long is lost, and all processes end

    config.watchdog = watchdog = ml_collections.ConfigDict()
    watchdog.step_s = placeholder(float)  # a step, save or evaluation batch that takes longer ends the run
    watchdog.step_s = 1800.0
    watchdog.input_s = placeholder(float)  # the same for a batch from the workers; None: no limit
    watchdog.input_s = 900.0

    config.debug = debug = ml_collections.ConfigDict()
    debug.nans = False  # on NaN, rerun the step operation by operation and stop at the first NaN
    debug.deterministic = False  # on GPUs, use deterministic operations only: slower
    debug.transfer_guard = placeholder(str)  # "log" or "disallow" implicit transfers

    return config


def may_be_none(field: str) -> bool:
    """Whether a field may be None, e.g. `train.epochs`: those that `defaults` declares as placeholders, and no others.

    True for a field that is not in the schema, such as one of a recipe of one's own.
    """
    from ml_collections.config_dict import FieldReference

    node, *names = defaults(), *field.split(".")
    for name in names:
        if not hasattr(node, "keys") or name not in node:
            return True
        node = dict(node.items(preserve_field_references=True))[name]
    return isinstance(node, FieldReference)


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


def check(config: "ml_collections.ConfigDict") -> None:
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
    if "float64" in (config.model.dtype, config.model.param_dtype) and not _x64_is_enabled():
        problems.append("model.dtype, model.param_dtype: float64 needs the environment variable JAX_ENABLE_X64=1")
    if config.ema.decay is None and config.eval.weights == "ema":
        problems.append("eval.weights='ema': there is no moving average without ema.decay")
    if config.init.freeze_backbone and config.optimizer.layer_decay is not None:
        problems.append("init.freeze_backbone with optimizer.layer_decay: only the head is trained, at the full rate")
    problems += _sequence_problems(config) if config.task.name in SEQUENCE_TASKS else _image_problems(config)
    if problems:
        raise UserError("the config cannot work:\n" + "\n".join(f"  {problem}" for problem in problems))


def _x64_is_enabled() -> bool:
    import jax

    return jax.config.jax_enable_x64


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


def use_official_augmentation(config: "ml_collections.ConfigDict") -> None:
    """Enables what the official recipe does to training images beyond crop and flip."""
    config.augment.rand_augment = "rand-m9-mstd0.5-inc1"
    config.augment.erase_prob = 0.25
    config.augment.mixup = 0.8
    config.augment.cutmix = 1.0
