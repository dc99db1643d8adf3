"""Configs of the packaged recipes, and tasks for tests of the steps alone."""

import numpy as np

from polaformer_jax.config import defaults
from polaformer_jax.training import recipes
from polaformer_jax.training.tasks.images import ImageClassification
from tests.support import dense_backbone, dense_model


def recipe(name: str, arg: str | None = None):
    """The config of a packaged recipe."""
    return recipes.load(name if arg is None else f"{name}:{arg}")


def digits(arg: str | None = None):
    return recipe("digits", arg)


def dense_digits(digits_dir, **changes):
    """Of two dense layers on the digits: eight steps of a batch of 16, evaluated every four."""
    config = digits()
    config.data.data_dir = str(digits_dir)
    config.data.workers = 0
    config.model.name = dense_model.NAME  # the loop is tested, not the attention
    config.mesh.data = 2  # of eight fake devices, which take turns on few cores
    config.train.epochs = None
    config.train.steps = 8
    config.train.batch_size = 16
    config.schedule.warmup = 2.0
    config.eval.every = 4.0
    config.eval.batch_size = 100
    config.log.every = 2
    config.checkpoint.every_steps = 3
    config.ema.decay = 0.9
    config.update_from_flattened_dict(changes)
    return config


def image_task(num_classes: int, *, label_smoothing=0.0, dtype="float32", **augment) -> ImageClassification:
    """A task of images; `augment` are fields of `config.augment`."""
    config = defaults()
    config.model.num_classes, config.model.dtype = num_classes, dtype
    config.train.label_smoothing = label_smoothing
    config.augment.update(augment)
    return ImageClassification(config)


def batch_of(seed=0, size=16):
    """A batch of random images of ten classes, all valid."""
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(256, size=(size, 32, 32, 3), dtype=np.uint8),
        "label": rng.integers(10, size=size, dtype=np.int32),
        "mask": np.ones(size, bool),
    }


def means_segmentation(folder, **changes):
    """Of `dense_backbone`, on the images and masks of a folder (`mask_folders`): four steps of eight crops."""
    config = recipe("segmentation", "digits")
    config.model.name = dense_backbone.NAME
    config.model.num_classes = 3
    config.model.img_size = 32
    config.model.head_channels = 4
    config.data.source, config.data.data_dir, config.data.workers = "masks", str(folder), 0
    config.data.train_split, config.data.eval_split = "training", "validation"
    config.mesh.data = 2
    config.train.steps, config.train.batch_size = 4, 8
    config.schedule.warmup = 1.0
    config.eval.every, config.eval.batch_size = 2.0, 2
    config.checkpoint.every_steps, config.log.every = 2, 2
    config.update_from_flattened_dict(changes)
    return config
