"""Projections in several products: the same as one product that is split, with one product for each gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polaformer_jax.models.attention import PolarityAttention
from polaformer_jax.models.layers import linear
from polaformer_jax.models.projections import project_apart


@pytest.mark.parametrize(("parts", "use_bias"), [(4, True), (2, False)])
def test_parts_are_those_of_the_layer(parts, use_bias, x64):
    """Also the gradients of x, of the layer's kernel and of its bias."""
    types = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    layer = linear(6, parts * 5, use_bias=use_bias, uniform=True, rngs=nnx.Rngs(0), **types)
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(2, 7, 6)), rng.normal(size=(parts, 2, 7, 5))

    def outcome(project):
        def total(layer, x):
            results = project(layer, x)
            return sum(jnp.sum(y * w) for y, w in zip(results, weights, strict=True)), results

        return jax.tree.leaves(jax.jit(nnx.grad(total, argnums=(0, 1), has_aux=True))(layer, x))

    ours = outcome(lambda layer, x: project_apart(layer, x, parts))
    theirs = outcome(lambda layer, x: tuple(jnp.split(layer(x), parts, axis=-1)))
    assert len(ours) == len(theirs) == parts + 2 + use_bias
    for found, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


def test_the_gradients_of_all_parts_are_one_product_each():
    layer = linear(6, 20, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(layer)

    def total(params, x):
        return sum(jnp.sum(y**2) for y in project_apart(nnx.merge(graphdef, params), x, 4))

    def products(function):
        program = jax.jit(function).trace(params, np.ones((2, 7, 6), np.float32))
        return program.lower(lowering_platforms=("tpu",)).as_text().count("stablehlo.dot_general")

    assert products(total) <= 4  # equal ones are one function
    assert products(jax.grad(total, argnums=(0, 1))) == products(total) + 2


@pytest.mark.parametrize("projections", ["qkvg", "qg_kv"])
def test_an_attention_projects_apart_for_its_kernel_and_nowhere_else(projections):
    """On a CPU that is only if told: one product is faster there."""

    def project(implementation):
        attention = PolarityAttention(
            8, 2, grid=(4, 4), projections=projections, attention_impl=implementation, rngs=nnx.Rngs(0)
        )
        x = np.random.default_rng(0).normal(size=(2, 16, 8)).astype(np.float32)
        return attention.project(x), str(jax.make_jaxpr(attention.project)(x))

    (plain, of_operations), (apart, of_kernel), (_, of_auto) = (project(name) for name in ("xla", "pallas", "auto"))
    assert "custom_vjp_call" in of_kernel and "custom_vjp_call" not in of_operations
    assert of_auto == of_operations
    for found, expected in zip(apart, plain, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
