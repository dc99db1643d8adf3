"""Small models for tests, and what is needed around them."""

import contextlib
import dataclasses
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import polaformer_jax as pf
from polaformer_jax.models import registry
from polaformer_jax.models.initializers import AbstractKeys

# Small models that reach every kind of block: reduced keys, softmax, shifted windows of both types, windows as large as
# their grid, every position table.
PVT = {
    "img_size": 32,
    "num_classes": 5,
    "embed_dims": (8, 8, 12, 16),
    "num_heads": (1, 2, 2, 2),
    "mlp_ratios": (2, 2, 1.5, 1),
    "depths": (1, 1, 1, 1),
    "sr_ratios": (4, 2, 2, 1),
    "la_sr_ratios": "2111",
    "attn_type": "LSLL",
}
SWIN = {
    "img_size": 32,
    "num_classes": 5,
    "embed_dim": 8,
    "depths": (2, 2, 1, 1),
    "num_heads": (1, 2, 2, 2),
    "window_size": 4,
    "softmax_window_size": 2,
    "attn_type": "LSLS",
    "ape": True,
    "mlp_ratio": 2,
}
# Linear and softmax stages in turns.
PP = {
    "img_size": 32,
    "num_classes": 3,
    "embed_dims": (4, 8, 8, 8),
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 2, 1, 2),
    "mlp_ratios": (1, 1, 1, 1),
    "flags": "l,v,l,v",
    "projection": 8,
}
FAMILIES = {"pvt": (pf.PolaPVT, PVT), "swin": (pf.PolaSwin, SWIN)}


def build(family: str, **changes):
    constructor, arguments = FAMILIES[family]
    return build_once(constructor, **{**arguments, "drop_path_rate": 0.0, **changes})


def abstract(family: str, **changes):
    """The same with shapes and dtypes only."""
    constructor, arguments = FAMILIES[family]
    return constructor(**{**arguments, "drop_path_rate": 0.0, **changes}, rngs=AbstractKeys())


_BUILT = {}


def build_once(constructor, *, seed=0, **arguments):
    """The model of these arguments, a new one each time, though its initial weights are drawn the first time only."""
    key = constructor, seed, jax.config.jax_enable_x64, repr(sorted(arguments.items()))
    if key not in _BUILT:
        graphdef, state = nnx.split(constructor(**arguments, rngs=nnx.Rngs(seed)))
        _BUILT[key] = graphdef, jax.tree.map(np.asarray, state)
    graphdef, state = _BUILT[key]
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, state))


@contextlib.contextmanager
def shallow() -> Iterator[None]:
    """While it lasts, the models whose sizes are this project's own have one block a stage: they compile sooner."""
    changes = {"pola_pvt_nano": {"depths": (1, 1, 1, 1)}, "pola_swin_nano": {"depths": (1, 1, 1, 1)}}
    changes["pola_pp_nano"] = {"depths": (1, 1, 1, 1), "flags": ("l", "l", "v", "v")}
    changes["pola_sequence"] = {"depth": 1}
    models = {name: dataclasses.replace(registry.model_config(name), **change) for name, change in changes.items()}
    with mock.patch.dict(registry._MODELS, models):
        yield


def split(model):
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def all_finite(tree) -> bool:
    return all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(tree))


def noise(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape)


def perturbed(model, *, scale=0.2):
    """The model with noise added to all its parameters: those that begin as zeros or ones matter as well."""
    params = nnx.state(model, nnx.Param)
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    noisy = [jnp.asarray(np.asarray(leaf) + scale * rng.standard_normal(leaf.shape, np.float32)) for leaf in leaves]
    nnx.update(model, jax.tree.unflatten(structure, noisy))
    return model


def tiny_pp(**changes):
    """A PolaFormer++ that compiles quickly."""
    return build_once(pf.PolaPP, **{**PP, **changes})
