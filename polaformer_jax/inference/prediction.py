"""Predicts the classes of images."""

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from etils import epath
from flax import nnx

from polaformer_jax.data import tfds_source
from polaformer_jax.data.images.normalisation import normalise
from polaformer_jax.errors import UserError
from polaformer_jax.files import paths as file_paths
from polaformer_jax.files.names import shown
from polaformer_jax.inference.images import (
    ImageLike,
    as_list,
    evaluation_transform,
    name_of,
    raise_problems,
    read_image,
)
from polaformer_jax.models.backbone import Backbone
from polaformer_jax.weights import WeightsFile, imagenet
from polaformer_jax.weights.creation import create_model


def predict(
    model: Backbone | WeightsFile | epath.PathLike,
    images: ImageLike | Iterable[ImageLike],
    *,
    class_names: Sequence[str] | None = None,
    top: int = 5,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """The most probable classes of each image: `pf.predict("hf://user/name", "photo.jpg")`.

    Images are prepared as by `preprocess`.

    Args:
        model: a model; or its weights, as `create_model(weights=...)` takes them, which are loaded in each call.
        images: one, or several, see `preprocess`.
        class_names: names of the classes, in label order; None: those of `model.info`, for ImageNet in words, or else
            the classes' numbers.
        top: number of classes per image; all if the model has fewer.
        batch_size: images at a time; the last batch is filled up, so that one program is compiled.

    Returns:
        One dict per image, the most probable class first:
        `{"image": name, "predictions": [{"class", "name", "probability"}, ...]}`. The name is the path, such as can be
        printed, or "image 0" and so on.

    Raises:
        UserError: images cannot be read or decoded (it names up to 10 of them), the model does not classify images, or
            there is another number of names than of classes.
        WeightsError: see `create_model`.
    """
    for name, value in (("top", top), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{value}, expected at least 1", argument=name)
    if not isinstance(model, nnx.Module):
        model = create_model(weights=model)
    num_classes_of(model)
    transform = evaluation_transform(model)
    if class_names is None and model.info.class_names is not None:
        class_names = imagenet.in_words(model.info.class_names)
    names = _checked(class_names, transform.num_classes, "the model")
    graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    images = as_list(images)
    count = min(top, transform.num_classes)
    size = min(batch_size, len(images))

    results, problems = [], []
    starts = range(0, len(images), batch_size)
    # disable=None: no bar where stderr is not a terminal
    for start in tqdm.tqdm(starts, unit="batch", leave=False, disable=None if len(starts) > 1 else True):
        part = images[start : start + batch_size]
        batch = np.zeros((size, transform.crop, transform.crop, 3), np.uint8)  # one shape, so one compilation
        for i, image in enumerate(part):
            try:
                batch[i] = read_image(image, transform, start + i)
            except UserError as error:
                problems.append(str(error))
        if problems:
            continue  # there will be no result; the other files are still checked, to report all that are bad
        probability, label = jax.device_get(_most_probable(graphdef, params, batch, count=count))
        for i, image in enumerate(part):
            found = [
                {"class": int(c), "name": names[c] if names else str(c), "probability": float(p)}
                for c, p in zip(label[i], probability[i], strict=True)
            ]
            results.append({"image": name_of(image, start + i), "predictions": found})
    raise_problems(problems, len(images))
    return results


def num_classes_of(model: Backbone) -> int:
    """The number of classes; raises a UserError if the model does not classify images."""
    num_classes = evaluation_transform(model).num_classes
    if model.head is None:
        raise UserError("the model has no classifier (num_classes=0), so there is nothing to predict")
    return num_classes


@functools.partial(jax.jit, static_argnames=("graphdef", "count"))
def _most_probable(graphdef, params, images: jax.Array, *, count: int) -> list[jax.Array]:
    """Images (B, S, S, 3) uint8 -> probabilities and classes (B, count), the most probable first."""
    logits = nnx.merge(graphdef, params)(normalise(images))
    return jax.lax.top_k(jax.nn.softmax(logits), count)


def read_class_names(
    num_classes: int,
    *,
    file: epath.PathLike | None = None,
    data: str | None = None,
    data_dir: epath.PathLike | None = None,
) -> tuple[str, ...] | None:
    """Names of the classes in label order, from a file or a data set.

    Args:
        file: a text file, one name per line.
        data, data_dir: a prepared tfds data set, and the folder that contains it.

    Returns:
        None if neither is given.

    Raises:
        UserError: the names cannot be found, or their number is not `num_classes`.
    """
    if file is not None and data is not None:
        raise UserError(f"the file {file} and the data set {data} both name the classes: give one of them")
    if (data is None) != (data_dir is None):
        raise UserError("data and data_dir belong together: the name of a prepared data set, and its directory")
    if file is not None:
        try:
            lines = file_paths.given(file, "classes").read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"class names {file}: {error}") from error
        return _checked([line.strip() for line in lines if line.strip()], num_classes, os.fspath(file))
    if data is None:
        return None
    prepared = tfds_source.find_prepared(data, data_dir)
    split = next(iter(prepared.splits), "train") if prepared else "train"  # any one: all have the same classes
    names = tfds_source.TfdsSource(data, data_dir=data_dir, split=split).class_names
    return _checked(names, num_classes, f"data set {data!r}")


def _checked(names: Sequence[str] | None, num_classes: int, found_in: str) -> tuple[str, ...] | None:
    if names is None:
        return None
    if len(names) != num_classes:
        raise UserError(f"{found_in} names {len(names)} classes, but the model has {num_classes}")
    return tuple(map(shown, names))


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """What `predict` returned, as aligned text; an image is named in the first of its lines only."""
    rows = [("image", "probability", "class", "name")]
    for result in results:
        for i, found in enumerate(result["predictions"]):
            number, name = str(found["class"]), found["name"]
            image = result["image"] if i == 0 else ""
            rows.append((image, f"{100 * found['probability']:.2f} %", number, "" if name == number else name))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows]
    return "\n".join(lines)
