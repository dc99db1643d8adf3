"""Predicts the classes of image files."""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from etils import epath
from flax import nnx

from polaformer_jax.data import tfds_source
from polaformer_jax.data.images.normalisation import normalise
from polaformer_jax.data.images.transforms import EvalImageTransform
from polaformer_jax.data.records import CorruptRecordError
from polaformer_jax.errors import UserError, WeightsError
from polaformer_jax.files import paths as file_paths
from polaformer_jax.files.names import shown
from polaformer_jax.models.backbone import Backbone

NAMED_PROBLEMS = 10  # at most this many unreadable images are named in an error


def predict(
    model: Backbone,
    paths: Sequence[epath.PathLike],
    *,
    transform: EvalImageTransform,
    names: Sequence[str] | None = None,
    top: int = 5,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """The most probable classes of each image.

    Args:
        paths: image files, local or in a bucket (`gs://`).
        transform: what `evaluation_transform` returns.
        names: names of the classes; None uses their numbers.
        top: number of classes per image; all if the model has fewer.

    Returns:
        One dict per image, in the order of `paths`, the most probable class first:
        `{"image": path, "predictions": [{"class", "name", "probability"}, ...]}`, the path such as can be printed.

    Raises:
        UserError: files cannot be read or decoded; it names up to 10 of them.
    """
    graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    count = min(top, transform.num_classes)
    size = min(batch_size, len(paths))

    results, problems = [], []
    starts = range(0, len(paths), batch_size)
    # disable=None: no bar where stderr is not a terminal
    for start in tqdm.tqdm(starts, unit="batch", leave=False, disable=None if len(starts) > 1 else True):
        part = paths[start : start + batch_size]
        images = np.zeros((size, transform.crop, transform.crop, 3), np.uint8)  # one shape, so one compilation
        for i, path in enumerate(part):
            try:
                images[i] = read_image(path, transform)
            except UserError as error:
                problems.append(str(error))
        if problems:
            continue  # there will be no result; the other files are still checked, to report all that are bad
        probability, label = jax.device_get(_most_probable(graphdef, params, images, count=count))
        for i, path in enumerate(part):
            found = [
                {"class": int(c), "name": names[c] if names else str(c), "probability": float(p)}
                for c, p in zip(label[i], probability[i], strict=True)
            ]
            results.append({"image": shown(os.fspath(path)), "predictions": found})
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems[:NAMED_PROBLEMS])
        more = f"\n  and {len(problems) - NAMED_PROBLEMS} more" if len(problems) > NAMED_PROBLEMS else ""
        raise UserError(f"{len(problems)} of {len(paths)} images cannot be read:{listed}{more}")
    return results


@functools.partial(jax.jit, static_argnames=("graphdef", "count"))
def _most_probable(graphdef, params, images: jax.Array, *, count: int) -> list[jax.Array]:
    """Images (B, S, S, 3) uint8 -> probabilities and classes (B, count), the most probable first."""
    logits = nnx.merge(graphdef, params)(normalise(images))
    return jax.lax.top_k(jax.nn.softmax(logits), count)


def read_image(path: epath.PathLike, transform: EvalImageTransform) -> np.ndarray:
    """An image file as the model sees it: (S, S, 3) uint8.

    Raises:
        UserError: the file cannot be read or decoded; the message names it.
    """
    try:
        return transform({"image": file_paths.given(path).read_bytes(), "label": 0})["image"]
    except OSError as error:
        raise UserError(f"{shown(os.fspath(path))}: {error.strerror or error}") from error
    except CorruptRecordError as error:
        raise UserError(f"{shown(os.fspath(path))}: {error}") from error


def evaluation_transform(model: Backbone, metadata: Mapping[str, str]) -> EvalImageTransform:
    """How images become the model's input.

    Args:
        metadata: of the weights file. Its `preprocess`, JSON such as `{"resize": 256, "crop": 224}`, is applied;
            without it the official rule: resize to 256 for a crop of 224, in the same proportion for other sizes, but
            no crop from 384 pixels on. The aspect ratio is not kept.

    Raises:
        WeightsError: `preprocess` is not valid, or does not fit the model's image size.
    """
    if not isinstance(model, Backbone):
        raise UserError(f"the weights are of a {type(model).__name__}, which does not classify images")
    if model.head is None:
        raise UserError("the model has no classifier (num_classes=0), so there is nothing to predict")
    size = model.config.img_size
    resize, crop = size if size >= 384 else round(size * 256 / 224), size
    if "preprocess" in metadata:
        given = _json("preprocess", metadata)
        if not isinstance(given, dict) or not all(type(given.get(key)) is int for key in ("resize", "crop")):
            raise WeightsError(f"metadata preprocess={given!r}: expected integers {{'resize': 256, 'crop': 224}}")
        resize, crop = given["resize"], given["crop"]
        if crop != size:
            raise WeightsError(f"metadata preprocess={given!r}: its crop does not fit the model's img_size, {size}")
    return EvalImageTransform(resize=resize, crop=crop, num_classes=model.head.out_features)


def class_names(
    num_classes: int,
    stored: Sequence[str] | None,
    *,
    file: epath.PathLike | None = None,
    data: str | None = None,
    data_dir: epath.PathLike | None = None,
) -> tuple[str, ...] | None:
    """Names of the classes in the order of their numbers.

    Args:
        stored: those of the weights file, which are the names if neither `file` nor `data` is given.
        file: a text file, one name per line.
        data, data_dir: a prepared tfds data set, and the folder that contains it.

    Returns:
        None if there are no names.

    Raises:
        UserError: the names cannot be found, or their number is not `num_classes`.
    """
    if file is not None and data is not None:
        raise UserError(f"the file {file} and the data set {data} both name the classes: give one of them")
    if (data is None) != (data_dir is None):
        raise UserError("data and data_dir belong together: the name of a prepared data set, and its directory")
    if file is not None:
        try:
            names = [
                line.strip() for line in file_paths.given(file, "classes").read_text().splitlines() if line.strip()
            ]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"class names {file}: {error}") from error
        found_in = os.fspath(file)
    elif data is not None:
        prepared = tfds_source.find_prepared(data, data_dir)
        split = next(iter(prepared.splits), "train") if prepared else "train"  # any one: all have the same classes
        names = tfds_source.TfdsSource(data, data_dir=data_dir, split=split).class_names
        found_in = f"data set {data!r}"
    else:
        names, found_in = stored, "the metadata of the weights"
    if names is None:
        return None
    if len(names) != num_classes:
        raise UserError(f"{found_in} names {len(names)} classes, but the model has {num_classes}")
    return tuple(map(shown, names))


def _json(key: str, metadata: Mapping[str, str]) -> Any:
    try:
        return json.loads(metadata[key])
    except ValueError as error:
        raise WeightsError(f"metadata {key}: not valid JSON, {error}: {metadata[key]!r:.100}") from error


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
