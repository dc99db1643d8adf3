"""Resizing and pooling of maps against PyTorch 2.13, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polaformer_jax.models.maps import adaptive_average_pool, bilinear_weights, resize_bilinear, resize_nearest
from tests.support import GOLDEN_FOLDER
from tests.support.small_models import noise

GOLDEN = np.load(GOLDEN_FOLDER / "dense_heads.npz")
SOURCES = [key.removeprefix("resize/") for key in GOLDEN.files if key.startswith("resize/")]
source = pytest.mark.parametrize("source", SOURCES)


def outputs(kind: str, source: str) -> dict[str, np.ndarray]:
    prefix = f"{kind}/{source}/"
    return {key.removeprefix(prefix): GOLDEN[key] for key in GOLDEN.files if key.startswith(prefix)}


def shape_of(text: str) -> tuple[int, int]:
    height, width = map(int, text.split("x"))
    return height, width


@source
def test_bilinear(source, x64):
    x = jnp.asarray(GOLDEN[f"resize/{source}"], jnp.float64)
    for size, expected in outputs("bilinear", source).items():
        found = resize_bilinear(x, shape_of(size))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14, err_msg=size)
    assert resize_bilinear(x, x.shape[1:3]) is x


@source
def test_nearest(source):
    x = jnp.asarray(GOLDEN[f"resize/{source}"])
    for size, expected in outputs("nearest", source).items():
        np.testing.assert_array_equal(resize_nearest(x, shape_of(size)), expected, err_msg=size)


def test_nearest_is_exact_where_quotients_are_whole():
    """2 * 41 / 82 is 1, which PyTorch's float32 takes for less."""
    rows = resize_nearest(jnp.arange(2.0).reshape(1, 2, 1, 1), (82, 1)).reshape(-1)
    np.testing.assert_array_equal(rows, np.repeat([0.0, 1.0], 41))


@source
def test_pooling(source, x64):
    x = jnp.asarray(GOLDEN[f"resize/{source}"], jnp.float64)
    for bins, expected in outputs("pool", source).items():
        np.testing.assert_allclose(adaptive_average_pool(x, int(bins)), expected, rtol=0, atol=1e-14, err_msg=bins)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_weights_of_traced_sizes_resize_each_example(dtype, x64):
    sizes, count = [8, 10, 3, 14, 1, 0], 14
    x = jnp.asarray(np.random.RandomState(0).standard_normal((6, 5, 1, 3)), dtype)
    weights = jax.jit(bilinear_weights, static_argnums=(0, 2, 3))(5, jnp.asarray(sizes, jnp.int32), count, dtype)
    assert weights.shape == (6, count, 5) and weights.dtype == dtype
    found = np.einsum("bco,boxd->bcxd", weights, x)
    for example, size in enumerate(sizes):
        whole = np.asarray(resize_bilinear(x[example : example + 1], (max(size, 1), 1)))[0]
        expected = whole[np.minimum(np.arange(count), max(size, 1) - 1)]  # the edge is repeated
        np.testing.assert_allclose(found[example], expected, rtol=0, atol=1e-14 if dtype == jnp.float64 else 2e-6)


def test_bfloat16_is_rounded_once():
    x = noise(1, 4, 6, 3).astype(jnp.bfloat16)
    for function, argument in ((resize_bilinear, (9, 7)), (adaptive_average_pool, 3)):
        expected = function(x.astype(jnp.float32), argument).astype(jnp.bfloat16)
        np.testing.assert_array_equal(function(x, argument), expected)
        assert expected.dtype == function(x, argument).dtype == jnp.bfloat16
