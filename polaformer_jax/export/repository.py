"""A model as a repository of the Hugging Face Hub: a folder of files, and its upload."""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from typing import Any

from etils import epath
from flax import nnx

from polaformer_jax.data.images.normalisation import IMAGENET_MEAN, IMAGENET_STD
from polaformer_jax.errors import UserError
from polaformer_jax.export import card
from polaformer_jax.export.program import check_exportable, public_facts
from polaformer_jax.files import atomic, paths
from polaformer_jax.inference.images import evaluation_transform
from polaformer_jax.models.backbone import Backbone
from polaformer_jax.models.model_config import STRIDES
from polaformer_jax.weights import hub, imagenet, model_metadata, save_weights

OFFICIAL = "pytorch.safetensors"  # the weights once more, as the official PyTorch code takes them


def push_to_hub(
    model: nnx.Module,
    repo: str,
    *,
    evaluation: Mapping[str, Any] | None = None,
    license: str | None = None,
    official_layout: bool = False,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    dry_run: epath.PathLike | None = None,
) -> str:
    """Uploads a model to the Hugging Face Hub, where `create_model("hf://user/name")` finds it.

    The repository gets `model.safetensors` (parameters bit for bit, class names, preprocessing), `config.json` in the
    form that timm uses, and a model card, `README.md`. It is created if there is none; files of these names are
    replaced in one commit, others are kept. Of `model.info.facts` the config of an official checkpoint is left out.
    Tokens are those of `huggingface_hub`: `hf auth login`, or `HF_TOKEN`.

    Args:
        model: a model; `model.info` is part of it.
        repo: "user/name".
        evaluation: the content of an `eval.json`, for the model card; None: what `model.info.facts` has of it.
        license: of the weights, as the Hub names licences, such as "mit"; None: the card says that none is stated.
        official_layout: also upload `pytorch.safetensors`, with names and layouts of the official PyTorch code.
        private: whether a repository that is created here is private.
        revision: the branch to commit to, which must exist; None: the main branch, of a repository that is created if
            there is none.
        message: of the commit.
        dry_run: a folder that does not exist or is empty: the files are written there, and nothing is uploaded.
            `create_model(weights=folder)` takes it as it takes the repository.

    Returns:
        The address of the commit; of a dry run, the folder.

    Raises:
        UserError: the name is none of a repository, the folder is not empty, or the evaluation has no accuracy.
        WeightsError: `huggingface_hub` is not installed, or the Hub refuses the upload.
    """
    repo = hub.checked_repo(repo)
    if license is not None and not re.fullmatch(r"[\w.-]+", license):
        raise UserError(f"{license!r}: expected the name of a licence on the Hub, such as mit", argument="license")
    check_exportable(model)
    files = {
        "config.json": json.dumps(timm_config(model), indent=2) + "\n",
        card.NAME: card.model_card(
            model, repo, evaluation, license, revision=revision, official=OFFICIAL if official_layout else None
        ),
    }
    if dry_run is not None:
        folder = paths.given(dry_run, "dry_run")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{os.fspath(dry_run)} exists, and is no empty folder: name another", argument="dry_run")
        with atomic.reported("repository", folder, argument="dry_run"), atomic.making(folder) as aside:
            _write(aside, model, files, official_layout)
        return os.fspath(dry_run)
    with tempfile.TemporaryDirectory(prefix="polaformer-") as folder:
        _write(epath.Path(folder), model, files, official_layout)
        message = message or f"Upload {model_metadata(model)['model']} with polaformer_jax"
        return hub.upload(folder, repo, private=private, revision=revision, message=message)


def _write(folder: epath.Path, model: nnx.Module, files: Mapping[str, str], official_layout: bool) -> None:
    for name, text in files.items():
        atomic.write(folder / name, text)
    # Without the config of an official checkpoint: it names folders of the machine that trained.
    facts = {"facts": json.dumps(public_facts(model))}
    save_weights(model, folder / hub.WEIGHTS, metadata=facts)
    if official_layout:
        save_weights(model, folder / OFFICIAL, layout="torch", metadata=facts)


def timm_config(model: nnx.Module) -> dict[str, Any]:
    """The content of `config.json`, in the form that timm gives it.

    `model_args` are the constructor's arguments, under their official names where the official code has them. Names of
    classes are `label_names`, and for ImageNet their words `label_descriptions`. `crop_mode` "squash" is a resize that
    does not keep the aspect ratio.
    """
    config, names = model.config, model.info.class_names
    arguments = {name: value for name, value in config.to_dict().items() if name != "num_classes"}
    content = {
        "architecture": model_metadata(model)["model"],
        "num_classes": config.num_classes,
        "num_features": model.config.num_features,
        "model_args": arguments,
    }
    if names is not None:
        content["label_names"] = list(names)
        if (words := imagenet.in_words(names)) != names:
            content["label_descriptions"] = dict(zip(names, words, strict=True))
    if isinstance(model, Backbone):
        transform, side = evaluation_transform(model), config.img_size // STRIDES[-1]
        content["pretrained_cfg"] = {
            "custom_load": False,
            "input_size": [3, config.img_size, config.img_size],
            "fixed_input_size": not model.any_image_size,
            "interpolation": "bicubic",
            "crop_pct": transform.crop / transform.resize,
            "crop_mode": "squash",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "num_classes": config.num_classes,
            "pool_size": [side, side],
            "classifier": "head",
        }
    return content
