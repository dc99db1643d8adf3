"""Identifies the model in a weights file: its config, derived from the names and shapes of its tensors.

Shapes take precedence. The file's own description is used only for what no shape shows (alpha, the rates of dropout and
stochastic depth, the heads of Pola-PVT's softmax stages, padded windows, an image size that shapes do not determine):
in our own files the constructor's arguments, in official checkpoints the config, which holds unused and wrong fields (a
Pola-PVT's has Swin's depths). Our own arguments must agree with the shapes.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from polaformer_jax.errors import WeightsError
from polaformer_jax.models.model_config import STRIDES, ModelConfig, differences
from polaformer_jax.models.pola_pp import PolaPPConfig
from polaformer_jax.models.pola_pvt import PolaPVTConfig
from polaformer_jax.models.pola_sequence import PolaSequenceConfig
from polaformer_jax.models.pola_swin import PolaSwinConfig
from polaformer_jax.models.segmenter import SegmenterConfig
from polaformer_jax.models.token_attention import ATTENTIONS
from polaformer_jax.weights.files import WeightsFile
from polaformer_jax.weights.identify_pp import pola_pp
from polaformer_jax.weights.tensor_names import Names

_ALPHA = 4  # of all official models
# Arguments that a file may state beside its tensors, and that a model which its weights are loaded into must have.
STATED = ("attention", "alpha", "convolution", "gate", "num_heads")
_RATES = ("drop_rate", "drop_path_rate")


class Identity(NamedTuple):
    """The model of a file.

    Attributes:
        config: the hyper-parameters of the model.
        assumed: what the file does not say, one line each.
    """

    config: ModelConfig
    assumed: list[str]


def identify(file: WeightsFile, *, img_size: int | None = None) -> Identity:
    """The model whose weights the file holds.

    Args:
        img_size: used where nothing in the file shows the image size of a Pola-Swin.

    Raises:
        WeightsError: its tensors are not those of a Pola-PVT or Pola-Swin, they do not determine which one, or they do
            not match the model that the file names.
    """
    if file.metadata.get("family") == "PolaSequence":
        return _sequence(file)
    if file.metadata.get("family") == SegmenterConfig.family:
        return Identity(_stated_config(SegmenterConfig, _required(file), file), [])
    names, known = Names(file), _known(file)
    if "patch_embed1.proj.weight" in names.shapes:
        kind, identify_family = PolaPVTConfig, _pvt
    elif "patch_embed.proj.weight" in names.shapes:
        kind, identify_family = PolaSwinConfig, _swin
    elif "patch_embed.proj.0.weight" in names.shapes:
        kind, identify_family = PolaPPConfig, pola_pp
    else:
        raise WeightsError(
            f"{file.path} holds neither a Pola-PVT (patch_embed1.proj), nor a Pola-Swin (patch_embed.proj), nor a"
            f" PolaFormer++ (patch_embed.proj.0); its {len(file.tensors)} tensors begin with"
            f" {', '.join(list(file.tensors)[:3])}"
        )
    assumed = []
    if "alpha" in kind.names() and "alpha" not in known:
        known["alpha"] = _ALPHA
        assumed.append(f"alpha: {_ALPHA:g}, as in all official models")
    arguments = identify_family(names, {"img_size": img_size, **known}, assumed)
    if arguments.get("attention", "polarity") != "polarity":
        known.pop("alpha", None)
        assumed = [line for line in assumed if not line.startswith("alpha")]
    unseen = ("alpha", "padded_windows", *_RATES)
    arguments |= {name: known[name] for name in unseen if name in known and name in kind.names()}
    shown = _config(kind, arguments, file)
    if (recorded := _recorded(file)) is None:
        return Identity(shown, assumed)
    if file.metadata.get("family") != kind.family:
        wrong = ["family"]
    else:
        stated = _stated_config(kind, recorded, file)
        wrong = differences(stated, shown)
    if wrong:
        raise WeightsError(
            f"{file.path} contradicts itself: its tensors do not match the model that it names ({wrong})"
        )
    return Identity(stated, [])


def _config(kind: type[ModelConfig], arguments: Mapping[str, Any], file: WeightsFile) -> ModelConfig:
    try:
        return kind(**arguments)
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{file.path} holds tensors of a model that cannot be built: {error}") from error


def _stated_config(kind: type[ModelConfig], recorded: Mapping[str, Any], file: WeightsFile) -> ModelConfig:
    try:
        return kind(**recorded)
    except (ValueError, TypeError) as error:  # the metadata may hold anything that JSON can
        raise WeightsError(f"{file.path}: the arguments of its model cannot be understood ({error})") from error


def stored_arguments(file: WeightsFile) -> dict[str, Any]:
    """Those of `STATED` that the file states: of official files at most `alpha`.

    Where the attention is not "polarity", there is no alpha.
    """
    if file.metadata.get("family") == "PolaSequence":
        recorded = _recorded(file) or {}
        shown = ("attention", "num_heads", "alpha")
        known = {name: recorded[name] for name in shown if isinstance(recorded.get(name), str | int | float)}
        return _without_unused_alpha(known)
    if file.metadata.get("family") == SegmenterConfig.family:
        backbone = _required(file)["backbone"]
        return _without_unused_alpha({name: backbone[name] for name in STATED if name in backbone})
    known = _known(file)
    names = ("num_heads",) if file.metadata.get("family") == "PolaPP" else STATED
    return _without_unused_alpha({name: known[name] for name in names if name in known})


def _without_unused_alpha(arguments: dict[str, Any]) -> dict[str, Any]:
    if arguments.get("attention", "polarity") != "polarity":
        arguments.pop("alpha", None)
    return arguments


def num_classes_of(file: WeightsFile) -> int:
    """The number of classes of the file's classifier, 0 where there is none."""
    if file.metadata.get("family") == "PolaSequence":
        return Names(file).shape("head.fc2.weight", 2)[0]
    if file.metadata.get("family") == SegmenterConfig.family:
        return _stated_config(SegmenterConfig, _required(file), file).num_classes
    return Names(file).classes()


def _recorded(file: WeightsFile) -> dict[str, Any] | None:
    """The constructor's arguments in a file that we wrote."""
    if "arguments" not in file.metadata:
        return None
    try:
        arguments = json.loads(file.metadata["arguments"])
        return {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    except (ValueError, AttributeError) as error:
        raise WeightsError(f"{file.path}: the arguments of its model are not a JSON object ({error})") from error


def _required(file: WeightsFile) -> dict[str, Any]:
    """The constructor's arguments of a segmenter, which its tensors do not tell."""
    if not isinstance((recorded := _recorded(file) or {}).get("backbone"), Mapping):
        raise WeightsError(f"{file.path} does not say which backbone its Segmenter has")
    return recorded


def _known(file: WeightsFile) -> dict[str, Any]:
    """What the file states in addition to its tensors, as far as it is of the right type."""
    recorded = _recorded(file)
    if recorded is None:
        config = {
            "alpha": _field(file, "MODEL", "LA", "ALPHA"),
            "drop_path_rate": _field(file, "MODEL", "DROP_PATH_RATE"),
            "drop_rate": _field(file, "MODEL", "DROP_RATE"),
            "img_size": _field(file, "DATA", "IMG_SIZE"),
        }
        return {name: value for name, value in config.items() if _is_number(value)}
    heads = recorded.get("num_heads")
    numbers = ("alpha", "img_size", *_RATES)
    known = {name: recorded[name] for name in numbers if _is_number(recorded.get(name))}
    if isinstance(recorded.get("padded_windows"), bool):
        known["padded_windows"] = recorded["padded_windows"]
    if recorded.get("attention") in ATTENTIONS:
        known["attention"] = recorded["attention"]
    known |= {name: recorded[name] for name in ("convolution", "gate") if isinstance(recorded.get(name), bool)}
    fits = isinstance(heads, tuple) and len(heads) == 4 and all(map(_is_number, heads))
    return {**known, "num_heads": heads} if fits else known


def _sequence(file: WeightsFile) -> Identity:
    """A model that only we write: the file's own arguments, which loading checks against the tensors' shapes."""
    recorded, depth = _recorded(file) or {}, Names(file).count(r"blocks\.(\d+)\.", "the model")
    if recorded.get("depth", depth) != depth:
        raise WeightsError(
            f"{file.path} contradicts itself: it has {depth} blocks, and names a model of {recorded['depth']}"
        )
    return Identity(_config(PolaSequenceConfig, {**recorded, "depth": depth}, file), [])


def _pvt(names: Names, known: Mapping[str, Any], assumed: list[str]) -> dict[str, Any]:
    dims, depths, heads, ratios, softmax, linear, kinds = [], [], [], [], [], [], ""
    for i in range(4):
        stage = f"block{i + 1}"
        attn = f"{stage}.0.attn"
        kind = "L" if f"{attn}.positional_encoding" in names.shapes else "S"
        kinds += kind
        dims.append(names.shape(f"patch_embed{i + 1}.proj.weight", 4)[0])
        depths.append(names.count(rf"{stage}\.(\d+)\.", stage))
        ratios.append(names.shape(f"{stage}.0.mlp.fc1.weight", 2)[0] / dims[-1])
        reduction = names.shape(f"{attn}.sr.weight", 4)[-1] if f"{attn}.sr.weight" in names.shapes else 1
        linear.append(str(reduction) if kind == "L" else "1")
        softmax.append(reduction if kind == "S" else (8, 4, 2, 1)[i])
        if f"{attn}.power" in names.shapes:
            heads.append(names.shape(f"{attn}.power", 4)[1])
        else:
            heads.append(known.get("num_heads", (1, 2, 5, 8))[i])
            if "num_heads" not in known:
                what = "the softmax stage" if kind == "S" else "stage"
                assumed.append(f"num_heads of {what} {i + 1}: {heads[-1]}, as in the official models")
    return {
        **_token_attention(names, known),
        "img_size": names.side("pos_embed1", 1) * STRIDES[0],
        "num_classes": names.classes(),
        "embed_dims": tuple(dims),
        "num_heads": tuple(heads),
        "mlp_ratios": tuple(ratios),
        "qkv_bias": any(f"block1.0.attn.{name}.bias" in names.shapes for name in ("qg", "q")),
        "depths": tuple(depths),
        "sr_ratios": tuple(softmax),
        "la_sr_ratios": "".join(linear),
        "kernel_size": names.kernel_size(),
        "attn_type": kinds,
    }


def _swin(names: Names, known: Mapping[str, Any], assumed: list[str]) -> dict[str, Any]:
    depths, heads, kinds, windows = [], [], [], {"L": {}, "S": {}}
    for i in range(4):
        depths.append(names.count(rf"layers\.{i}\.blocks\.(\d+)\.", f"layers.{i}.blocks"))
        kinds.append("")
        for j in range(depths[-1]):
            attn = f"layers.{i}.blocks.{j}.attn"
            if f"{attn}.positional_encoding" in names.shapes:
                kinds[-1] += "L"
                windows["L"][i] = names.side(f"{attn}.positional_encoding", 1)
                if f"{attn}.power" in names.shapes:
                    head = names.shape(f"{attn}.power", 4)[1]
                elif "num_heads" in known:
                    head = known["num_heads"][i]
                else:
                    raise WeightsError(f"{names.path} does not say how many heads {attn} has")
            else:
                kinds[-1] += "S"
                windows["S"][i] = (names.side(f"{attn}.relative_position_bias_table", 0) + 1) // 2
                head = names.shape(f"{attn}.relative_position_bias_table", 2)[1]
        heads.append(head)
    dim = names.shape("patch_embed.proj.weight", 4)[0]
    return {
        **_token_attention(names, known),
        "img_size": _swin_image_size(names, windows, known.get("img_size")),
        "num_classes": names.classes(),
        "embed_dim": dim,
        "depths": tuple(depths),
        "num_heads": tuple(heads),
        "window_size": max(windows["L"].values(), default=7),
        "softmax_window_size": max(windows["S"].values(), default=None),
        "mlp_ratio": names.shape("layers.0.blocks.0.mlp.fc1.weight", 2)[0] / dim,
        "qkv_bias": any(f"layers.0.blocks.0.attn.{name}.bias" in names.shapes for name in ("qkvg", "qkv")),
        "ape": "absolute_pos_embed" in names.shapes,
        "patch_norm": "patch_embed.norm.weight" in names.shapes,
        "kernel_size": names.kernel_size(),
        "attn_type": _swin_types(kinds, names.path),
    }


def _token_attention(names: Names, known: Mapping[str, Any]) -> dict[str, Any]:
    """What the blocks of type L compute; nothing if there are none."""
    tables = [name for name in names.shapes if name.endswith("attn.positional_encoding")]
    if not tables:
        return {}
    attn = tables[0].removesuffix(".positional_encoding")
    attention = "polarity" if f"{attn}.power" in names.shapes else known.get("attention")
    if attention is None:
        raise WeightsError(f"{names.path} has no {attn}.power, and does not say which other attention it holds")
    gate = any(f"{attn}.{name}.weight" in names.shapes for name in ("qg", "qkvg"))
    return {"attention": attention, "gate": gate, "convolution": f"{attn}.dwc.weight" in names.shapes}


def _swin_types(kinds: list[str], path: str) -> str:
    """The letters of L, S and mixed stages; in mixed ones the first k blocks are L, with one k for all."""
    mixed = {kind.count("L") for kind in kinds if len(set(kind)) == 2}
    if len(mixed) > 1 or any(not re.fullmatch("L*S*", kind) for kind in kinds):
        raise WeightsError(f"{path}: no attn_type describes its linear (L) and softmax (S) blocks, {', '.join(kinds)}")
    letters = "".join(kind[0] if len(set(kind)) == 1 else "M" for kind in kinds)
    return letters + (str(mixed.pop()) if mixed else "")


def _swin_image_size(names: Names, windows: dict[str, dict[int, int]], stored: float | None) -> int:
    """The image size: from any tensor that shows the grid of a stage, otherwise the stored one."""
    sizes = set()
    for kind in windows.values():  # a window that is smaller than its kind's covers a whole grid
        sizes |= {w * STRIDES[i] for i, w in kind.items() if w < max(kind.values())}
    for name, shape in names.shapes.items():
        if match := re.fullmatch(r"layers\.([0-3])\.blocks\.\d+\.attn_mask", name):  # (windows, n, n)
            if len(shape) == 3 and math.isqrt(shape[0]) ** 2 == shape[0] and math.isqrt(shape[1]) ** 2 == shape[1]:
                sizes.add(math.isqrt(shape[0]) * math.isqrt(shape[1]) * STRIDES[int(match[1])])
    if "absolute_pos_embed" in names.shapes:
        sizes.add(names.side("absolute_pos_embed", 1) * STRIDES[0])
    if not sizes and stored is not None:
        sizes.add(int(stored))
    if len(sizes) != 1:
        found = f"contradict each other ({', '.join(map(str, sorted(sizes)))})" if sizes else "do not show it"
        raise WeightsError(f"{names.path}: the image size is needed (img_size), since the tensors {found}")
    return sizes.pop()


def _field(file: WeightsFile, *path: str) -> Any:
    """A field of the config in an official checkpoint; None where it is missing."""
    value: Any = file.facts.get("config")
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
