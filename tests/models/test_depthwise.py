"""Depthwise convolution: what each back end does is the same function."""

import jax
import numpy as np
import pytest

from polaformer_jax.models import depthwise


@pytest.mark.parametrize(
    ("grid", "sizes"),
    [((9,), (5,)), ((17,), (3,)), ((6, 7), (5, 3)), pytest.param((2, 2), (5, 5), marks=pytest.mark.slow)],
)
def test_the_ways_of_all_back_ends_agree(x64, grid, sizes):
    rng = np.random.default_rng(0)
    x, x_tangent, gradient = rng.normal(size=(3, 3, *grid, 4))
    kernel, kernel_tangent = rng.normal(size=(2, *sizes, 4))

    def results(convolve):
        result, pull_back = jax.vjp(convolve, x, kernel)
        _, tangent = jax.jvp(convolve, (x, kernel), (x_tangent, kernel_tangent))
        return result, tangent, *pull_back(gradient)

    expected = results(depthwise.grouped_convolution)

    def of_this_back_end(x, kernel):
        return depthwise.depthwise_conv(x.reshape(3, -1, 4), kernel[..., None, :], np.zeros(4), grid=grid).reshape(
            x.shape
        )

    ways = (depthwise.shifted_products, depthwise.spread_products, depthwise.looped_products)
    for convolve in (*ways, of_this_back_end):
        for ours, theirs in zip(results(convolve), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-13)


def test_a_tpu_program_has_a_grouped_convolution_and_a_cpu_program_has_none():
    def lowered(platform, function):
        x, kernel = np.ones((2, 16, 4), np.float32), np.ones((3, 3, 1, 2), np.float32)
        return jax.jit(function).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()

    def convolve(x, kernel):
        return depthwise.depthwise_conv(x, kernel, np.zeros(2, np.float32), grid=(4, 4))

    for function in (convolve, jax.grad(lambda *given: (convolve(*given) ** 2).sum(), argnums=(0, 1))):
        assert "feature_group_count = 4" in lowered("tpu", function)
        assert "stablehlo.while" not in lowered("tpu", function)
        assert "convolution" not in lowered("cpu", function)
    assert "stablehlo.while" in lowered("cpu", function) and "stablehlo.while" not in lowered("cuda", function)
