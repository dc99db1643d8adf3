"""Depthwise convolution: what each back end does is the same function."""

import functools

import jax
import numpy as np
import pytest

from polaformer_jax.models import depthwise


@pytest.mark.parametrize(("grid", "sizes"), [((9,), (5,)), ((6, 7), (5, 3)), ((2, 2), (5, 5))])
def test_the_ways_of_all_back_ends_agree(x64, grid, sizes):
    rng = np.random.default_rng(0)
    x, gradient = rng.normal(size=(2, 3, *grid, 4))
    kernel = rng.normal(size=(*sizes, 4))
    expected, pull_back = jax.vjp(depthwise.grouped_convolution, x, kernel)
    np.testing.assert_allclose(depthwise.shifted_products(x, kernel), expected, rtol=0, atol=1e-13)
    for gradients in (
        depthwise.shifted_products_gradients,
        functools.partial(depthwise.shifted_products_gradients, loop=False),
        depthwise.grouped_convolution_gradients,
    ):
        for ours, theirs in zip(gradients(x, kernel, gradient), pull_back(gradient), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-13)


def test_a_tpu_program_has_a_grouped_convolution_and_a_cpu_program_has_none():
    def lowered(platform):
        x, kernel = np.ones((2, 16, 4), np.float32), np.ones((3, 3, 1, 2), np.float32)
        program = jax.jit(lambda x, kernel: depthwise.depthwise_conv(x, kernel, np.zeros(2, np.float32), grid=(4, 4)))
        return program.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()

    assert "feature_group_count = 4" in lowered("tpu")
    assert "convolution" not in lowered("cpu")
