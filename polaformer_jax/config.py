"""The one schema of all configs: every field, its default and its meaning; `training.config_checks` has the checks.

A recipe (`configs/`, `training.recipes`) is a Python file with a function `get_config(arg)` that starts from
`defaults()`, changes what differs and returns it locked, so that a misspelt field is an error. Any field can be
overridden on the command line: `--config.optimizer.lr=1e-3`. ml_collections is imported where it is needed: models take
their choices from here and need no config.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ml_collections

DTYPES = ("bfloat16", "float32", "float64")
ATTENTIONS = ("polarity", "softmax", "relu")
HEADS = ("semantic_fpn", "upernet")
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
    # "image": image classification; "segmentation": semantic segmentation; sequences, of the Long Range Arena:
    # "listops", "text", "retrieval", "pathfinder", "image_lra", and "listops_short", which is not part of it.
    task.name = "image"
    task.tokenisation = placeholder(str)  # of ListOps: "brackets", or "no_brackets" (closing brackets dropped)

    config.model = model = ml_collections.ConfigDict()
    model.name = "pola_pvt_t"  # one of polaformer_jax.list_models(); in segmentation the backbone
    model.img_size = 224  # pixels, square; in segmentation the side of training crops
    model.num_classes = placeholder(int)  # None: as many as the data set has
    model.num_classes = 1000
    model.drop_path = placeholder(float)  # largest rate of stochastic depth; None: the model's default
    model.dtype = "bfloat16"  # of activations and matrix products: bfloat16, float32 (or float64)
    model.param_dtype = "float32"  # of stored parameters
    model.remat = False  # recompute each block's activations in the backward pass: less memory, more time
    # Attention and MLPs by "xla" operations, by "pallas" kernels, or "auto": kernels on TPUs, where they save traffic.
    model.attention_impl = "auto"
    model.attn_type = placeholder(str)  # None is the model's default, here and in the next five
    model.window_size = placeholder(int)  # Pola-Swin only
    model.softmax_window_size = placeholder(int)  # Pola-Swin only
    model.alpha = placeholder(float)
    model.kernel_size = placeholder(int)
    # What linear blocks (type L) and sequence models compute: "polarity", or the baselines "softmax" and linear "relu";
    # PolaFormer++ has "polarity" only.
    model.attention = "polarity"
    model.convolution = placeholder(bool)  # of the values, beside the attention; Pola-PVT and Pola-Swin only
    model.gate = placeholder(bool)  # of the attention's result; Pola-PVT and Pola-Swin only
    model.mlp_ratio = placeholder(float)  # hidden channels of the MLPs over those of the block, the same in all stages
    model.flags = placeholder(str)  # PolaFormer++ only: l or v for each block, "ll,lv,vvvv,vv"; one letter for a stage
    model.head = placeholder(str)  # segmentation only, like the next two: "semantic_fpn" or "upernet"
    model.head_channels = placeholder(int)  # None: 128 of semantic_fpn, 512 of upernet
    model.auxiliary_channels = placeholder(int)  # of the auxiliary head of upernet; 0: none; None: 256

    config.init = init = ml_collections.ConfigDict()
    init.weights = placeholder(str)  # weights file to start from, or to evaluate; None: random initialisation
    init.freeze_backbone = False  # train the classifier, or the segmentation head, only
    init.freeze_statistics = False  # batch normalisations of the backbone keep their running statistics, and use them

    config.data = data = ml_collections.ConfigDict()
    # "tfds": prepared as ArrayRecord; "folder": DATA_DIR/{train,val}/CLASS/*.jpeg; "masks": folders of images and of
    # masks, for segmentation; "lra": Long Range Arena.
    data.source = "tfds"
    data.name = "imagenet2012"  # for a folder, only used in messages
    data.data_dir = "data"  # for a folder, the one that holds train/ and val/
    data.train_split = "train"
    data.eval_split = "validation"
    data.image_dir = placeholder(str)  # of "masks", below data_dir; None: "images/{split}", {split} being the split
    data.mask_dir = placeholder(str)  # None: "annotations/{split}"
    # Whether 0 in masks is none of the classes, and 1 the first one; None: as the data says.
    data.reduce_zero_label = placeholder(bool)
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
    # Segmentation resizes images into a box of (long, short) side times a random ratio, keeping their aspect, crops a
    # part in which no class has more than a share of the labelled pixels, if ten draws find one, and changes colours.
    augment.scale = placeholder(tuple)  # None: the size of the image itself, times the ratio
    augment.ratio = (0.5, 2.0)
    augment.max_class_share = 0.75
    augment.distortion = True  # of brightness, contrast, saturation and hue
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
    train.loss_pixels = "all"  # the segmentation loss is divided by "all" pixels of the crops, or the "labelled" ones
    train.auxiliary_weight = 0.4  # of the loss of the auxiliary segmentation head
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
    optimizer.head_factor = 1.0  # of the learning rate of all that is not the backbone, in segmentation

    config.schedule = schedule = ml_collections.ConfigDict()
    # "cosine"; "poly": (1 - step / steps) ** power, times a linear warm-up; or "one_cycle": linear from lr / 25 to lr
    # at the end of the warm-up, then linear to lr / 250,000.
    schedule.name = "cosine"
    schedule.power = 1.0  # of "poly"
    schedule.warmup = 5.0  # in the unit of train (epochs or steps), like cooldown
    schedule.warmup_lr = 1e-6  # this and min_lr are used by "cosine" and "poly"
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
    # Segmentation resizes images into a box of (long, short) side, keeping their aspect, then up to multiples of 32.
    evaluation.scale = placeholder(tuple)  # None: their own size
    evaluation.window = placeholder(int)  # side of sliding windows, a multiple of 32; None: the whole image at once
    evaluation.stride = placeholder(int)  # of the windows; None: they do not overlap
    evaluation.scales = (1.0,)  # factors of `scale`, and so sizes of each image, whose probabilities are averaged
    evaluation.flip = False  # also the mirrored image

    config.checkpoint = checkpoint = ml_collections.ConfigDict()
    checkpoint.every_steps = 1000  # and after each evaluation
    checkpoint.every_minutes = placeholder(float)  # and at this interval; None: not by time
    checkpoint.every_minutes = 30.0
    checkpoint.keep_last = 2
    checkpoint.best_metric = "accuracy"  # or "loss", "miou": the best evaluated checkpoint is also kept
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


def use_official_augmentation(config: "ml_collections.ConfigDict") -> None:
    """Enables what the official recipe does to training images beyond crop and flip."""
    config.augment.rand_augment = "rand-m9-mstd0.5-inc1"
    config.augment.erase_prob = 0.25
    config.augment.mixup = 0.8
    config.augment.cutmix = 1.0
