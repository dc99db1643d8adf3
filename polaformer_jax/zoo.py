"""Model names and what they stand for."""

import difflib
import inspect
from collections.abc import Mapping
from types import MappingProxyType

import jax.numpy as jnp
from flax import nnx

from polaformer_jax.pola_pvt import PolaPVT
from polaformer_jax.pola_swin import PolaSwin


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
_MODELS = {**_OFFICIAL, **_NANO}


def list_models() -> list[str]:
    """The names that `create_model` knows, sorted."""
    return sorted(_MODELS)


def arguments(
    name: str, *, num_classes: int = 1000, img_size: int | None = None, drop_path: float | None = None, **overrides
) -> Mapping[str, object]:
    """Every hyper-parameter that `create_model` would hand to the constructor, defaults included, as a read-only table.

    Raises:
        ValueError: unknown name (with similar ones), unknown override (with those there are), drop_path given twice.
    """
    if name not in _MODELS:
        similar = difflib.get_close_matches(name, _MODELS, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(similar)}? " if similar else ""
        raise ValueError(f"unknown model {name!r}. {hint}The models are {', '.join(list_models())}")
    family, settings = _MODELS[name]
    parameters = inspect.signature(family.__init__).parameters
    known = {key: p.default for key, p in parameters.items() if key not in ("self", "dtype", "param_dtype", "rngs")}
    if unknown := sorted(set(overrides) - set(known)):
        raise ValueError(
            f"{name} has no argument {', '.join(unknown)}; the arguments of {family.__name__} are {', '.join(known)}"
        )
    if drop_path is not None:
        if "drop_path_rate" in overrides:
            raise ValueError("drop_path and drop_path_rate are two names for one rate: give one of them")
        overrides["drop_path_rate"] = drop_path
    if img_size is not None:
        overrides["img_size"] = img_size
    return MappingProxyType({**known, **settings, "num_classes": num_classes, **overrides})


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    img_size: int | None = None,
    drop_path: float | None = None,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
    **overrides,
) -> PolaPVT | PolaSwin:
    """A model of the zoo with fresh weights.

    Args:
        name: one of `list_models()`.
        img_size, drop_path: None keeps the model's own image size and rate of stochastic depth.
        dtype: of the computation; bfloat16 keeps power, normaliser, softmax and logits in float32.
        param_dtype: of the stored parameters.
        rngs: where the initial weights come from.
        overrides: any argument of the constructor (`PolaPVT`, `PolaSwin`), by its own name.

    Raises:
        ValueError: unknown name or argument, or a combination that cannot be built.
    """
    resolved = arguments(name, num_classes=num_classes, img_size=img_size, drop_path=drop_path, **overrides)
    family, _ = _MODELS[name]
    return family(**resolved, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
