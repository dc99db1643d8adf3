"""Model names and their configs, and models created from configs."""

import dataclasses
import difflib

from polaformer_jax.errors import UserError
from polaformer_jax.models.families import BACKBONES, ImageModel
from polaformer_jax.models.initializers import AbstractKeys
from polaformer_jax.models.model_config import ModelConfig
from polaformer_jax.models.pola_pp import PolaPPConfig
from polaformer_jax.models.pola_pvt import PolaPVTConfig
from polaformer_jax.models.pola_sequence import PolaSequence, PolaSequenceConfig
from polaformer_jax.models.pola_swin import PolaSwinConfig
from polaformer_jax.models.segmenter import Segmenter, SegmenterConfig


def _pvt(*, depths: tuple[int, ...], drop_path: float) -> PolaPVTConfig:
    return PolaPVTConfig(
        img_size=224,
        embed_dims=(64, 128, 320, 512),
        num_heads=(1, 2, 5, 8),
        mlp_ratios=(8, 8, 4, 4),
        sr_ratios=(8, 4, 2, 1),
        la_sr_ratios="1111",
        qkv_bias=True,
        attn_type="LLLL",
        depths=depths,
        drop_path_rate=drop_path,
    )


def _swin(
    dim: int, *, heads: int, depth: int, drop_path: float, img_size: int = 224, window: int = 56
) -> PolaSwinConfig:
    return PolaSwinConfig(
        img_size=img_size,
        embed_dim=dim,
        num_heads=(heads, 2 * heads, 4 * heads, 8 * heads),
        depths=(2, 2, depth, 2),
        window_size=window,
        attn_type="LLSS",
        drop_path_rate=drop_path,
    )


def _pp(
    dims: tuple[int, ...],
    *,
    depths: tuple[int, ...],
    num_heads: tuple[int, ...],
    drop_path: float,
    scales: tuple[float, ...] = (1, 1, 1, 1),
    projection: int = 2048,
) -> PolaPPConfig:
    return PolaPPConfig(
        embed_dims=dims,
        depths=depths,
        num_heads=num_heads,
        layer_init_values=scales,
        projection=projection,
        drop_path_rate=drop_path,
    )


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

# As in the configs of https://github.com/ZacharyMeng/PolaFormerPP.
_PP = {
    "pola_pp_b0": _pp((32, 64, 128, 384), depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 12), drop_path=0.1),
    "pola_pp_b1": _pp((32, 64, 192, 384), depths=(2, 2, 4, 2), num_heads=(1, 2, 6, 12), drop_path=0.1),
    "pola_pp_b2": _pp((64, 128, 256, 512), depths=(2, 2, 6, 2), num_heads=(1, 2, 4, 8), drop_path=0.1),
    "pola_pp_b3": _pp((64, 128, 320, 512), depths=(3, 5, 9, 3), num_heads=(1, 2, 5, 8), drop_path=0.15),
    "pola_pp_b4": _pp(
        (96, 192, 384, 512), depths=(4, 6, 12, 6), num_heads=(1, 2, 6, 8), drop_path=0.4, scales=(1, 1, 1e-6, 1e-6)
    ),
    "pola_pp_b5": _pp(
        (96, 192, 448, 640),
        depths=(4, 7, 19, 8),
        num_heads=(1, 2, 7, 10),
        drop_path=0.55,
        scales=(1e-6,) * 4,
        projection=2560,
    ),
}

# Ours, not the authors', and unpublished: small enough to be trained on 32x32 images by a CPU in minutes.
_NANO = {
    "pola_pvt_nano": PolaPVTConfig(
        img_size=32,
        embed_dims=(32, 64, 128, 160),
        num_heads=(1, 2, 4, 5),
        mlp_ratios=(4, 4, 4, 4),
        sr_ratios=(8, 4, 2, 1),
        la_sr_ratios="1111",
        qkv_bias=True,
        attn_type="LLLL",
        depths=(1, 1, 2, 1),
        drop_path_rate=0.05,
    ),
    "pola_swin_nano": PolaSwinConfig(
        img_size=32,
        embed_dim=32,
        num_heads=(1, 2, 4, 8),
        depths=(2, 1, 1, 1),
        window_size=4,
        softmax_window_size=2,
        attn_type="LLSS",
        mlp_ratio=2.0,
        drop_path_rate=0.05,
    ),
    "pola_pp_nano": PolaPPConfig(
        img_size=32,
        embed_dims=(32, 64, 96, 128),
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 3, 4),
        mlp_ratios=(2, 2, 2, 2),
        projection=256,
        drop_path_rate=0.05,
    ),
}
# For the Long Range Arena, whose tasks set classes, vocabulary and length.
_SEQUENCE = {"pola_sequence": PolaSequenceConfig()}
_MODELS: dict[str, ModelConfig] = {**_OFFICIAL, **_PP, **_NANO, **_SEQUENCE}

Model = ImageModel | PolaSequence | Segmenter
FAMILIES: dict[str, type[Model]] = {**BACKBONES, **{cls.Config.family: cls for cls in (PolaSequence, Segmenter)}}


def check_model(model: object) -> None:
    """Raises a TypeError if it is no model: models have a `config`."""
    if not isinstance(getattr(model, "config", None), ModelConfig):
        *others, last = FAMILIES
        raise TypeError(f"model is a {type(model).__name__}, expected a {', '.join(others)} or {last}")


def list_models() -> list[str]:
    """The names that `create_model` knows, sorted."""
    return sorted(_MODELS)


def model_config(
    name: str,
    *,
    num_classes: int | None = None,
    img_size: int | None = None,
    drop_path: float | None = None,
    **overrides,
) -> ModelConfig:
    """The hyper-parameters of a model by name, with changes (see `change`).

    Raises:
        UserError: unknown name (with similar ones), or changes that do not fit.
    """
    if name not in _MODELS:
        similar = difflib.get_close_matches(name, _MODELS, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(similar)}? " if similar else ""
        raise UserError(f"unknown model {name!r}. {hint}The models are {', '.join(list_models())}")
    return change(_MODELS[name], num_classes=num_classes, img_size=img_size, drop_path=drop_path, **overrides)


def segmenter_config(
    backbone: str,
    *,
    head: str,
    num_classes: int | None = None,
    head_channels: int | None = None,
    auxiliary_channels: int | None = None,
    img_size: int | None = None,
    drop_path: float | None = None,
    **overrides,
) -> SegmenterConfig:
    """The hyper-parameters of a segmenter on a named backbone.

    Args:
        head, num_classes, head_channels, auxiliary_channels: see `SegmenterConfig`; None: its default.
        img_size, drop_path, overrides: changes of the backbone, see `change`. Windows of a Pola-Swin need not divide
            its grids.

    Raises:
        UserError: unknown name, a model of sequences, or values that do not fit.
    """
    named = model_config(backbone)
    if named.family not in BACKBONES:
        raise UserError(f"model {backbone!r} is a {named.family}: a segmenter needs one of {', '.join(BACKBONES)}")
    if "padded_windows" in named.names():
        overrides = {"padded_windows": True, **overrides}
    config = model_config(backbone, img_size=img_size, drop_path=drop_path, **overrides)
    given = {"num_classes": num_classes, "head_channels": head_channels, "auxiliary_channels": auxiliary_channels}
    return SegmenterConfig(
        backbone=config, head=head, **{name: value for name, value in given.items() if value is not None}
    )


def change(
    config: ModelConfig,
    *,
    num_classes: int | None = None,
    img_size: int | None = None,
    drop_path: float | None = None,
    **overrides,
) -> ModelConfig:
    """A config with some fields replaced.

    Args:
        num_classes, img_size, drop_path: None keeps the config's value; `drop_path` is `drop_path_rate`.
        overrides: any other field, by its own name; `mlp_ratio` of all stages too. Of a segmenter, the fields of its
            backbone too.

    Raises:
        UserError: a field that the family does not have, `drop_path` given twice, or values that do not fit.
    """
    if drop_path is not None and "drop_path_rate" in overrides:
        raise UserError("drop_path and drop_path_rate are two names for one rate: give one of them")
    if isinstance(config, SegmenterConfig):
        own = {name: value for name, value in overrides.items() if name in config.names()}
        rest = {name: value for name, value in overrides.items() if name not in own}
        if own.get("head", config.head) != config.head:  # another head has its own numbers of channels
            own = {"head_channels": None, "auxiliary_channels": None, **own}
        own["backbone"] = change(own.get("backbone", config.backbone), img_size=img_size, drop_path=drop_path, **rest)
        return dataclasses.replace(config, **own, **({} if num_classes is None else {"num_classes": num_classes}))
    given = {"num_classes": num_classes, "img_size": img_size, "drop_path_rate": drop_path}
    given = {name: value for name, value in given.items() if value is not None} | overrides
    if "mlp_ratio" in given and "mlp_ratios" in config.names():
        if "mlp_ratios" in given:
            raise UserError("mlp_ratio is mlp_ratios of all stages: give one of them")
        given["mlp_ratios"] = given.pop("mlp_ratio")
    if unknown := sorted(given.keys() - set(config.names())):
        raise UserError(
            f"{config.family} has no argument {', '.join(unknown)}; its arguments are {', '.join(config.names())}"
        )
    return dataclasses.replace(config, **given)


def create(config: ModelConfig, **computation) -> Model:
    """The model of a config, with initial parameters.

    Args:
        computation: `dtype`, `param_dtype`, `attention_impl` and `rngs` of the model's constructor.
    """
    return FAMILIES[config.family](config, **computation)


def create_abstract(config: ModelConfig, **computation) -> Model:
    """The model of a config with abstract parameters (`jax.ShapeDtypeStruct`); nothing is computed."""
    return create(config, **computation, rngs=AbstractKeys())


def name_of(config: ModelConfig) -> str | None:
    """The name of the registered model with this architecture, whatever its classes, image size and drop rates."""
    wanted = config.architecture()
    return next(
        (
            name
            for name, other in sorted(_MODELS.items())
            if other.family == config.family and other.architecture() == wanted
        ),
        None,
    )
