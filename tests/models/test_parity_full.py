"""Six of the official models at full size, against the official code: pooled features and logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.support.golden_models import FULL, GOLDEN_FOLDER, build_full, float32_tolerance, images, relative_error
from tests.support.quick import AS_USERS, QUICK


def names(*quick: str) -> list:
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in FULL]


def run(name, dtype, options):
    graphdef, params = build_full(name, dtype)
    x = images(1, FULL[name]["img_size"], dtype)

    def both(params):
        model = nnx.merge(graphdef, params)
        pooled = model.pooled(x)
        return pooled, model.head(pooled)

    return jax.jit(both, compiler_options=options)(params)


@pytest.mark.parametrize("name", names("pola_pvt_t"))
def test_float64(name, x64):
    golden = np.load(GOLDEN_FOLDER / "full.npz")
    pooled, logits = run(name, jnp.float64, QUICK)
    assert relative_error(pooled, golden[f"{name}/features"]) < 1e-9
    assert relative_error(logits, golden[f"{name}/logits"]) < 1e-9


@pytest.mark.parametrize("name", names())
def test_float32(name):
    _, logits = run(name, jnp.float32, AS_USERS)
    assert relative_error(logits, np.load(GOLDEN_FOLDER / "full.npz")[f"{name}/logits"]) < float32_tolerance(FULL[name])
