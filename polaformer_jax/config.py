"""The one schema of all configs: every field, its default, and what it means.

A config (`digits.py`, `lra.py`, `pola_pvt.py`, `pola_swin.py`) starts from `defaults()`, changes what differs and
returns it locked, so that a misspelt field is an error. Any field can be overridden on the command line:
`--config.optimizer.lr=1e-3`. A field is here only if it acts.
"""

import ast
from collections.abc import Sequence

import ml_collections
from ml_collections.config_dict import placeholder

from polaformer_jax.errors import UserError


def defaults() -> ml_collections.ConfigDict:
    """A new, unlocked config. Learning rates, weight decay and the schedule are ImageNet's official ones."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # initial weights, order of the data, augmentation, stochastic depth: everything random

    config.task = task = ml_collections.ConfigDict()
    # What is learnt. "image": classification of images. Sequences, of the Long Range Arena: "listops", "text",
    # "retrieval", "pathfinder", "image_lra"; and "listops_short".
    task.name = "image"
    task.tokenisation = placeholder(str)  # of ListOps: "brackets", or "no_brackets" (closing ones dropped)
    task.attention = "polarity"  # of sequences; "softmax" and plain linear "relu" are there to compare with

    config.model = model = ml_collections.ConfigDict()
    model.name = "pola_pvt_t"  # one of polaformer_jax.list_models()
    model.img_size = 224  # pixels, square
    model.num_classes = placeholder(int)  # None: as many as the data set has
    model.num_classes = 1000
    model.drop_path = placeholder(float)  # greatest rate of stochastic depth; None: the model's own
    model.dtype = "bfloat16"  # of activations and matrix products: bfloat16, float32 (or float64)
    model.param_dtype = "float32"  # of stored parameters
    model.remat = False  # compute each block's activations anew in the backward pass: less memory, more time
    # Of the polarity-aware attention: "xla" operations, one "pallas" kernel (TPU), or "auto", the kernel on TPUs.
    model.attention_impl = "auto"
    model.attn_type = placeholder(str)  # the rest: None leaves the model's own (see polaformer_jax/zoo.py)
    model.window_size = placeholder(int)  # Pola-Swin only
    model.softmax_window_size = placeholder(int)  # Pola-Swin only
    model.alpha = placeholder(float)
    model.kernel_size = placeholder(int)

    config.init = init = ml_collections.ConfigDict()
    init.weights = placeholder(str)  # file of weights to start from, or to evaluate; None: initial weights
    init.freeze_backbone = False  # train the classifier alone

    config.data = data = ml_collections.ConfigDict()
    # "tfds": prepared in ArrayRecord format; "folder": DATA_DIR/{train,val}/CLASS/*.jpeg; "lra": the sequences' own.
    data.source = "tfds"
    data.name = "imagenet2012"  # of a folder: what messages call it
    data.data_dir = "data"  # of a folder: where train/ and val/ lie
    data.train_split = "train"
    data.eval_split = "validation"
    data.test_split = placeholder(str)  # on which the best checkpoint is reported at the end; None: on eval_split
    # Sequences: batches are grouped by length and padded to one of so many lengths, each of which is compiled; 1: to
    # the longest of all, without grouping.
    data.buckets = 8
    # Processes that read, decode and augment, and as many again for evaluation; 0: in the training process itself.
    data.workers = 8
    data.prefetch = 1  # batches that each worker keeps ready (up to 2 * prefetch + 2 of each in memory)
    data.on_error = "stop"  # a record that cannot be decoded: "stop", or "skip" it and count it

    config.augment = augment = ml_collections.ConfigDict()
    augment.crop_area = (0.08, 1.0)  # random resized crop: share of the image's area
    augment.crop_aspect = (3 / 4, 4 / 3)  # and width / height
    augment.flip = 0.5  # probability of a horizontal flip
    augment.rand_augment = placeholder(str)  # policy such as "rand-m9-mstd0.5-inc1"; None: no RandAugment
    augment.erase_prob = 0.0  # probability of erasing a random box of an image
    augment.mixup = 0.0  # a of the Beta(a, a) distribution of the shares in mixup; 0: no mixup
    augment.cutmix = 0.0  # the same for CutMix
    augment.mix_prob = 1.0  # probability of mixing a batch at all
    augment.switch_prob = 0.5  # of CutMix rather than mixup, where both are on

    config.train = train = ml_collections.ConfigDict()
    train.epochs = placeholder(float)  # exactly one of epochs and steps; the other is None
    train.steps = placeholder(int)
    train.batch_size = 1024  # examples per update, over all devices and hosts
    train.accumulate = 1  # parts of a batch that go through the model one after the other: less memory
    train.label_smoothing = 0.1
    train.on_nonfinite = "stop"  # a loss or gradient that is not finite: "stop" the run, or "skip" the step and count

    config.optimizer = optimizer = ml_collections.ConfigDict()
    optimizer.lr = 5e-4  # at a batch of lr_base_batch; this, warmup_lr and min_lr scale with train.batch_size
    optimizer.lr_base_batch = 512
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.05
    optimizer.clip_norm = placeholder(float)  # greatest global norm of the gradient; None: no clipping
    optimizer.clip_value = placeholder(float)  # greatest value in the gradient, before clip_norm; None: no clipping
    optimizer.layer_decay = placeholder(float)  # the rate shrinks by this factor from each layer to the one below

    config.schedule = schedule = ml_collections.ConfigDict()
    # "cosine", or "one_cycle": from lr / 25 in a line to lr at the end of the warm-up, and down to lr / 250,000.
    schedule.name = "cosine"
    schedule.warmup = 5.0  # these durations count in the unit of train: epochs or steps
    schedule.warmup_lr = 1e-6  # this and min_lr are the cosine's
    schedule.min_lr = 1e-5
    schedule.cooldown = 0.0  # at min_lr, after the cosine and on top of epochs or steps

    config.ema = ema = ml_collections.ConfigDict()
    ema.decay = placeholder(float)  # of the moving average of the weights, such as 0.9999; None: no average

    config.eval = evaluation = ml_collections.ConfigDict()
    evaluation.every = 1.0  # in the unit of train; always once more at the end
    evaluation.batch_size = 1024
    evaluation.weights = "raw"  # which weights are reported and choose the best checkpoint: "raw" or "ema"
    evaluation.resize = 256  # pixels, both sides (the aspect is not kept, as in the official evaluation)
    evaluation.crop = 224  # the central part that the model sees; equals model.img_size

    config.checkpoint = checkpoint = ml_collections.ConfigDict()
    checkpoint.every_steps = 1000  # besides the one after each evaluation
    checkpoint.every_minutes = placeholder(float)  # and besides those; None: the clock saves nothing
    checkpoint.every_minutes = 30.0
    checkpoint.keep_last = 2
    checkpoint.best_metric = "accuracy"  # or "loss": which evaluated checkpoint is also kept
    checkpoint.best_after = 0.0  # the best is sought after this share of the steps

    config.mesh = mesh = ml_collections.ConfigDict()
    mesh.data = -1  # rows of devices, each with the whole state; -1: as many as there are devices for
    mesh.fsdp = 1  # devices of a row, over which parameters, optimizer state and moving average are split

    config.log = log = ml_collections.ConfigDict()
    log.every = 50  # steps
    log.pictures = True  # draw curves, confusion matrix and test images at the end
    log.profile_start = placeholder(int)  # a trace for TensorBoard's profiler from before this step; None: none
    log.profile_stop = placeholder(int)  # to before this one

    config.distributed = distributed = ml_collections.ConfigDict()
    distributed.coordinator = placeholder(str)  # HOST:PORT of process 0; None: what the environment says, if anything
    distributed.num_processes = placeholder(int)
    distributed.process_id = placeholder(int)
    distributed.heartbeat_s = 60  # a process that has not been heard of for so long is lost, and all end

    config.watchdog = watchdog = ml_collections.ConfigDict()
    watchdog.step_s = placeholder(float)  # a step, save or evaluation batch that takes longer ends the run; None: none
    watchdog.step_s = 1800.0
    watchdog.input_s = placeholder(float)  # the same for one batch of the workers
    watchdog.input_s = 900.0

    config.debug = debug = ml_collections.ConfigDict()
    debug.nans = False  # run a step that gave NaN again, operation by operation, and stop at the first NaN
    debug.deterministic = False  # on GPUs, only operations that give the same bits each time: slower
    debug.transfer_guard = placeholder(str)  # "log" or "disallow" transfers that are not asked for explicitly

    return config


def augment_officially(config: ml_collections.ConfigDict) -> None:
    """Turns on what the official recipe does to training images, beyond crop and flip."""
    config.augment.rand_augment = "rand-m9-mstd0.5-inc1"
    config.augment.erase_prob = 0.25
    config.augment.mixup = 0.8
    config.augment.cutmix = 1.0


def parse_arg(arg: str | None, *, models: Sequence[str], **options):
    """Reads what follows the colon of `--config file.py:MODEL,key=value,...`.

    Args:
      arg: the text, or None.
      models: valid values of the first, optional item; the first of them is the default.
      **options: the other options and their defaults. A value given is converted to its default's type.

    Returns:
      A ConfigDict with `model` and every option.

    Raises:
      UserError: an unknown model or option, or a value of another type.
    """
    parsed = ml_collections.ConfigDict({"model": models[0], **options})
    items = [item.strip() for item in arg.split(",") if item.strip()] if arg else []
    if items and "=" not in items[0]:
        parsed.model = items.pop(0)
    if parsed.model not in models:
        raise UserError(f"this config has no model {parsed.model!r}; it has {', '.join(models)}")
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or key not in options:
            known = ", ".join(f"{option}=" for option in options) or "none"
            raise UserError(f"unknown config option {item!r}; the options are: {known}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        wanted = type(options[key])
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise UserError(f"config option {key}={text} is not of type {wanted.__name__}")
        parsed[key] = value
    return parsed
