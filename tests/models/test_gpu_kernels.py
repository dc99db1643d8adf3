"""The kernels that only GPUs have, interpreted: the same functions as the operations."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from polaformer_jax.aot.collectives import collectives
from polaformer_jax.models.attention import PolarityAttention
from polaformer_jax.models.kernels import mlp, placement
from polaformer_jax.models.kernels.erf import erf
from polaformer_jax.models.kernels.mlp import gpu as mlp_gpu
from polaformer_jax.models.kernels.polarity import gpu
from polaformer_jax.models.kernels.polarity.taps import Taps
from polaformer_jax.models.layers import Block, gelu
from polaformer_jax.training import sharding
from tests.support.kernels import abstract_mesh, agree
from tests.support.quick import QUICK
from tests.training.test_sharding import mesh_of

# Projections, grid, heads, and whether the projections have biases; heads have 16 channels, blocks 16 tokens.
LAYERS = {
    "one layer, two heads": ("qkvg", (5, 7), 2, True),
    "two layers": ("qg_kv", (3, 5), 1, True),
    "a sequence": ("qkvg", (19,), 1, False),
}
WIDTH = 16


@pytest.fixture
def on_gpu(monkeypatch):
    """Programs are traced as if for a GPU, in blocks of 16 tokens."""
    monkeypatch.setattr(placement, "for_gpu", lambda: True)
    monkeypatch.setattr(gpu, "BLOCK", 16 * WIDTH)
    jax.clear_caches()
    yield
    jax.clear_caches()


def attention(case, dtype, implementation):
    """A module, its parameters drawn at random, and tokens of two examples."""
    projections, grid, heads, has_bias = LAYERS[case]
    module = PolarityAttention(
        heads * WIDTH,
        heads,
        grid=grid,
        projections=projections,
        kernel_size=3,
        qkv_bias=has_bias,
        attention_impl=implementation,
        dtype=dtype,
        param_dtype=jnp.promote_types(dtype, jnp.float32),
        rngs=nnx.Rngs(0),
    )
    graphdef, params = nnx.split(module)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), nnx.to_pure_dict(params))
    return graphdef, params, jnp.asarray(rng.normal(size=(2, np.prod(grid), heads * WIDTH)), dtype)


def compiled(graphdef, params, x):
    """A program of the result and of the gradients of a number that depends on all of it."""
    weights = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), x.dtype)

    def total(params, x):
        y = nnx.merge(graphdef, params)(x)
        return jnp.sum(y * weights), y

    return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True)).lower(params, x).compile(QUICK)


def outcome(case, dtype, implementation):
    graphdef, params, x = attention(case, dtype, implementation)
    return flat(compiled(graphdef, params, x)(params, x))


def flat(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize(
    "case", [name if name == "two layers" else pytest.param(name, marks=pytest.mark.slow) for name in LAYERS]
)
def test_values_and_gradients_are_those_of_the_operations(case, x64, on_gpu):
    agree(outcome(case, np.float64, "pallas"), outcome(case, np.float64, "xla"), 1e-12)


@pytest.mark.slow
def test_nan_goes_through_and_zeros_are_finite(on_gpu):
    by_operations, by_kernel = (
        (compiled(*given), *given[1:])
        for how in ("xla", "pallas")
        for given in [attention("two layers", "float32", how)]
    )
    for change in (lambda x: x.at[0, 3, 1].set(np.nan), jnp.zeros_like):
        expected, found = (
            jax.tree.leaves(program(params, change(x))) for program, params, x in (by_operations, by_kernel)
        )
        for one, other in zip(expected, found, strict=True):
            assert np.array_equal(np.isnan(one), np.isnan(other))


@pytest.mark.slow
def test_bfloat16_is_finite_at_zeros_and_close_to_the_operations(on_gpu):
    graphdef, params, x = attention("two layers", "bfloat16", "pallas")
    program = compiled(graphdef, params, x)
    zeros = flat(program(jax.tree.map(jnp.zeros_like, params), jnp.zeros_like(x)))
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in zeros.values())
    y, expected = (
        np.asarray(given[1], np.float32)
        for given in (program(params, x), compiled(*attention("two layers", "bfloat16", "xla"))(params, x))
    )
    np.testing.assert_allclose(y, expected, atol=0.05 * np.abs(expected).max())


@pytest.mark.slow
def test_over_a_mesh_each_device_has_its_examples(on_gpu, x64):
    mesh = mesh_of(2, 2)
    graphdef, params, x = attention("two layers", jnp.float64, "pallas")
    x = jnp.concatenate([x, 2 * x])
    alone = flat(compiled(graphdef, params, x)(params, x))
    jax.clear_caches()
    placed = jax.device_put(
        (params, x), (sharding.replicated(mesh), NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    )
    with jax.set_mesh(mesh):
        program = compiled(graphdef, *placed)
        found = flat(program(*placed))
    agree(found, alone, 1e-12)
    moved = collectives(program.as_text())
    assert moved and {item.kind for item in moved} <= {"all-reduce"}  # gradients of the parameters, nothing else


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # since jax 0.11
def test_only_a_gpu_that_is_told_has_the_kernel():
    mesh = abstract_mesh("cuda", size=1)

    def lowered(platform, implementation, mesh):
        graphdef, params, x = attention("two layers", jnp.float32, implementation)
        run = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))
        with jax.sharding.use_abstract_mesh(mesh):
            return run.trace(params, x).lower(lowering_platforms=(platform,)).as_text()

    assert "packed_forward_kernel" in lowered("cuda", "pallas", mesh)
    assert "xla.gpu.triton" not in lowered("cuda", "auto", mesh)
    assert "packed" not in lowered("cpu", "pallas", mesh_of(8, 1).abstract_mesh)


def mlp_arguments(batch, tokens, channels, hidden):
    """Arguments of `fused_mlp`; some examples are dropped, the others scaled."""
    rng = np.random.default_rng(0)
    shapes = {"x": (batch, tokens, channels), "gamma": (channels,), "beta": (channels,), "w1": (channels, hidden)}
    shapes |= {"b1": (hidden,), "w2": (hidden, channels), "b2": (channels,)}
    arrays = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    return arrays | {"keep": jnp.asarray([1.25 * (i % 2) for i in range(batch)]).reshape(-1, 1, 1)}


def mlp_by_operations(arrays):
    x, keep, w1, w2 = (arrays[name] for name in ("x", "keep", "w1", "w2"))
    gamma, beta, b1, b2 = (arrays[name].reshape(1, 1, -1) for name in ("gamma", "beta", "b1", "b2"))
    standard = (x - x.mean(axis=-1, keepdims=True)) / jnp.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    return x + keep * (gelu((standard * gamma + beta) @ w1 + b1) @ w2 + b2)


@pytest.mark.parametrize(
    "sizes",
    [
        (3, 11, 24, 40),  # channels and hidden channels are padded, and a block has tokens of two examples
        pytest.param((2, 16, 16, 32), marks=pytest.mark.slow),  # nothing is padded
        pytest.param((1, 5, 40, 16), marks=pytest.mark.slow),  # fewer tokens than a block has
    ],
)
def test_the_mlp_is_that_of_the_operations(sizes, x64, monkeypatch):
    """Values and gradients, of dropped examples too."""
    monkeypatch.setattr(mlp, "_interpreted", lambda: mlp_gpu)
    monkeypatch.setattr(mlp_gpu, "ELEMENTS", 16 * 16)
    arrays = mlp_arguments(*sizes)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=arrays["x"].shape))

    def outcome(function):
        def total(given):
            y = function(given | {"keep": arrays["keep"]})
            return jnp.sum(y * weights), y

        given = {name: array for name, array in arrays.items() if name != "keep"}
        gradients, y = jax.jit(jax.grad(total, has_aux=True), compiler_options=QUICK)(given)
        return gradients | {"y": y}

    mlp.fused_mlp.clear_cache()
    agree(outcome(functools.partial(mlp.fused_mlp, eps=1e-5)), outcome(mlp_by_operations), 1e-12)
    mlp.fused_mlp.clear_cache()


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # since jax 0.11
def test_a_gpu_has_the_mlp_kernel_for_few_channels_and_operations_for_many():
    mesh = abstract_mesh("cuda", size=1)

    def lowered(channels, implementation):
        types = {"dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)}
        settings = {"mlp_ratio": 0.5, "epsilon": 1e-5, "drop_rate": 0.0, "drop_path": 0.0}
        graphdef, params = nnx.split(Block(None, channels, implementation=implementation, **settings, **types))
        run = jax.jit(lambda params, x: nnx.merge(graphdef, params).add_mlp(x, None, None))
        x = jax.ShapeDtypeStruct((1, 16, channels), jnp.float32)
        with jax.sharding.use_abstract_mesh(mesh):
            return run.trace(params, x).lower(lowering_platforms=("cuda",)).as_text()

    assert "mlp_forward_kernel" in lowered(96, "pallas")
    assert "mlp_forward_kernel" not in lowered(96, "auto")
    wide = lowered(257, "pallas")
    assert "mlp_forward_kernel" not in wide and "while" not in wide  # nor is it interpreted


def test_the_error_function_is_that_of_single_precision():
    x = np.concatenate([np.linspace(-5, 5, 10001), [np.inf, -np.inf, np.nan, 0]]).astype(np.float32)
    np.testing.assert_allclose(jax.jit(erf)(x), [math.erf(one) for one in x.astype(float)], rtol=0, atol=5e-7)


@pytest.mark.parametrize("grid", [(3, 4), (5,)])
def test_taps_read_the_neighbours_of_a_map(grid):
    """Each tap in turn, against an array of the tokens' numbers that is padded and cut."""
    taps = Taps.on(grid, (3, 5)[-len(grid) :])
    height, width = taps.grid
    rows, columns = taps.sizes
    tokens = np.arange(height * width)
    padded = np.pad(tokens.reshape(height, width), ((rows // 2,) * 2, (columns // 2,) * 2), constant_values=-1)
    neighbours, readers_of = (
        jax.vmap(functools.partial(taps.neighbours, tokens=jnp.asarray(tokens), transposed=transposed))
        for transposed in (False, True)
    )
    every = zip(*neighbours(jnp.arange(taps.count)), *readers_of(jnp.arange(taps.count)), strict=True)
    for (row, column), (found, there, readers, read) in zip(np.ndindex(rows, columns), every, strict=True):
        expected = padded[row : row + height, column : column + width].reshape(-1)
        assert np.array_equal(np.where(there, found, -1), expected)
        assert all(expected[reader] == token for token, reader in zip(tokens[read], readers[read], strict=True))
        assert read.sum() == there.sum()
