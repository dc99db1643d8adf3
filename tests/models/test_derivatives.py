"""Derivatives of every mode and order, of functions that keep nothing but their arguments for them."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polaformer_jax.models.attention import PolarityAttention
from polaformer_jax.models.depthwise import depthwise_conv
from polaformer_jax.models.layers import Block, gelu, linear
from polaformer_jax.models.signed_features import signed_features
from tests.support.quick import QUICK


def plain_features(q, k, *, power, scale, positional_encoding, alpha):
    """`signed_features` by its definition."""
    heads, width = power.shape[1], power.shape[3]
    s, p = jax.nn.softplus(scale), 1 + alpha * jax.nn.sigmoid(power.reshape(1, 1, heads, width))

    def signed(x):
        x = (x / s).reshape(*x.shape[:2], heads, width)
        # The inner `where` keeps the slope of a power at 0, which is not defined for its exponent, out of the sum.
        parts = [jnp.where(part > 0, jnp.where(part > 0, part, 1) ** p, 0) for part in (x, -x)]
        return jnp.concatenate(parts, axis=-1)

    return signed(q), signed(k + positional_encoding)


def arguments(dtype=np.float64, zeros=False):
    rng = np.random.default_rng(0)
    heads, width, tokens, keys = 2, 4, 6, 3
    drawn = {
        "q": rng.normal(size=(2, tokens, heads * width)),
        "k": rng.normal(size=(2, keys, heads * width)),
        "power": rng.normal(size=(1, heads, 1, width)),
        "scale": rng.normal(size=(1, 1, heads * width)),
        "positional_encoding": rng.normal(size=(1, keys, heads * width)),
    }
    if zeros:
        drawn["q"][:, ::2] = 0
        drawn["k"][:, 0], drawn["positional_encoding"][:, 0] = 0.5, -0.5
    return {name: jnp.asarray(a, dtype) for name, a in drawn.items()}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("zeros", [False, True])
def test_signed_powers_have_the_derivatives_of_differentiation(x64, alpha, zeros):
    given = arguments(zeros=zeros)
    for order, rtol in ((1, 1e-12), (2, 1e-9)):  # gradients of gradients too
        found, expected = (gradients(features, given, alpha, order) for features in (signed_features, plain_features))
        for name in given:
            np.testing.assert_allclose(found[name], expected[name], rtol=rtol, atol=1e-10, err_msg=f"{name}, {order}")


def smooth(x):
    return jnp.sum(jnp.log1p(x * x))


@functools.partial(jax.jit, static_argnames=("features", "order"), compiler_options=QUICK)
def gradients(features, given, alpha, order):
    def total(given):
        q, k = features(**given, alpha=alpha)
        return smooth(q) + smooth(k - 1)

    if order == 1:
        return jax.grad(total)(given)
    return jax.grad(lambda given: sum(smooth(g) for g in jax.tree.leaves(jax.grad(total)(given))))(given)


def test_gelu_has_the_derivatives_of_differentiation(x64):
    x = jnp.concatenate([jnp.linspace(-9, 9, 181), jnp.array([-40.0, 0.0, 40.0])])

    @functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
    def orders(function, x):
        """Values, and gradients of sums of values and of two orders of gradients."""
        sums = [lambda x: jnp.sum(function(x) ** 2)]
        for _ in range(2):
            sums.append(lambda x, f=sums[-1]: jnp.sum(jnp.sin(jax.grad(f)(x))))
        return function(x), *(jax.grad(f)(x) for f in sums[1:])

    found, expected = orders(gelu, x), orders(functools.partial(jax.nn.gelu, approximate=False), x)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12, atol=1e-14)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def kept_bytes(function, *args) -> int:
    """What is kept from the forward pass for the backward pass."""
    kept = jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *args)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_only_the_arguments_are_kept(dtype):
    x = jnp.ones((64, 64), dtype)
    assert kept_bytes(gelu, x) == x.nbytes
    given = arguments(jnp.float32)
    given |= {"q": jnp.ones((8, 640, 8), dtype), "k": jnp.ones((8, 3, 8), dtype)}

    def features(given):
        return signed_features(**given, alpha=4.0)

    x, layer = jnp.ones((4, 32, 64), dtype), linear(64, 8, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(layer)
    kept = kept_bytes(lambda params, x: nnx.merge(graphdef, params)(x), params, x)
    assert kept == x.nbytes + params["kernel"][...].nbytes
    x = jnp.ones((4, 64, 64))  # the dtype of sums, to which the convolution converts
    kernel, bias = jnp.ones((5, 5, 1, 8)), jnp.ones(8)
    kept = kept_bytes(lambda x, kernel: depthwise_conv(x, kernel, bias, grid=(8, 8)), x, kernel)
    assert x.nbytes < kept < x.nbytes + 8192  # and a kernel
    inputs = given["q"].nbytes + given["k"].nbytes
    assert inputs <= kept_bytes(features, given) < inputs + 2048  # and parameters
    gradients = jax.eval_shape(jax.grad(lambda given: jnp.sum(features(given)[0]).astype(jnp.float32)), given)
    assert jax.tree.map(lambda a: a.dtype, gradients) == jax.tree.map(lambda a: a.dtype, given)


@pytest.mark.parametrize("sr_ratio", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_forward_mode_and_derivatives_of_gradients(x64, sr_ratio):
    """`jvp` of a block's loss and of its gradients: the slope, and central differences of the gradients."""
    rngs, dim, types = nnx.Rngs(0), 8, {"dtype": jnp.dtype("float64"), "param_dtype": jnp.dtype("float64")}
    attention = PolarityAttention(
        dim, 2, grid=(4, 4), projections="qg_kv", sr_ratio=sr_ratio, kernel_size=3, rngs=rngs, **types
    )
    block = Block(attention, dim, mlp_ratio=2, epsilon=1e-5, drop_rate=0.0, drop_path=0.0, rngs=rngs, **types)
    graphdef, params = nnx.split(block)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 16, dim)))
    point, direction = (
        jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 4), params) for _ in range(2)
    )

    def loss(params):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(x)))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def derivatives(params):
        (_, gradient), (slope, curvature) = jax.jvp(jax.value_and_grad(loss), (params,), (direction,))
        return gradient, slope, curvature

    def moved(by):
        return jax.tree.map(lambda leaf, along: leaf + by * along, point, direction)

    gradient, slope, curvature = derivatives(point)
    assert slope == pytest.approx(float(sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, direction)))), rel=1e-12)
    after, before = (derivatives(moved(by))[0] for by in (1e-6, -1e-6))
    numeric = jax.tree.map(lambda after, before: (after - before) / 2e-6, after, before)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), curvature, numeric)


@pytest.mark.slow
def test_hessians_and_linearizations_of_linear_layers_and_gelu(x64):
    layer, x = linear(3, 4, dtype="float64", param_dtype="float64", rngs=nnx.Rngs(0)), jnp.linspace(-1, 1, 3)

    def ours(x):
        return jnp.sum(gelu(layer(x[None, None])) ** 2)

    def theirs(x):
        return jnp.sum(jax.nn.gelu(x @ layer.kernel[...] + layer.bias[...], approximate=False) ** 2)

    np.testing.assert_allclose(jax.hessian(ours)(x), jax.hessian(theirs)(x), rtol=1e-12)
    np.testing.assert_allclose(jax.linearize(ours, x)[1](x), jax.jvp(theirs, (x,), (x,))[1], rtol=1e-12)


def test_the_kernel_refuses_forward_mode_with_the_message_that_the_documentation_explains():
    x = jnp.ones((1, 16, 8))
    attention = PolarityAttention(8, 2, grid=(4, 4), projections="qkvg", attention_impl="pallas", rngs=nnx.Rngs(0))
    message = "can't apply forward-mode autodiff (jvp) to a custom_vjp function"
    with pytest.raises(TypeError, match=re.escape(message)):
        jax.jvp(attention, (x,), (x,))
    assert message in (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()
