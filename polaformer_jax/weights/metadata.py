"""The text that a file of weights has beside its tensors, as a `ModelInfo`, and back."""

import json
from collections.abc import Mapping
from typing import Any

from polaformer_jax.errors import WeightsError
from polaformer_jax.files.names import shown
from polaformer_jax.models.model_info import ModelInfo

OF_MODEL = ("model", "family", "arguments")  # which model the file holds
OF_FILE = ("format", "layout", "checksum")  # how it is stored
RESERVED = (*OF_MODEL, *OF_FILE)


def info_of(metadata: Mapping[str, str], path: str) -> ModelInfo:
    """What metadata says of a model.

    Raises:
        WeightsError: a known entry is damaged; the message begins with `path`.
    """
    known = (*RESERVED, "classes", "preprocess", "facts")
    names = _parsed(metadata, "classes", path)
    if names is not None:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise WeightsError(f"{path}: metadata classes: expected a JSON list of names")
        names = tuple(map(shown, names))
    preprocess = _parsed(metadata, "preprocess", path)
    if preprocess is not None and not (
        isinstance(preprocess, dict) and all(type(preprocess.get(key)) is int for key in ("resize", "crop"))
    ):
        raise WeightsError(
            f"{path}: metadata preprocess={preprocess!r}: expected integers {{'resize': 256, 'crop': 224}}"
        )
    other = {key: value for key, value in metadata.items() if key not in known}
    return ModelInfo(class_names=names, preprocess=preprocess, facts=facts_of(metadata, path), other=other)


def facts_of(metadata: Mapping[str, str], path: str) -> dict[str, Any]:
    facts = _parsed(metadata, "facts", path)
    if not isinstance(facts, dict | None):
        raise WeightsError(f"{path}: metadata facts: expected a JSON object")
    return facts or {}


def _parsed(metadata: Mapping[str, str], key: str, path: str) -> Any:
    """An entry that is JSON; None if there is no such entry."""
    try:
        return json.loads(metadata[key]) if key in metadata else None
    except ValueError as error:
        raise WeightsError(f"{path}: metadata {key}: not valid JSON, {error}: {metadata[key]!r:.100}") from error


def metadata_of(info: ModelInfo) -> dict[str, str]:
    """The entries that `info_of` reads."""
    entries = {"classes": info.class_names, "preprocess": info.preprocess, "facts": info.facts or None}
    return {**info.other, **{key: json.dumps(value) for key, value in entries.items() if value is not None}}
