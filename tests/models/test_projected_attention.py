"""The TPU kernel with the linear layers around it, interpreted: a module's results and gradients by operations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polaformer_jax.models.attention import PolarityAttention
from polaformer_jax.models.kernels.polarity import tpu_convolution, tpu_plan
from polaformer_jax.models.kernels.polarity.taps import Taps
from tests.models.test_gpu_kernels import compiled, flat
from tests.models.test_polarity_kernel import agree

# Projections, reduction of the keys, grid, heads, channels, size of the convolution's kernel, and whether there are
# biases. The kernel computes the convolution but for reduced keys, and for heads that GPUs have a kernel for.
LAYERS = {
    "one layer": ("qkvg", 1, (4, 6), 2, 8, 3, True),
    "no bias": ("qkvg", 1, (10, 14), 2, 16, 5, False),
    "two layers": ("qg_kv", 1, (3, 5), 3, 12, 5, True),
    "reduced keys": ("qg_kv", 2, (4, 6), 2, 8, 3, True),
    "wide heads": ("qkvg", 1, (5, 5), 4, 64, 3, True),
    "a sequence": ("qkvg", 1, (19,), 2, 8, 3, True),
}


def outcome(case, implementation):
    projections, ratio, grid, heads, dim, size, has_bias = LAYERS[case]
    module = PolarityAttention(
        dim,
        heads,
        grid=grid,
        projections=projections,
        sr_ratio=ratio,
        kernel_size=size,
        qkv_bias=has_bias,
        attention_impl=implementation,
        dtype=jnp.float64,
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    graphdef, params = nnx.split(module)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), nnx.to_pure_dict(params))
    x = jnp.asarray(rng.normal(size=(2, np.prod(grid), dim)))
    return flat(compiled(graphdef, params, x)(params, x))


@pytest.mark.parametrize(
    "case", [name if name == "two layers" else pytest.param(name, marks=pytest.mark.slow) for name in LAYERS]
)
def test_values_and_gradients_are_those_of_the_operations(case, x64):
    agree(outcome(case, "pallas"), outcome(case, "xla"), 1e-12)


@pytest.mark.parametrize(
    ("grid", "size"),
    [
        pytest.param((4, 6), (3, 3), marks=pytest.mark.slow),
        pytest.param((3, 4), (5, 7), marks=pytest.mark.slow),
        ((1, 9), (1, 3)),
        pytest.param((2, 2), (5, 5), marks=pytest.mark.slow),
    ],
)
def test_a_convolution_along_the_lanes_is_that_of_a_padded_map(grid, size, x64):
    """So are its gradients. Kernels may be larger than the map; lanes beyond it have no tokens."""
    taps, lanes, rng = Taps.on(grid, size), 128, np.random.default_rng(0)
    tokens = grid[0] * grid[1]
    x, y_bar = (jnp.asarray(rng.normal(size=(3, tokens))) for _ in range(2))
    weights = jnp.asarray(rng.normal(size=(3, taps.count)))

    def padded(x):
        return jnp.pad(x, [(0, 0), (0, lanes - tokens)])

    def plainly(x, weights):
        around = [(0, 0), *((side // 2, side // 2) for side in size)]
        image = jnp.pad(x.reshape(3, *grid), around)
        windows = [image[:, down : down + grid[0], right : right + grid[1]] for down, right in np.ndindex(*size)]
        return sum(window.reshape(3, -1) * weights[:, i : i + 1] for i, window in enumerate(windows))

    @jax.jit
    def ours(x, weights, y_bar):
        run = functools.partial(tpu_convolution.convolved, taps, weights=weights)
        bars = tpu_convolution.weight_bars(taps, padded(x), padded(y_bar), tpu_plan.tap_lanes(taps))
        return run(padded(x))[:, :tokens], run(padded(y_bar), transposed=True)[:, :tokens], bars

    y, pull_back = jax.vjp(plainly, x, weights)
    *found, weight_bars = ours(x, weights, y_bar)
    found = (*found, weight_bars[:, : taps.count])
    for one, expected in zip(found, (y, *pull_back(y_bar)), strict=True):
        np.testing.assert_allclose(one, expected, rtol=0, atol=1e-13)
    assert not weight_bars[:, taps.count :].any()
