"""Classes of the pixels of images, and the files that show them."""

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath
from PIL import Image

from polaformer_jax.data.images.normalisation import normalise
from polaformer_jax.data.segmentation.transforms import EvalSegmentationTransform
from polaformer_jax.errors import UserError, WeightsError
from polaformer_jax.files import atomic, paths
from polaformer_jax.files.palette import coloured, palette
from polaformer_jax.inference.images import ImageLike, as_list, name_of, raise_problems, read_pixels
from polaformer_jax.models.dense_inference import InferenceMode, label_map
from polaformer_jax.models.segmenter import Segmenter
from polaformer_jax.weights import WeightsFile
from polaformer_jax.weights.creation import create_model

LARGEST = 8192  # pixels of a side of images
LARGEST_INPUT = 2048**2  # pixels of the model's input: softmax attention takes the square of its tokens in memory
SUFFIXES = {"labels": "_labels.png", "colours": "_colours.png", "overlay": "_overlay.png"}  # of the files of an image


class Segmented(NamedTuple):
    """A segmented image.

    Attributes:
        name: its path, such as can be printed, or "image 0" and so on.
        pixels: the image, (h, w, 3) uint8.
        labels: the most probable class of each pixel, (h, w) uint8.
        probability: that of the class, (h, w) float32.
        class_names: of all classes, in label order.
    """

    name: str
    pixels: np.ndarray
    labels: np.ndarray
    probability: np.ndarray
    class_names: tuple[str, ...]

    def shares(self) -> list[dict[str, object]]:
        """The classes that occur, the largest first: `{"class", "name", "share"}`, the share of the pixels."""
        counts = np.bincount(self.labels.reshape(-1), minlength=len(self.class_names))
        order = [int(label) for label in np.argsort(-counts, kind="stable") if counts[label]]
        return [
            {"class": label, "name": self.class_names[label], "share": counts[label] / self.labels.size}
            for label in order
        ]


def segment(
    model: Segmenter | WeightsFile | epath.PathLike,
    images: ImageLike | Iterable[ImageLike],
    *,
    class_names: Sequence[str] | None = None,
    scale: tuple[int, int] | None = None,
    flip: bool | None = None,
) -> Iterator[Segmented]:
    """The class of each pixel: `for result in pf.segment("runs/scenes.safetensors", ["photo.jpg"])`.

    Images are resized as in the evaluation of the model's training (which its `info` says), one after the other; the
    result has the size of the image. Each size is compiled once.

    Args:
        model: a segmenter; or its weights, as `create_model(weights=...)` takes them.
        images: one, or several, see `preprocess`.
        class_names: names of the classes, in label order; None: those of `model.info`, or else the classes' numbers.
        scale: the box, of two sides in pixels, that images are resized into, keeping their aspect; None: as the model's
            `info` says, which may be their own size.
        flip: average the probabilities with those of the mirrored image; None: as the `info` says.

    Raises:
        UserError: images cannot be read or decoded, or are too large (it names up to 10 of them, before the first
            result), the model does not segment images, or there is another number of names than of classes.
        WeightsError: see `create_model`.
    """
    if not isinstance(model, Segmenter):
        if hasattr(model, "config"):
            raise UserError(
                f"the model is a {type(model).__name__}, which does not segment images: pf.predict takes it"
            )
        model = create_model(weights=model)
        if not isinstance(model, Segmenter):
            raise UserError(f"the weights are of a {type(model).__name__}, which does not segment images")
    names = names_of(model, class_names)
    transform, mode = _transform(model, scale), _mode(model, flip)
    images = as_list(images)
    _check(images, transform)
    return _segmented(model, images, names, transform, mode)


def _segmented(model, images, names, transform, mode) -> Iterator[Segmented]:
    for number, image in enumerate(tqdm.tqdm(images, unit=" images", disable=None if len(images) > 1 else True)):
        pixels = read_pixels(image, number)
        arrays = [normalise(jnp.asarray(array)) for array in transform.prepared(pixels).values()]
        yield Segmented(name_of(image, number), pixels, *label_map(model, arrays, pixels.shape[:2], mode), names)


def _check(images: Sequence[ImageLike], transform: EvalSegmentationTransform) -> None:
    """Raises one UserError for all images that cannot be segmented. Decoding them takes little beside the rest."""
    problems = []
    for number, image in enumerate(images):
        try:
            height, width = read_pixels(image, number).shape[:2]
            if max(height, width) > LARGEST:
                problems.append(
                    f"{name_of(image, number)}: {height} x {width} pixels, expected at most {LARGEST} a side: resize it"
                )
            elif (largest := max(h * w for h, w in transform.image_sizes((height, width)).values())) > LARGEST_INPUT:
                problems.append(
                    f"{name_of(image, number)}: the model's input would have {largest:,} pixels, expected at most"
                    f" {LARGEST_INPUT:,}: give a scale, such as 2048,512, into which images are resized"
                )
        except UserError as error:
            problems.append(str(error))
    raise_problems(problems, len(images))


def names_of(model: Segmenter, class_names: Sequence[str] | None) -> tuple[str, ...]:
    """The names of the classes.

    Raises:
        UserError: there is another number of names than of classes.
    """
    classes = model.config.num_classes
    names = class_names or model.info.class_names or tuple(map(str, range(classes)))
    if len(names) != classes:
        raise UserError(f"{len(names)} class names, but the model has {classes} classes", argument="class_names")
    return tuple(names)


def _settings(model: Segmenter) -> Mapping[str, Any]:
    """How images were segmented in the evaluation of the model's training.

    Raises:
        WeightsError: what the weights say of it cannot be understood.
    """
    text = model.info.other.get("segmentation", "{}")
    try:
        settings = {"scale": None, "scales": [1.0], "flip": False, "window": None, "stride": None, **json.loads(text)}
        EvalSegmentationTransform(settings["scale"], scales=tuple(settings["scales"]), num_classes=1)
        window, stride = settings["window"], settings["stride"]
        fits = window is None or (type(window) is int and window > 0 and window % 32 == 0)
        fits &= stride is None or (fits and type(stride) is int and 0 < stride <= (window or 0))
        if fits and isinstance(settings["flip"], bool):
            return settings
    except (ValueError, AttributeError, TypeError):
        pass
    raise WeightsError(f"metadata segmentation={text!r}: expected JSON such as {{'scale': [2048, 512], 'flip': false}}")


def _transform(model: Segmenter, scale: tuple[int, int] | None) -> EvalSegmentationTransform:
    settings = _settings(model)
    scale = settings["scale"] if scale is None else scale
    return EvalSegmentationTransform(
        None if scale is None else tuple(scale),
        scales=tuple(settings["scales"]),
        num_classes=model.config.num_classes,
    )


def _mode(model: Segmenter, flip: bool | None) -> InferenceMode:
    settings = _settings(model)
    flip = settings["flip"] if flip is None else flip
    return InferenceMode(window=settings["window"], stride=settings["stride"], flip=flip)


class Output:
    """The files of segmented images: labels as they are, in colours, and over the image.

    Args:
        folder: created if it is missing.
        images: what will be segmented; their files are named as they are.

    Raises:
        UserError: two images have one name, or the folder cannot be written.
    """

    def __init__(self, folder: epath.PathLike, images: Sequence[epath.PathLike]):
        self._folder = paths.given(folder, "out")
        if self._folder.exists() and not self._folder.is_dir():
            raise UserError(f"{os.fspath(self._folder)} is a file: name a folder", argument="out")
        stems = [
            os.path.basename(os.fspath(image)).rpartition(".")[0] or os.path.basename(os.fspath(image))
            for image in images
        ]
        if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
            raise UserError(
                f"several images are called {', '.join(twice[:5])}, up to folder and suffix, and so would be their"
                " masks: segment them one after the other, into several folders"
            )
        self._stems = stems
        atomic.check_target(self._folder / f"{stems[0]}{SUFFIXES['labels']}", "masks", argument="out")

    def write(self, number: int, result: Segmented) -> list[epath.Path]:
        """Writes the files of the image of this number.

        Raises:
            UserError: one cannot be written.
        """
        classes = len(result.class_names)
        labels = Image.fromarray(result.labels)  # grey: pixels are class numbers
        colours = coloured(result.labels, classes)
        over = (0.4 * result.pixels + 0.6 * colours).astype(np.uint8)
        written = []
        for kind, image in (
            ("labels", labels),
            ("colours", Image.fromarray(colours)),
            ("overlay", Image.fromarray(over)),
        ):
            path = self._folder / f"{self._stems[number]}{SUFFIXES[kind]}"
            content = io.BytesIO()
            image.save(content, "PNG")
            with atomic.reported("mask", path):
                atomic.write(path, content.getvalue())
            written.append(path)
        return written


def table(results: Iterable[tuple[str, Sequence[Mapping[str, object]]]], classes: int, top: int) -> str:
    """Image, share of its pixels, class and colour, as aligned text.

    Args:
        results: the name and the shares of each image.
        classes: how many there are.
        top: the number of classes that are listed for an image.
    """
    colours = ["#{:02x}{:02x}{:02x}".format(*colour) for colour in palette(classes)]
    rows = [("image", "pixels", "class", "colour", "name")]
    for name, shares in results:
        for i, found in enumerate(shares[:top]):
            number = found["class"]
            label = "" if found["name"] == str(number) else found["name"]
            rows.append((name if i == 0 else "", f"{100 * found['share']:.1f} %", str(number), colours[number], label))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:<{widths[3]}}  {e}".rstrip()
        for a, b, c, d, e in rows
    )
