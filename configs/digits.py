"""Small PolaFormers on handwritten digits: the run to start with, about two minutes on two CPU cores.

The 1,797 digits that scikit-learn ships, 1,437 to train on and 360 to test with, resized from 8x8 to 32x32 pixels.

    polaformer prepare sklearn_digits --data-dir data
    polaformer train --config digits --workdir runs/digits                # Pola-PVT, or: make train
    polaformer train --config digits:swin --workdir runs/digits_swin      # Pola-Swin
    polaformer train --config digits:pp --workdir runs/digits_pp          # PolaFormer++

Expected: at least 97.5 % of the test digits (there is no published figure). Options: `epochs=`, and `recipe=full` for
the additions of the ImageNet recipe: RandAugment, random erasing, mixup, CutMix, and a moving average of the weights.
"""

from polaformer_jax.config import defaults, use_official_augmentation
from polaformer_jax.errors import UserError
from polaformer_jax.training.recipes import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, models=("pvt", "swin", "pp"), epochs=30.0, recipe="plain")
    if arg.recipe not in ("plain", "full"):
        raise UserError(f"config option recipe={arg.recipe}: it is plain or full")
    config = defaults()
    config.model.name = f"pola_{arg.model}_nano"
    config.model.img_size = 32
    config.model.num_classes = 10
    config.model.dtype = "float32"  # CPUs have no fast bfloat16

    config.data.name = "sklearn_digits"
    config.data.eval_split = "test"
    config.data.workers = 1

    config.augment.crop_area = (0.6, 1.0)
    config.augment.flip = 0.0  # a mirrored digit is not a digit
    if arg.recipe == "full":
        use_official_augmentation(config)
        config.ema.decay = 0.99

    config.train.epochs = arg.epochs
    config.train.batch_size = 64

    config.optimizer.lr = 1e-3
    config.optimizer.lr_base_batch = 64
    config.optimizer.clip_norm = 5.0
    config.schedule.warmup = 2.0

    config.eval.every = 2.0
    config.eval.batch_size = 120
    config.eval.resize = 32
    config.eval.crop = 32
    config.checkpoint.every_steps = 100
    config.log.every = 20
    config.lock()
    return config
