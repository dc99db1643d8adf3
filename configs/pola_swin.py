"""Pola-Swin on ImageNet-1k, 224 pixels, and Pola-Swin-B at 384.

    polaformer train --config pola_swin:t --workdir runs/pola_swin_t --config.data.data_dir=/data/tfds

Models: t, s, b, b_384. Published top-1 (the paper, not measured here): t 82.6 %, s 83.6 %, b 83.8 %; b_384 is not
published. This is the official recipe: model, augmentation, loss, optimizer and schedule. The batches are those of the
official launch on 8 devices: t and s 1024, b 512, b_384 256. b_384 is meant to start from trained weights
(`--config.init.weights`). No options.
"""

from polaformer_jax.config import defaults, use_official_augmentation
from polaformer_jax.training.recipes import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, models=("t", "s", "b", "b_384"))
    fine_tune = arg.model == "b_384"
    config = defaults()
    config.model.name = f"pola_swin_{arg.model}"

    use_official_augmentation(config)
    config.train.epochs = 30.0 if fine_tune else 300.0
    config.train.batch_size = {"t": 1024, "s": 1024, "b": 512, "b_384": 256}[arg.model]
    config.optimizer.lr = 5e-4
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 5.0

    config.schedule.warmup = 20.0
    config.schedule.warmup_lr = 5e-7
    config.schedule.min_lr = 5e-6

    if fine_tune:
        config.model.img_size = config.eval.resize = config.eval.crop = 384
        config.optimizer.lr = 2e-5
        config.optimizer.weight_decay = 1e-8
        config.schedule.warmup = 5.0
        config.schedule.warmup_lr = 2e-8
        config.schedule.min_lr = 2e-7
    config.lock()
    return config
