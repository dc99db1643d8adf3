"""Batch normalisation: statistics of valid examples, running averages as PyTorch's, folded in evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polaformer_jax.models.batch_norm import BatchNorm, Conv, conv_norm, statistics_of
from tests.support import small_models
from tests.support.small_models import noise


def norm_of(features=3):
    norm = BatchNorm(features, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = jnp.asarray([1.0, 2.0, 3.0]), jnp.asarray([0.5, 0.0, -1.0])
    norm.mean[...], norm.var[...] = jnp.asarray([0.1, 0.2, 0.3]), jnp.asarray([1.0, 2.0, 3.0])
    return norm


@pytest.mark.parametrize("valid", [4, 3, 1])
def test_statistics_are_those_of_the_valid_examples(valid):
    x = np.array(noise(4, 2, 3, 3))
    x[valid:] = 1e6  # what a padding example holds
    norm, mask = norm_of(), jnp.arange(4) < valid
    y = norm(jnp.asarray(x), mask)
    own = x[:valid].astype(np.float64).reshape(-1, 3)
    mean, variance = own.mean(axis=0), own.var(axis=0)
    expected = (x[:valid] - mean) / np.sqrt(variance + 1e-5) * [1, 2, 3] + [0.5, 0, -1]
    np.testing.assert_allclose(y[:valid], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.mean[...], 0.9 * np.array([0.1, 0.2, 0.3]) + 0.1 * mean, rtol=1e-5)
    unbiased = own.var(axis=0, ddof=1)
    np.testing.assert_allclose(norm.var[...], 0.9 * np.array([1.0, 2.0, 3.0]) + 0.1 * unbiased, rtol=1e-5)


def test_no_valid_example_and_a_single_value_are_finite():
    norm = norm_of()
    for x, mask in ((noise(2, 1, 1, 3), jnp.zeros(2, bool)), (noise(1, 1, 1, 3), jnp.ones(1, bool))):
        assert np.isfinite(norm(x, mask)).all()
        assert np.isfinite(norm.var[...]).all()


@pytest.mark.parametrize("stride", [1, 2])
def test_evaluation_folds_the_statistics_into_the_convolution(stride):
    types = {"dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    conv, norm, x = Conv(3, 2, 3, stride=stride, **types), norm_of(), noise(2, 4, 6, 2)
    y = (conv(x) - norm.mean[...].reshape(1, 1, 1, 3)) / jnp.sqrt(norm.var[...].reshape(1, 1, 1, 3) + 1e-5)
    expected = y * norm.scale[...].reshape(1, 1, 1, 3) + norm.bias[...].reshape(1, 1, 1, 3)
    np.testing.assert_allclose(conv_norm(conv, norm, x, None), expected, rtol=1e-4, atol=1e-5)
    assert expected.shape == (2, 4 // stride, 6 // stride, 3)


def test_statistics_are_found_in_a_models_state():
    assert statistics_of(small_models.build("pvt")) is None
    assert statistics_of(norm_of()) == {"bias": False, "mean": True, "scale": False, "var": True}
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(norm_of())))
    assert len(leaves) == 4
