"""A picture of training examples before and after each kind of augmentation.

The first examples of the run that the config describes, with the random numbers that the run draws for them on the
host. Each kind of augmentation on the device is shown by itself, on every image, whatever its probability.
"""

import copy
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from matplotlib.figure import Figure

from polaformer_jax.data import pipeline
from polaformer_jax.data.images import device_transforms, transforms
from polaformer_jax.data.images.normalisation import IMAGENET_MEAN, IMAGENET_STD, normalise
from polaformer_jax.data.records import Example, OnError
from polaformer_jax.errors import UserError
from polaformer_jax.files import figures
from polaformer_jax.files.figures import FAINT, INK
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.step import purpose_key

EXAMPLES = 8
_STEPS, _VISIBLE = 30, (0.3, 0.8)  # see `_mixed_visibly`


class Row(NamedTuple):
    """One kind of augmentation.

    Attributes:
        name: what was done.
        images: uint8 RGB, one for each example; sizes may differ.
        titles: one for each example; empty where the row above has it already.
    """

    name: str
    images: list[np.ndarray]
    titles: list[str]


def preview(config: ml_collections.ConfigDict, *, examples: int = EXAMPLES) -> Figure:
    """Draws the first examples of the training, a row for each kind of augmentation that the config uses.

    Mixing takes its partners from the examples shown.

    Raises:
        UserError: the config is not valid, or a record cannot be read.
    """
    if config.task.name != "image":
        raise UserError(f"task.name={config.task.name!r}: the preview draws the augmentation of image classification")
    experiment = Experiment(config)
    rows, left_out = augmentations(experiment, examples)
    data = figures.plain(f"{config.data.name}, {config.data.train_split}")
    notes = [f"{data}: the first {examples} examples, seed {config.seed}"]
    if left_out:
        notes.append(f"turned off in the config: {', '.join(left_out)}")
    if "targets" in rows[-1].name and config.train.label_smoothing:
        notes.append(f"targets include label smoothing {config.train.label_smoothing:g}")
    return draw(rows, notes)


def augmentations(experiment: Experiment, examples: int) -> tuple[list[Row], list[str]]:
    """The rows of the picture, and the names of the kinds that the config turns off."""
    config = experiment.config
    augment, seed = config.augment, config.seed
    source, transform = experiment.inputs.train_source, transforms.train_transform(config)
    names = source.class_names or tuple(str(label) for label in range(source.num_classes))
    names = tuple(figures.plain(_short(name)) for name in names)
    # Batches of one, since stored images differ in size; random numbers depend only on the position in the stream.
    stream = pipeline.train_batches(source, _Stages(transform), batch_size=1, seed=seed)
    found = [{name: value[0] for name, value in next(stream).items()} for _ in range(examples)]
    stream.close()
    mask = np.stack([example["mask"] for example in found])
    labels = np.stack([example["label"] for example in found])
    blank = [""] * examples
    titles = [names[label] if seen else "cannot be decoded" for label, seen in zip(labels, mask, strict=True)]
    area = " to ".join(f"{100 * share:g}" for share in augment.crop_area)
    rows = [
        Row("as stored", [example["stored"] for example in found], titles),
        Row(f"crop {area} %,\nflip {augment.flip:g}", [example["cropped"] for example in found], blank),
    ]
    left_out = [] if augment.flip else ["flip"]
    if augment.rand_augment is None:
        left_out.append("RandAugment")
    else:
        policy = augment.rand_augment.replace("-inc1", "\n-inc1")
        rows.append(Row(f"RandAugment\n{policy}", [example["image"] for example in found], blank))

    images = normalise(jnp.asarray(np.stack([example["image"] for example in found])))
    if not augment.erase_prob:
        left_out.append("random erasing")
    else:
        erased = device_transforms.random_erasing(images, purpose_key(seed, 0, "erase"), probability=1.0)
        rows.append(Row(f"random erasing\n(probability {augment.erase_prob:g})", _visible(erased), blank))
    both = augment.mixup and augment.cutmix
    for name, alphas, chosen in (
        ("mixup", {"mixup": augment.mixup, "cutmix": 0.0}, 1 - augment.switch_prob if both else 1.0),
        ("CutMix", {"mixup": 0.0, "cutmix": augment.cutmix}, augment.switch_prob if both else 1.0),
    ):
        alpha, probability = max(alphas.values()), augment.mix_prob * chosen
        if not alpha or not probability:
            left_out.append(name)
            continue
        mixed = _mixed_visibly(images, jnp.asarray(mask), seed, alphas)
        targets = device_transforms.mixed_targets(
            jnp.asarray(labels),
            mixed.share,
            num_classes=config.model.num_classes,
            label_smoothing=config.train.label_smoothing,
        )
        head = f"{name}, Beta {alpha:g}\nwith targets\n(probability {probability:g})"
        rows.append(Row(head, _visible(mixed.images), _shares(np.asarray(targets), labels, names)))
    return rows, left_out


def _mixed_visibly(images: jax.Array, mask: jax.Array, seed: int, alphas: dict[str, float]) -> device_transforms.Mixed:
    """Mixes with the keys of the first step that leaves much of both images; many leave almost nothing of one."""
    for step in range(_STEPS):
        key = purpose_key(seed, step, "mix")
        mixed = device_transforms.mix(images, mask, key, **alphas, probability=1.0, switch_probability=0.5)
        if _VISIBLE[0] <= float(mixed.share.min()) <= _VISIBLE[1]:
            break
    return mixed


def draw(rows: list[Row], notes: list[str]) -> Figure:
    """Draws rows of images, the notes above them."""
    columns = len(rows[0].images)
    heights = [1.42 + 0.17 * max(title.count("\n") + bool(title) for title in row.titles) for row in rows]
    figure = figures.new(1.35 * columns + 1.6, sum(heights) + 0.25 * len(notes) + 0.15, pad=0.03)
    figure.suptitle("\n".join(notes), x=0.01, ha="left", color=INK, fontsize=10, fontweight="bold")
    grid = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, line in zip(rows, grid, strict=True):
        line[0].set_ylabel(row.name, rotation=0, ha="right", va="center", color=INK, fontsize=9, labelpad=8)
        for axes, image, title in zip(line, row.images, row.titles, strict=True):
            axes.imshow(image, interpolation="nearest")
            axes.set_title(title, fontsize=8, color=INK, pad=3)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_color(FAINT)
    return figure


@dataclasses.dataclass(frozen=True)
class _Stages:
    """Applies `transform`, and adds the image after each stage, all from the same random numbers."""

    transform: transforms.TrainImageTransform

    @property
    def on_error(self) -> OnError:
        return self.transform.on_error

    def __call__(self, record, rng: np.random.Generator) -> Example:
        plain = dataclasses.replace(self.transform, rand_augment=None)
        cropped = plain(record, copy.deepcopy(rng))["image"]
        stored = transforms.decode(record["image"])
        return self.transform(record, rng) | {"stored": stored, "cropped": cropped}

    def blank(self, label: int = 0) -> Example:
        example = self.transform.blank(label)
        return example | {"stored": example["image"], "cropped": example["image"]}


def _visible(images: jax.Array) -> list[np.ndarray]:
    """Normalised images as pixels; noise beyond black and white is clipped."""
    pixels = 255 * (np.asarray(images) * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN))
    return list(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def _shares(targets: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> list[str]:
    """The share of the example's own class in each target and, below it, that of its partner's class."""
    titles = []
    for target, own, partner in zip(targets, labels, labels[::-1], strict=True):
        lines = [f"{names[label]}: {100 * target[label]:.0f} %" for label in dict.fromkeys((own, partner))]
        titles.append("\n".join(lines))
    return titles


def _short(name: str, length: int = 12) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
