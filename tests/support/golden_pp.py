"""The golden models of PolaFormer++: shapes, weights and inputs; the numbers beside them are the official code's."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

import polaformer_jax as pf
from tests.golden.fill_pp import fill
from tests.support import GOLDEN_FOLDER
from tests.support.golden_models import filled

SMALL = json.loads((GOLDEN_FOLDER / "pp_small.json").read_text())
FULL = json.loads((GOLDEN_FOLDER / "pp_full.json").read_text())


def numbers(name: str):
    """Those of a small model, "llvv" or "mixed"; of the full ones, "full"."""
    return np.load(GOLDEN_FOLDER / (f"pp_{name}.npz" if name == "full" else f"pp_small_{name}.npz"))


def build_small(name: str, dtype, **changes):
    """(graphdef, state) of a small golden model."""
    entry = SMALL[f"pp_{name}"]
    arguments = {**entry["spec"], **changes}
    return filled(
        functools.partial(pf.PolaPP, **arguments, dtype=dtype, param_dtype=dtype),
        official_tensors(entry["shapes"]),
    )


def build_full(name: str, dtype):
    return filled(
        functools.partial(pf.create_model, name, dtype=dtype, param_dtype=dtype),
        official_tensors(FULL[name]["shapes"]),
    )


def official_tensors(shapes) -> dict[str, np.ndarray]:
    return {name: fill(name, tuple(shape)) for name, shape in shapes.items()}


def images(name: str, dtype) -> jax.Array:
    """The input of a small model; not square for "mixed"."""
    entry = SMALL[f"pp_{name}"]
    drawn = np.random.RandomState(entry["seed"]).standard_normal((4, 3, *entry["input"])).astype(np.float32)
    return jnp.asarray(drawn.transpose(0, 2, 3, 1), dtype)
