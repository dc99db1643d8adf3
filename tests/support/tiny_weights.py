"""A tiny model and its weights, under our names and the official ones."""

import jax
import numpy as np
from flax import nnx

import polaformer_jax as pf
from polaformer_jax import weights
from polaformer_jax.weights import rules
from tests.support.small_models import build_once

TINY = {"img_size": 32, "embed_dims": (4, 4, 8, 8), "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1), "num_classes": 3}


def tiny(seed=0, **changes):
    return build_once(pf.PolaPVT, seed=seed, **{**TINY, "la_sr_ratios": "2111", **changes})


def pure(model):
    return nnx.to_pure_dict(nnx.state(model))


def official(model) -> dict[str, np.ndarray]:
    flat = {name: np.asarray(leaf) for name, leaf in weights.flatten(pure(model)).items()}
    return {rules.official_name(name, a.ndim): rules.to_official(name, a) for name, a in flat.items()}


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)
