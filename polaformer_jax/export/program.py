"""A model as a pure function of arrays, ready to be written for other runtimes, and what its file says about it."""

import dataclasses
import importlib.metadata
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx

from polaformer_jax.config import DTYPES
from polaformer_jax.data.images.normalisation import IMAGENET_MEAN, IMAGENET_STD, normalise
from polaformer_jax.errors import UserError
from polaformer_jax.export.maps import linear_block, mean_maps
from polaformer_jax.files import atomic
from polaformer_jax.inference.images import evaluation_transform
from polaformer_jax.models import registry
from polaformer_jax.models.backbone import Backbone
from polaformer_jax.models.model_config import ModelConfig
from polaformer_jax.models.pola_sequence import Sequences
from polaformer_jax.models.segmenter import Segmenter
from polaformer_jax.weights import flatten, imagenet, model_metadata, unflatten


@dataclasses.dataclass(frozen=True)
class Program:
    """A model in evaluation, as a function.

    Attributes:
        function: `function(params, *inputs)` returns a tuple with an array for each of `outputs`.
        params: the model's parameters, under our names.
        inputs: of each input, by name, the shape after the batch axis, which comes first, and the dtype.
        outputs: names of the results, which have a batch axis too.
        metadata: what a file says about the program, in terms of JSON: the model, its inputs and outputs, how images
            are prepared, names of classes.
    """

    function: Callable[..., tuple[jax.Array, ...]]
    params: Mapping[str, jax.Array]
    inputs: Mapping[str, tuple[tuple[int, ...], jnp.dtype]]
    outputs: tuple[str, ...]
    metadata: Mapping[str, Any]


def program_of(
    model: nnx.Module,
    *,
    preprocess: bool = False,
    maps: tuple[int, int] | None = None,
    dtype: str = "float32",
) -> Program:
    """The program of a model.

    The attention is computed by operations that every back end has, not by the kernels of this package.

    Args:
        preprocess: take images as uint8 pixels, already resized and cropped, and return probabilities; otherwise the
            input of image models is normalised, and the output logits. Sequence models take tokens and lengths.
        maps: (stage, block) of a linear block whose two mean attention maps are further outputs, see `mean_maps`.
        dtype: of activations and matrix products, whatever the model's own.

    Raises:
        UserError: the model has no classifier and probabilities are asked for, or another option does not fit it.
    """
    check_exportable(model)
    computed = _portable(model, dtype)
    graphdef, params = nnx.split(computed)
    like = nnx.to_pure_dict(params)
    config = model.config
    images = isinstance(model, Backbone)
    if not images and (preprocess or maps is not None):
        option = "preprocess" if preprocess else "maps"
        raise UserError(f"the model is a {config.family}, which takes no images", argument=option)
    if preprocess and config.num_classes == 0:
        raise UserError(
            "the model has no classifier (num_classes=0), so there are no probabilities: export it without"
            " preprocessing, for the features that a classifier would take",
            argument="preprocess",
        )
    if maps is not None:
        linear_block(model, *maps)
    result = "probabilities" if preprocess else "logits" if config.num_classes else "features"
    outputs = (result,) if maps is None else (result, "same", "opposite")

    def function(params: Mapping[str, jax.Array], *inputs: jax.Array) -> tuple[jax.Array, ...]:
        model = nnx.merge(graphdef, unflatten(params, like))
        if not images:
            return (model(Sequences(*inputs)),)
        x = normalise(*inputs) if preprocess else inputs[0]
        logits = model(x)
        answer = jax.nn.softmax(logits) if preprocess else logits
        return (answer,) if maps is None else (answer, *mean_maps(model, x, stage=maps[0], block=maps[1]))

    inputs = _inputs(config, images, preprocess)
    return Program(function, flatten(like), inputs, outputs, _metadata(model, inputs, outputs, preprocess))


def check_target(path: epath.PathLike, suffix: str) -> epath.Path:
    """The path of a file to write; raises a UserError if it cannot be, or has another suffix."""
    if not os.fspath(path).endswith(suffix):
        raise UserError(
            f"{os.path.basename(os.fspath(path))!r}: expected a name that ends in {suffix}", argument="path"
        )
    return atomic.check_target(path, "program", argument="path")


def check_exportable(model: nnx.Module) -> None:
    """Raises a UserError if the model is no classifier, or has names for another number of classes than it has."""
    if isinstance(model, Segmenter):
        raise UserError(
            "the model is a Segmenter: programs and repositories hold classifiers; save its weights (pf.save_weights,"
            " or `polaformer export` without --format), which pf.create_model(weights=FILE) and pf.segment take"
        )
    names, classes = model.info.class_names, model.config.num_classes
    if names is not None and len(names) != classes:
        raise UserError(f"model.info names {len(names)} classes, but the model has {classes}")


def public_facts(model: nnx.Module) -> dict[str, Any]:
    """The facts about a model's weights that are published: the config of an official checkpoint names folders."""
    return {key: value for key, value in model.info.facts.items() if key != "config"}


def _portable(model: nnx.Module, dtype: str) -> nnx.Module:
    """The same model, computed in this dtype and without kernels of ours."""
    registry.check_model(model)
    config = model.config
    if dtype not in DTYPES:
        raise UserError(
            f"{dtype!r}: expected one of {', '.join(DTYPES)}. Integers of 8 bits are not supported here; tools of the"
            " runtime may quantise the file, such as onnxruntime.quantization an ONNX file",
            argument="dtype",
        )
    params = nnx.state(model)
    stored = jax.tree.leaves(params)[0].dtype
    abstract = registry.create_abstract(config, dtype=dtype, param_dtype=stored, attention_impl="xla")
    return nnx.merge(nnx.graphdef(abstract), params)


def _inputs(config: ModelConfig, images: bool, preprocess: bool) -> dict[str, tuple[tuple[int, ...], jnp.dtype]]:
    if images:
        return {"images": ((config.img_size, config.img_size, 3), jnp.dtype(jnp.uint8 if preprocess else jnp.float32))}
    inner = () if config.texts == 1 else (config.texts,)
    integers = jnp.dtype(jnp.int32)
    return {"tokens": ((*inner, config.max_length), integers), "lengths": (inner, integers)}


def _metadata(model: nnx.Module, inputs: Mapping, outputs: tuple[str, ...], preprocess: bool) -> dict[str, Any]:
    described = model_metadata(model)
    content = {
        "producer": f"polaformer_jax {importlib.metadata.version('polaformer_jax')}",
        "model": described["model"],
        "family": described["family"],
        "arguments": model.config.to_dict(),
        "inputs": {name: {"shape": ["batch", *shape], "dtype": dtype.name} for name, (shape, dtype) in inputs.items()},
        "outputs": list(outputs),
        "classes": None if model.info.class_names is None else list(imagenet.in_words(model.info.class_names)),
        "facts": public_facts(model),
    }
    if isinstance(model, Backbone):
        transform = evaluation_transform(model)
        content["preprocess"] = {
            "resize": transform.resize,
            "crop": transform.crop,
            "interpolation": "bicubic",
            "keep_aspect": False,
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "normalised_inside": preprocess,
        }
    return content
