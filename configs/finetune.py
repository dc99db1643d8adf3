"""Fine-tuning of trained weights on your own data set, whose classes are taken from the data.

    polaformer train --config finetune:pola_swin_t --config.init.weights=pola_swin_t.pth \
        --config.data.data_dir=flowers --workdir runs/flowers

`flowers/{train,val}/CLASS/*.jpeg` is a folder of images, one folder per class. A tensorflow-datasets data set is given
by name: `--config finetune:pola_swin_t,source=tfds --config.data.name=oxford_flowers102
--config.data.eval_split=validation`. A starting point to tune: there is no published figure to compare with. The
augmentation is the official one; the learning rate is a tenth of the official one, and decreases from each layer to the
one below, for 30 epochs.

Models: the image models of `polaformer_jax.list_models()`. Options: `source=` folder or tfds; `img_size=`, 0 for that
of the model.
"""

from polaformer_jax import list_models
from polaformer_jax.config import defaults, use_official_augmentation
from polaformer_jax.errors import UserError
from polaformer_jax.models import registry
from polaformer_jax.training.recipes import parse_arg


def get_config(arg=None):
    images = [name for name in list_models() if name != "pola_sequence"]
    models = sorted(images, key=lambda name: name != "pola_swin_t")  # the default comes first
    arg = parse_arg(arg, models=models, source="folder", img_size=0)
    if arg.source not in ("folder", "tfds"):
        raise UserError(f"config option source={arg.source}: it is folder or tfds")
    config = defaults()
    config.model.name = arg.model
    config.model.num_classes = None
    config.model.img_size = config.eval.crop = arg.img_size or registry.model_config(arg.model).img_size
    # At 384 pixels and more the model sees the whole image, as in the official evaluation.
    config.eval.resize = config.eval.crop if config.eval.crop >= 384 else round(config.eval.crop * 256 / 224)
    config.data.source = arg.source
    if arg.source == "folder":
        config.data.name = "folder"
        config.data.eval_split = "val"

    use_official_augmentation(config)
    config.train.epochs = 30.0
    config.train.batch_size = 128
    config.optimizer.lr = 5e-5
    config.optimizer.layer_decay = 0.85
    config.optimizer.clip_norm = 5.0
    config.schedule.warmup = 3.0
    config.schedule.warmup_lr = 5e-8
    config.schedule.min_lr = 5e-7
    config.lock()
    return config
