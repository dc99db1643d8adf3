"""PolaFormer in JAX and Flax: polarity-aware linear attention for vision transformers.

    import polaformer_jax as pf
    model = pf.create_model("pola_swin_t", num_classes=1000, rngs=nnx.Rngs(0))

The names below are imported on first use: the processes that decode images import `polaformer_jax.data`, and would
otherwise each pay for Flax (a second and 150 MB a process).
"""

import importlib

__version__ = "0.2.0"

_EXPORTS = {
    "attention_maps": "analysis.attention_maps",
    "create_model": "weights.creation",
    "list_models": "models.registry",
    "model_config": "models.registry",
    "PolaPP": "models.pola_pp",
    "PolaPPConfig": "models.pola_pp",
    "PolaPVT": "models.pola_pvt",
    "PolaPVTConfig": "models.pola_pvt",
    "PolaSequence": "models.pola_sequence",
    "PolaSequenceConfig": "models.pola_sequence",
    "PolaSwin": "models.pola_swin",
    "PolaSwinConfig": "models.pola_swin",
    "PolarityAttention": "models.attention",
    "polarity_attention": "models.attention",
    "predict": "inference.prediction",
    "preprocess": "inference.images",
    "push_to_hub": "export",
    "segment": "inference.segmentation",
    "Segmenter": "models.segmenter",
    "SegmenterConfig": "models.segmenter",
    "segmenter_config": "models.registry",
    "load_weights": "weights",
    "save_weights": "weights",
}
_SUBPACKAGES = ("analysis", "config", "data", "errors", "export", "inference", "models", "training", "weights")

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_EXPORTS, *_SUBPACKAGES])
