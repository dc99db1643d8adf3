"""Pola-PVT on ImageNet-1k, 224 pixels.

    polaformer train --config pola_pvt:t --workdir runs/pola_pvt_t --config.data.data_dir=/data/tfds

Models: t, s, m, b. Published top-1 (the paper, not measured here): t 78.8 %, s 81.9 %; m and b are not published.
This is the official recipe: model, augmentation, loss, optimizer and schedule. The batches are those of the official
launch on 8 devices: t 1024, s 512, m 512, b 256. Options: `img_size=`, a multiple of 32 (evaluation resizes in
proportion).
"""

from polaformer_jax.config import defaults, use_official_augmentation
from polaformer_jax.training.recipes import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, models=("t", "s", "m", "b"), img_size=224)
    config = defaults()
    config.model.name = f"pola_pvt_{arg.model}"
    config.model.img_size = config.eval.crop = arg.img_size
    config.eval.resize = round(arg.img_size * 256 / 224)

    use_official_augmentation(config)
    config.train.epochs = 300.0
    config.train.batch_size = {"t": 1024, "s": 512, "m": 512, "b": 256}[arg.model]
    config.optimizer.lr = 5e-4
    config.optimizer.weight_decay = 0.05
    if arg.model in ("m", "b"):
        config.optimizer.clip_norm = 1.0

    config.schedule.warmup = 5.0
    config.schedule.warmup_lr = 1e-6
    config.schedule.min_lr = 1e-5
    config.schedule.cooldown = 10.0
    config.lock()
    return config
