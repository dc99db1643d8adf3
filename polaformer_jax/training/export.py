"""Exports the weights of a checkpoint to a file, with metadata that describes them.

The training may be running. Its data is not needed: the names of its classes are in the work directory.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
from etils import epath
from flax import nnx

from polaformer_jax import weights
from polaformer_jax.errors import UserError
from polaformer_jax.files import atomic
from polaformer_jax.models.model_info import ModelInfo
from polaformer_jax.training import checkpoints, run_data, sharding
from polaformer_jax.training.experiment import create_abstract_model
from polaformer_jax.training.progress import log
from polaformer_jax.training.tasks import task_of
from polaformer_jax.training.workdir import read_config


def model_info(
    config: ml_collections.ConfigDict, class_names: tuple[str, ...] | None, facts: Mapping[str, Any]
) -> ModelInfo:
    """What is known of a trained model besides its function.

    Args:
        facts: of the weights; the data's name is added.
    """
    prepared = dict(task_of(config).metadata())
    preprocess = prepared.pop("preprocess", None)
    other = {name: json.dumps(value) for name, value in prepared.items()}
    facts = {"data": config.data.name, **facts}
    return ModelInfo(class_names=class_names, preprocess=preprocess, facts=facts, other=other)


def load_trained(
    workdir: epath.PathLike, *, checkpoint: str | None = None, kind: checkpoints.Kind | None = None
) -> nnx.Module:
    """The model of a checkpoint, with its info: class names, preprocessing, and in `facts` data, step and kind.

    Args:
        workdir: work directory of a training.
        checkpoint: "best" (the default), "latest" or a step.
        kind: "raw", or "ema" for the moving average; None: the run's `eval.weights`.

    Raises:
        UserError: there is no such training or checkpoint.
    """
    config = read_config(workdir)
    checkpoints.check_choice(workdir, checkpoint)
    graphdef, state = nnx.split(create_abstract_model(config))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = sharding.with_shardings(nnx.to_pure_dict(state), place)
    kind = config.eval.weights if kind is None else kind
    params, step = checkpoints.read_params(
        workdir, abstract, checkpoint, best_metric=checkpoints.metric_name(config), kind=kind
    )
    model = nnx.merge(graphdef, params)
    model.info = model_info(config, _class_names(workdir, config), {"step": step, "kind": kind})
    return model


def export(
    workdir: epath.PathLike,
    path: epath.PathLike,
    *,
    checkpoint: str | None = None,
    kind: checkpoints.Kind | None = None,
    layout: weights.Layout = "ours",
) -> int:
    """Writes the weights of a checkpoint to `path` (`.safetensors`), atomically.

    Args:
        workdir, checkpoint, kind: see `load_trained`.
        layout: "ours", or "torch": official names and layouts.

    Returns:
        The step of the checkpoint.

    Raises:
        UserError: there is no such training or checkpoint, or `path` has another suffix or cannot be written.
    """
    weights.check_suffix(path)
    read_config(workdir)  # a folder is made for `path` only if there is something to write
    checkpoints.check_choice(workdir, checkpoint)
    path = atomic.check_target(path, "weights", argument="out")
    model = load_trained(workdir, checkpoint=checkpoint, kind=kind)
    weights.save_weights(model, path, layout=layout)
    return model.info.facts["step"]


def _class_names(workdir: epath.PathLike, config: ml_collections.ConfigDict) -> tuple[str, ...] | None:
    data = run_data.read(workdir)
    if data is not None:
        return data.class_names
    try:
        return task_of(config).open_source(config.data.eval_split).class_names
    except UserError as error:
        log.warning(
            "the file will have no class names: the run began before version 0.3 and did not keep them, and its data is"
            " not available: %s",
            error,
        )
        return None
