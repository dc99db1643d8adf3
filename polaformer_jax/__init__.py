"""PolaFormer in JAX and Flax: polarity-aware linear attention for vision transformers.

    import polaformer_jax as pf
    model = pf.create_model("pola_swin_t", num_classes=1000, rngs=nnx.Rngs(0))

The names below are imported on first use: the processes that decode images import `polaformer_jax.data`, and would
otherwise each pay for Flax (a second and 150 MB a process).
"""

import importlib

_HOME = {
    "attention_maps": "maps",
    "create_model": "creation",
    "list_models": "zoo",
    "PolaPVT": "pola_pvt",
    "PolaSequence": "pola_sequence",
    "PolaSwin": "pola_swin",
    "PolarityAttention": "attention",
    "polarity_attention": "attention",
    "load_weights": "weights",
    "save_weights": "weights",
}
_ROOMS = (
    "attention",
    "creation",
    "data",
    "layers",
    "pola_pvt",
    "pola_sequence",
    "pola_swin",
    "training",
    "weights",
    "zoo",
)

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(list(globals()) + list(_HOME) + list(_ROOMS))
