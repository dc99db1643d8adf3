"""Reads weights files of any kind into one form: tensors by name, and what else the file says about them."""

import dataclasses
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from polaformer_jax.errors import UserError, WeightsError
from polaformer_jax.files import paths
from polaformer_jax.models.model_info import ModelInfo
from polaformer_jax.weights import hub, imagenet, kinds, safetensors_file, torch_zip
from polaformer_jax.weights.metadata import facts_of, info_of

Layout = Literal["ours", "torch"]

_WRAPPERS = ("model", "state_dict")
_EMA = "state_dict_ema"
_WRAPPED = 4  # levels at most; a dict can contain itself
_FACTS = ("epoch", "max_accuracy", "config")
_LARGEST_FACTS = 10_000  # values; the official config has about a hundred


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """The content of a weights file.

    Attributes:
        path: where it was read from.
        layout: whether names and memory layouts are ours or the official PyTorch ones.
        tensors: read-only NumPy arrays by name, views of the mapped file.
        metadata: what `save_weights` wrote next to the tensors; empty for files of other programs. Known keys, all
            except the first in JSON: "model", "arguments" (of its constructor), "facts", "classes" (their names),
            "preprocess".
        facts: those of an official checkpoint that are present, of: epoch, max_accuracy (in %), config (nested dict).
    """

    path: str
    layout: Layout
    tensors: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]
    facts: Mapping[str, Any]

    @property
    def info(self) -> ModelInfo:
        """What the file says of its model besides config and parameters.

        An official checkpoint does not name its classes: 1000 of them are assumed to be those of ImageNet-1k, unless
        its config names another data set.

        Raises:
            WeightsError: the metadata is damaged.
        """
        info = info_of(self.metadata, self.path)
        if info.class_names is None and self._is_of_imagenet():
            info = dataclasses.replace(info, class_names=tuple(imagenet.classes()))
        return dataclasses.replace(info, facts=self.facts)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes in label order, such as can be printed; None if the file does not say.

        Raises:
            WeightsError: the metadata is damaged.
        """
        return info_of(self.metadata, self.path).class_names

    def _is_of_imagenet(self) -> bool:
        bias, config = self.tensors.get("head.bias"), self.facts.get("config")
        data = config.get("DATA") if isinstance(config, Mapping) else None
        named = data.get("DATASET", "imagenet") if isinstance(data, Mapping) else "imagenet"
        official = not self.metadata or config is not None
        return official and named == "imagenet" and bias is not None and bias.shape == (len(imagenet.classes()),)


def read_file(path: str | os.PathLike, *, ema: bool = False) -> WeightsFile:
    """Reads a `.pth` checkpoint or `.safetensors` in either layout; the content determines which it is, not the name.

    Nothing in the file is executed. Tensors are mapped, not copied, and checked against the file's checksums.

    Args:
        path: local, of a file or of a folder that has a `model.safetensors`; in a bucket (`gs://`), from which it is
            copied to a temporary file first; or an address on the Hugging Face Hub (`hf://`, see `hub.Address.parse`).
        ema: of an official checkpoint that has two, read the moving average (`state_dict_ema`), not the last weights.

    Raises:
        WeightsError: there is no such file, it is of another kind, it is damaged, or it holds no weights.
    """
    name = os.fspath(path)
    if hub.is_address(name):
        return _read_local(hub.fetch(name), name, ema)
    try:
        path = paths.given(path)
    except UserError as error:
        raise WeightsError(f"cannot read the weights: {error}") from None
    if not paths.in_bucket(path):
        return _read_local(Path(path), name, ema)
    try:
        content = path.read_bytes()
    except Exception as error:  # back ends raise their own exceptions
        raise WeightsError(f"cannot read {name}: {type(error).__name__}: {error}") from error
    with tempfile.NamedTemporaryFile(suffix=Path(name).suffix) as file:  # a map stays valid after the file is deleted
        file.write(content)
        file.flush()
        del content
        return _read_local(Path(file.name), name, ema)


def _read_local(path: Path, name: str, ema: bool) -> WeightsFile:
    try:
        if path.is_dir():
            if not (path / hub.WEIGHTS).is_file():
                raise WeightsError(
                    f"{name!r} is a folder, expected a file of weights (.safetensors or .pth), or a folder that has a"
                    f" {hub.WEIGHTS}; `polaformer export` writes the weights of a training run to such a file"
                )
            path, name = path / hub.WEIGHTS, os.path.join(name, hub.WEIGHTS)
        if path.exists() and not path.is_file():  # reading a pipe would wait forever
            raise WeightsError(f"{name} is not a regular file, expected .safetensors or .pth")
        with open(path, "rb") as file:
            head = file.read(kinds.HEAD)
    except WeightsError:
        raise
    except FileNotFoundError:
        raise WeightsError(f"there is no weights file {name}") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise WeightsError(f"cannot read {name!r}: {error}") from error
    if not head.startswith(b"PK") and (path.suffix == ".safetensors" or head[8:9] == b"{"):
        if head[8:9] != b"{" and (kind := kinds.describe(head)) is not None:
            raise WeightsError(f"{name} is {kind[0]}, expected a .safetensors file; {kind[1]}")
        if ema:
            raise WeightsError(f"{name} is a .safetensors file, which has no second weights: leave out ema")
        tensors, metadata = safetensors_file.read(path, name=name)
        layout = metadata.get("layout")
        if layout is None:  # a file of another program: only our layout has kernels
            layout = "ours" if any(key.endswith(".kernel") for key in tensors) else "torch"
        if layout not in ("ours", "torch"):
            raise WeightsError(
                f"{name} has the layout {layout!r}, expected 'ours' or 'torch': a newer version wrote it"
            )
        if layout == "torch":
            tensors, _ = unwrap(tensors, name)
        return WeightsFile(name, layout, tensors, metadata, facts_of(metadata, name))
    tensors, facts = unwrap(torch_zip.read(path, name=name), name, ema=ema)
    return WeightsFile(name, "torch", tensors, {}, facts)


def unwrap(content: object, name: str, *, ema: bool = False) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors in the content of a `.pth` file, and the facts next to them.

    The only rule: descend through `model` and `state_dict` while they are dicts (with `ema` into `state_dict_ema` at
    first), then drop a prefix `module.` (of DistributedDataParallel) that all names have.
    """
    facts = {}
    if ema:
        if not isinstance(content, Mapping) or not isinstance(content.get(_EMA), Mapping):
            raise WeightsError(f"{name} has no moving average ({_EMA}) beside its weights: leave out ema")
        facts = {key: plain(content[key], f"{name}: {key}") for key in _FACTS if key in content}
        content = content[_EMA]
    for _ in range(_WRAPPED):
        if not isinstance(content, Mapping):
            break
        facts |= {key: plain(content[key], f"{name}: {key}") for key in _FACTS if key in content}
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise WeightsError(f"{name} holds a {type(content).__name__}, expected a dict of tensors (a state_dict)")
    others = [f"{key!r}: {type(value).__name__}" for key, value in content.items() if not _is_tensor(key, value)]
    if others or not content:
        found = f"{len(others)} of {len(content)} entries are not: {', '.join(others[:5])}" if others else "it is empty"
        raise WeightsError(
            f"{name}: expected a dict of tensors by name (a state_dict), at the top level or under "
            f"{' or '.join(_WRAPPERS)}; {found}"
        )
    while all(key.startswith("module.") for key in content):
        content = {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content), facts


def _is_tensor(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, np.ndarray)


def plain(value: object, name: str) -> Any:
    """The value as JSON allows it: dicts with text keys, lists, and scalars; anything else becomes its type's name.

    Raises:
        WeightsError: it is too large, for example because containers hold each other.
    """
    left = _LARGEST_FACTS

    def convert(value: object, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > 50:
            raise WeightsError(
                f"{name} has more than {_LARGEST_FACTS} values, or more than 50 levels: it is not a config"
            )
        if isinstance(value, Mapping):
            return {str(key): convert(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
            return [convert(item, depth + 1) for item in items]
        if isinstance(value, np.ndarray) and value.ndim == 0:
            value = value.item()
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else str(value)
        return type(value).__name__

    return convert(value, 0)
