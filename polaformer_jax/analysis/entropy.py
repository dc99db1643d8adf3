"""How concentrated attention is in finished trainings, of sequences or images: a row for each block and head.

The paper says that relu features leave linear attention flat, and that its learnable power makes it spiky again. So
polarity-aware attention is measured twice: as it was trained, and with its power replaced by p = 1.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from polaformer_jax.analysis import image_entropy, sequence_entropy
from polaformer_jax.analysis.results import images
from polaformer_jax.analysis.results import rows as results
from polaformer_jax.analysis.results.entropy import Row
from polaformer_jax.errors import UserError
from polaformer_jax.files import paths
from polaformer_jax.files.names import shown
from polaformer_jax.models.families import BACKBONES
from polaformer_jax.models.model_config import ModelConfig
from polaformer_jax.models.pola_sequence import PolaSequenceConfig
from polaformer_jax.models.registry import model_config
from polaformer_jax.training import checkpoints
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.workdir import read_config


def load_run(workdir: epath.PathLike, data_dir: str | None = None) -> tuple[Experiment, Any]:
    """A finished training on one device, and the weights of its best checkpoint that it reports (`eval.weights`).

    Args:
        data_dir: where the data is now, if not where the run's config says.

    Raises:
        UserError: the run, its checkpoint or its data does not exist.
    """
    config = read_config(workdir)
    config.mesh.data, config.mesh.fsdp = 1, 1
    config.data.data_dir = config.data.data_dir if data_dir is None else data_dir
    experiment = Experiment(config)
    params, _ = checkpoints.read_params(
        workdir,
        experiment.params.abstract,
        "best",
        best_metric=checkpoints.metric_name(config),
        kind=config.eval.weights,
    )
    return experiment, params


def of_run(workdir: epath.PathLike, *, examples: int, data_dir: str | None = None) -> list[Row]:
    """One row for each block, attention and head of a finished training; none for heads whose rows are all zero.

    Raises:
        UserError: see `load_run` and `rows.finished`; or it trained something else than image classifiers or single
            sequences.
    """
    workdir = paths.given(workdir, "workdir")
    config = read_config(workdir)
    _, result = results.finished(workdir, config)
    if config.model.name == "pola_sequence":
        of_model = sequence_entropy.of_model
    elif config.task.name == "image" and model_config(config.model.name).family in BACKBONES:
        of_model = image_entropy.of_model
    else:
        raise UserError(f"{workdir} is a training of the task {config.task.name}: expected image or one of sequences")
    experiment, params = load_run(workdir, data_dir)
    found = of_model(experiment, params, examples=examples)
    variant = _variant(experiment.model(params).config)
    run, accuracy = shown(workdir.name), round(100 * result["accuracy"], 2)
    return [
        Row(
            *(run, config.model.name, variant, config.seed, accuracy, block, name, head, len(column)),
            entropy=round(float(np.nanmean(column)), 4),
            deviation=round(float(np.nanstd(column)), 4),
        )
        for (block, name), values in found.items()
        for head, column in enumerate(values.T)
        if not np.all(np.isnan(column))
    ]


def _variant(model: ModelConfig) -> str:
    if isinstance(model, PolaSequenceConfig):
        return model.attention if model.attention != "polarity" else f"polarity, α = {model.alpha:g}"
    return str(images.variant_of(model)) if "attention" in model.names() else "polarity"


def of_runs(workdirs: Sequence[epath.PathLike], *, examples: int, data_dir: str | None = None) -> list[Row]:
    """The rows (see `of_run`) of several runs.

    Raises:
        UserError: two work directories have the same name; or as for `of_run`.
    """
    names = [shown(paths.given(workdir, "workdir").name) for workdir in workdirs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two work directories are called {twice[0]}: the table tells runs apart by their names")
    rows = []
    for workdir in tqdm(workdirs, unit="run", disable=None):
        rows += of_run(workdir, examples=examples, data_dir=data_dir)
    return rows
