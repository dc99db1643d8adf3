"""Configs of the packaged recipes, and tasks for tests of the steps alone."""

from polaformer_jax.config import defaults
from polaformer_jax.training import recipes
from polaformer_jax.training.tasks.images import ImageClassification


def recipe(name: str, arg: str | None = None):
    """The config of a packaged recipe."""
    return recipes.load(name if arg is None else f"{name}:{arg}")


def digits(arg: str | None = None):
    return recipe("digits", arg)


def image_task(num_classes: int, *, label_smoothing=0.0, dtype="float32", **augment) -> ImageClassification:
    """A task of images; `augment` are fields of `config.augment`."""
    config = defaults()
    config.model.num_classes, config.model.dtype = num_classes, dtype
    config.train.label_smoothing = label_smoothing
    config.augment.update(augment)
    return ImageClassification(config)
