"""The golden models: their shapes, weights and inputs; the numbers beside them are the official code's, in float64."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import polaformer_jax as pf
from polaformer_jax import weights
from polaformer_jax.models.initializers import AbstractKeys
from tests.golden.fill import fill, image, is_buffer
from tests.support import GOLDEN_FOLDER

SMALL = json.loads((GOLDEN_FOLDER / "small.json").read_text())
FULL = json.loads((GOLDEN_FOLDER / "full.json").read_text())

# The official constructor has these as arguments; in ours they are constants of the family.
_FIXED = ("family", "patch_size", "norm_eps")


def build_small(name: str, dtype, **changes):
    """(graphdef, params) of a small golden model, with its golden weights; `changes` are constructor arguments."""
    spec = SMALL[name]["spec"]
    family = {"pola_pvt": pf.PolaPVT, "pola_swin": pf.PolaSwin}[spec["family"]]
    arguments = {key: value for key, value in spec.items() if key not in _FIXED} | changes
    make = functools.partial(family, **arguments, dtype=dtype, param_dtype=dtype)
    return filled(make, official_tensors(SMALL[name]["shapes"]))


def build_full(name: str, dtype):
    """(graphdef, params) of an official model, with its golden weights."""
    return filled(
        functools.partial(pf.create_model, name, dtype=dtype, param_dtype=dtype),
        official_tensors(FULL[name]["shapes"]),
    )


def filled(make, tensors):
    """(graphdef, state) of the model that `make` creates from `rngs`, with official tensors."""
    graphdef, state = nnx.split(make(rngs=AbstractKeys()))
    return graphdef, weights.from_torch(tensors, nnx.to_pure_dict(state))


def official_tensors(shapes) -> dict[str, np.ndarray]:
    return {name: fill(name, tuple(shape)) for name, shape in shapes.items() if not is_buffer(name)}


def images(batch: int, size: int, dtype) -> jax.Array:
    return jnp.asarray(image(batch, size).transpose(0, 2, 3, 1), dtype)


def relative_error(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def float32_tolerance(entry) -> float:
    return max(3e-6, 3 * entry["torch_fp32_logit_error"])
