"""Semantic segmentation with Semantic FPN or UPerNet, on ADE20K or on scenes of handwritten digits.

    polaformer prepare digit_scenes --data-dir data
    polaformer train --config segmentation:digits --workdir runs/scenes            # or: make segment

    polaformer train --config segmentation:ade20k,model=pola_swin_t,head=upernet --workdir runs/ade20k \
        --config.init.weights=pola_swin_t.pth --config.data.data_dir=/data/tfds

`digits`, the default, takes about five minutes on two CPU cores and reaches at least 90 % mIoU. `ade20k` starts from a
classifier trained on ImageNet, official or one's own; prepare the data by `polaformer prepare ade20k --manual-dir DIR`,
or read the unpacked archive: `--config.data.source=masks --config.data.data_dir=ADEChallengeData2016
--config.data.train_split=training`.

The authors of PolaFormer report ADE20K and have not published the code of it, so the settings are those of the models
that they build on: `semantic_fpn` as PVT (AdamW 1e-4, 80,000 steps of 16 crops), `upernet` as Swin Transformer (AdamW
6e-5, 160,000 steps of 16 crops). Rates of stochastic depth are the classifiers'.

Options: `model=`, an image model of `polaformer_jax.list_models()`; `head=`, semantic_fpn or upernet; `steps=`, 0 for
the head's own (of `digits` 1,500).
"""

from polaformer_jax import list_models, model_config
from polaformer_jax.config import HEADS, defaults
from polaformer_jax.errors import UserError
from polaformer_jax.training.recipes import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, first="data", models=("digits", "ade20k"), model="", head="", steps=0)
    model = arg.model or ("pola_swin_t" if arg.data == "ade20k" else "pola_pp_nano")
    head = arg.head or ("upernet" if arg.data == "ade20k" else "semantic_fpn")
    images = [name for name in list_models() if name != "pola_sequence"]
    for option, value, known in (("model", model, images), ("head", head, HEADS)):
        if value not in known:
            raise UserError(f"config option {option}={value}: it is one of {', '.join(known)}")

    config = defaults()
    config.task.name = "segmentation"
    config.model.name = model
    config.model.head = head
    config.checkpoint.best_metric = "miou"
    config.train.label_smoothing = 0.0
    config.schedule.name = "poly"
    (_ade20k if arg.data == "ade20k" else _digits)(config)
    if arg.steps:
        config.train.steps = arg.steps
        config.schedule.warmup = min(config.schedule.warmup, arg.steps / 10)
    config.lock()
    return config


def _ade20k(config):
    config.model.num_classes = 150
    config.model.img_size = 512
    if model_config(config.model.name).family == "PolaSwin":
        # They divide the grids of the crops, which would be padded for those of the classifiers, 56 and 7.
        config.model.window_size, config.model.softmax_window_size = 64, 8
    config.data.name = "ade20k"
    config.augment.scale = config.eval.scale = (2048, 512)
    config.train.batch_size = config.optimizer.lr_base_batch = 16
    # As in the configs for dense prediction of https://github.com/ZacharyMeng/PolaFormerPP (`norm_eval`).
    config.init.freeze_statistics = model_config(config.model.name).family == "PolaPP"

    if config.model.head == "upernet":
        config.train.steps = 160_000
        config.optimizer.lr = 6e-5
        config.optimizer.weight_decay = 0.01
        config.schedule.warmup = 1500.0
        config.schedule.warmup_lr = 6e-11
    else:
        config.train.steps = 80_000
        config.optimizer.lr = 1e-4
        config.optimizer.weight_decay = 1e-4
        config.schedule.power = 0.9
        config.schedule.warmup = config.schedule.warmup_lr = 0.0
    config.schedule.min_lr = 0.0
    config.eval.every = 8000.0
    config.eval.batch_size = 16
    config.checkpoint.every_steps = 2000


def _digits(config):
    config.model.num_classes = 11
    config.model.img_size = 128  # whole scenes
    config.model.dtype = "float32"  # CPUs have no fast bfloat16
    config.model.head_channels = 32
    config.data.name = "digit_scenes"
    config.data.eval_split = "test"
    config.data.workers = 1
    config.augment.flip = 0.0  # a mirrored digit is not a digit
    config.augment.ratio = (1.0, 1.0)
    config.augment.max_class_share = 1.0

    config.train.steps = 1500
    config.train.batch_size = config.optimizer.lr_base_batch = 8
    config.optimizer.lr = 2e-3
    config.optimizer.clip_norm = 5.0
    config.schedule.warmup = 50.0
    config.schedule.warmup_lr = config.schedule.min_lr = 1e-5
    config.schedule.power = 0.9
    config.eval.every = 250.0
    config.eval.batch_size = 40
    config.checkpoint.every_steps = 250
    config.log.every = 30
