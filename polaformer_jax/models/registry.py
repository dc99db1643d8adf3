"""Model names and what they stand for."""

import difflib
import inspect
from collections.abc import Mapping
from types import MappingProxyType

from polaformer_jax.errors import UserError
from polaformer_jax.models.backbone import NO_HYPERPARAMETERS
from polaformer_jax.models.pola_pvt import PolaPVT
from polaformer_jax.models.pola_sequence import PolaSequence
from polaformer_jax.models.pola_swin import PolaSwin, softmax_window


def _pvt(*, depths: tuple[int, ...], drop_path: float) -> tuple[type, dict]:
    return PolaPVT, {
        "img_size": 224,
        "embed_dims": (64, 128, 320, 512),
        "num_heads": (1, 2, 5, 8),
        "mlp_ratios": (8, 8, 4, 4),
        "sr_ratios": (8, 4, 2, 1),
        "la_sr_ratios": "1111",
        "qkv_bias": True,
        "attn_type": "LLLL",
        "depths": depths,
        "drop_path_rate": drop_path,
    }


def _swin(dim: int, *, heads: int, depth: int, drop_path: float, img_size: int = 224, window: int = 56):
    return PolaSwin, {
        "img_size": img_size,
        "embed_dim": dim,
        "num_heads": (heads, 2 * heads, 4 * heads, 8 * heads),
        "depths": (2, 2, depth, 2),
        "window_size": window,
        "attn_type": "LLSS",
        "drop_path_rate": drop_path,
    }


# As in the configs of https://github.com/ZacharyMeng/PolaFormer, where pola_pvt_b is called `pola_pvt_large`. In all of
# them alpha is 4 and kernel_size 5, the constructors' defaults.
_OFFICIAL = {
    "pola_pvt_t": _pvt(depths=(2, 2, 2, 2), drop_path=0.1),
    "pola_pvt_s": _pvt(depths=(3, 4, 6, 3), drop_path=0.1),
    "pola_pvt_m": _pvt(depths=(3, 4, 18, 3), drop_path=0.3),
    "pola_pvt_b": _pvt(depths=(3, 8, 27, 3), drop_path=0.3),
    "pola_swin_t": _swin(96, heads=3, depth=6, drop_path=0.2),
    "pola_swin_s": _swin(96, heads=3, depth=18, drop_path=0.3),
    "pola_swin_b": _swin(128, heads=4, depth=18, drop_path=0.5),
    "pola_swin_b_384": _swin(128, heads=4, depth=18, drop_path=0.5, img_size=384, window=96),
}

# Ours, not the authors', and unpublished: small enough to be trained on 32x32 images by a CPU in minutes.
_NANO = {
    "pola_pvt_nano": (
        PolaPVT,
        {
            "img_size": 32,
            "embed_dims": (32, 64, 128, 160),
            "num_heads": (1, 2, 4, 5),
            "mlp_ratios": (4, 4, 4, 4),
            "sr_ratios": (8, 4, 2, 1),
            "la_sr_ratios": "1111",
            "qkv_bias": True,
            "attn_type": "LLLL",
            "depths": (1, 1, 2, 1),
            "drop_path_rate": 0.05,
        },
    ),
    "pola_swin_nano": (
        PolaSwin,
        {
            "img_size": 32,
            "embed_dim": 32,
            "num_heads": (1, 2, 4, 8),
            "depths": (2, 1, 1, 1),
            "window_size": 4,
            "softmax_window_size": 2,
            "attn_type": "LLSS",
            "mlp_ratio": 2.0,
            "drop_path_rate": 0.05,
        },
    ),
}
# Of the Long Range Arena; classes, vocabulary and length are the task's.
_SEQUENCE = {"pola_sequence": (PolaSequence, {})}
_MODELS = {**_OFFICIAL, **_NANO, **_SEQUENCE}


def list_models() -> list[str]:
    """The names that `create_model` knows, sorted."""
    return sorted(_MODELS)


FAMILIES = {"PolaPVT": PolaPVT, "PolaSwin": PolaSwin, "PolaSequence": PolaSequence}


def lookup(name: str) -> tuple[type, dict[str, object]]:
    """The family of a model, and the arguments in which it differs from the family's defaults.

    Raises:
        ValueError: unknown name (with similar ones).
    """
    if name not in _MODELS:
        similar = difflib.get_close_matches(name, _MODELS, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(similar)}? " if similar else ""
        raise UserError(f"unknown model {name!r}. {hint}The models are {', '.join(list_models())}")
    return _MODELS[name]


def arguments(
    name: str,
    *,
    num_classes: int | None = None,
    img_size: int | None = None,
    drop_path: float | None = None,
    **overrides,
) -> Mapping[str, object]:
    """Every hyper-parameter that `create_model` would hand to the constructor, defaults included, as a read-only table.

    Raises:
        ValueError: unknown name (with similar ones), unknown override (with those there are), drop_path given twice.
    """
    family, settings = lookup(name)
    return MappingProxyType(
        resolve(family, settings, num_classes=num_classes, img_size=img_size, drop_path=drop_path, **overrides)
    )


def resolve(
    family: type,
    settings: Mapping[str, object],
    *,
    num_classes: int | None = None,
    img_size: int | None = None,
    drop_path: float | None = None,
    **overrides,
) -> dict[str, object]:
    """All arguments of a family's constructor: its defaults, over them `settings`, over them the rest; None is nothing.

    Raises:
        ValueError: unknown override (with those there are), drop_path given twice.
    """
    known = _defaults(family)
    if unknown := sorted(set(overrides) - set(known)):
        raise UserError(f"{family.__name__} has no argument {', '.join(unknown)}; its arguments are {', '.join(known)}")
    if drop_path is not None and "drop_path_rate" in overrides:
        raise UserError("drop_path and drop_path_rate are two names for one rate: give one of them")
    given = {"num_classes": num_classes, "img_size": img_size, "drop_path_rate": drop_path}
    given = {key: value for key, value in given.items() if value is not None}
    if unknown := sorted(set(given) - set(known)):
        raise UserError(f"{family.__name__} has no argument {', '.join(unknown)}; its arguments are {', '.join(known)}")
    return {**known, **settings, **given, **overrides}


def name_of(family: str, given: Mapping[str, object]) -> str | None:
    """The name under which `create_model` knows an architecture, whatever its classes, image size and drop rates."""
    wanted = _architecture(FAMILIES[family], given)
    return next(
        (
            name
            for name, (other, settings) in sorted(_MODELS.items())
            if other.__name__ == family and _architecture(other, settings) == wanted
        ),
        None,
    )


def differences(family: str, one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    """Names of arguments in which two descriptions of a model differ, but for rates of dropout and stochastic depth.

    Arguments that do not act, such as the softmax window of a model without softmax blocks, do not count.
    """
    one, other = ({**_architecture(FAMILIES[family], given), **_size(given)} for given in (one, other))
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _size(given: Mapping[str, object]) -> dict[str, object]:
    return {name: given.get(name) for name in ("img_size", "num_classes")}


def _architecture(family: type, given: Mapping[str, object]) -> dict[str, object]:
    """What makes two models of one family the same function of their weights, in one way of writing it."""
    full = {**_defaults(family), **given}
    if family is PolaSequence:
        return {name: full[name] for name in ("dim", "depth", "num_heads", "mlp_dim", "head_dim", "kernel_size")}
    for free in ("num_classes", "img_size", "drop_rate", "drop_path_rate"):
        del full[free]
    letters = full["attn_type"]
    if family is PolaSwin:
        full["softmax_window_size"] = softmax_window(full["window_size"], full["softmax_window_size"])
        if "L" not in letters and "M" not in letters:
            full["window_size"] = None
        if "S" not in letters and "M" not in letters:
            full["softmax_window_size"] = None
    else:
        full["sr_ratios"] = [ratio for ratio, kind in zip(full["sr_ratios"], letters, strict=True) if kind == "S"]
        digits = zip(str(full["la_sr_ratios"]), letters, strict=True)
        full["la_sr_ratios"] = [digit for digit, kind in digits if kind == "L"]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in full.items()}


def _defaults(family: type) -> dict[str, object]:
    parameters = inspect.signature(family.__init__).parameters
    return {key: p.default for key, p in parameters.items() if key not in NO_HYPERPARAMETERS}
