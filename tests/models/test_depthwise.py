"""Depthwise convolution: what each back end does is the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polaformer_jax.models import depthwise


@pytest.mark.parametrize(
    ("grid", "sizes"),
    [
        pytest.param((9,), (5,), marks=pytest.mark.slow),
        ((17,), (3,)),
        pytest.param((6, 7), (5, 3), marks=pytest.mark.slow),
        pytest.param((2, 2), (5, 5), marks=pytest.mark.slow),
    ],
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


def test_the_rounded_convolution_is_the_convolution(x64):
    """In float64 the same, also its gradients; in bfloat16 it is rounded, and so is the gradient of x."""
    rng = np.random.default_rng(0)
    x, gradient, kernel, bias = (rng.normal(size=size) for size in ((2, 30, 4), (2, 30, 4), (3, 3, 1, 2), (2,)))

    def results(convolve, dtype):
        y, pull_back = jax.vjp(lambda *given: convolve(*given, grid=(5, 6)), x.astype(dtype), kernel, bias)
        return y, *pull_back(gradient.astype(y.dtype))

    for ours, theirs in zip(
        results(depthwise.rounded_depthwise_conv, np.float64),
        results(depthwise.depthwise_conv, np.float64),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-13)
    rounded, exact = (
        results(convolve, jnp.bfloat16) for convolve in (depthwise.rounded_depthwise_conv, depthwise.depthwise_conv)
    )
    assert [a.dtype for a in rounded] == [jnp.bfloat16, jnp.bfloat16, np.float64, np.float64]
    np.testing.assert_array_equal(rounded[0], exact[0].astype(jnp.bfloat16))


def test_on_tpus_the_rounded_convolution_is_rounded_before_it_goes_to_memory():
    """A barrier behind the rounding: of the result, and of the gradient of x."""

    def total(x, kernel):
        y = depthwise.rounded_depthwise_conv(x, kernel, np.zeros(2, np.float32), grid=(4, 4))
        return (y.astype(np.float32) ** 2).sum()

    given = jnp.ones((2, 16, 4), jnp.bfloat16), jnp.ones((3, 3, 1, 2), np.float32)
    program = jax.jit(jax.grad(total, argnums=(0, 1))).trace(*given)
    barriers = [
        line for line in program.lower(lowering_platforms=("tpu",)).as_text().splitlines() if "_barrier" in line
    ]
    assert len(barriers) == 2 and all("bf16" in line for line in barriers)
    assert "_barrier" not in program.lower(lowering_platforms=("cpu",)).as_text()


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
