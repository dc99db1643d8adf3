"""The fused MLP, interpreted: the same function as the operations, in blocks of either order, and over a mesh."""

import contextlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from polaformer_jax.aot.collectives import collectives
from polaformer_jax.hardware.costs import product_flops
from polaformer_jax.models import layers
from polaformer_jax.models.attention import PolarityAttention
from polaformer_jax.models.kernels.mlp import fused_mlp, tpu
from polaformer_jax.models.layers import Block, rematerialised
from tests.support.kernels import abstract_mesh, agree
from tests.support.quick import QUICK
from tests.training.test_sharding import mesh_of

KEY = jax.random.key(5)  # drops one of four samples at the rate 0.3


def block_of(channels, implementation, *, dtype="float64", attn=None, ratio=2.5, **rates):
    param_dtype = "float64" if dtype == "float64" else "float32"
    rates = {"drop_rate": 0.0, "drop_path": 0.3, **rates}
    return Block(
        attn,
        channels,
        mlp_ratio=ratio,
        epsilon=1e-5,
        implementation=implementation,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=nnx.Rngs(0),
        **rates,
    )


def parameters_of(block):
    """All of them random."""
    _, params = nnx.split(block)
    flat, tree = jax.tree.flatten(params)
    draw = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [p + 0.3 * draw.normal(size=p.shape).astype(p.dtype) for p in flat])


def tokens(*shape, dtype="float64"):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype)


def compiled(block, params, x, run=lambda block, x: block.add_mlp(x, None, KEY)):
    """A program of the result, and of the gradients of a number that depends on all of it."""
    graphdef, _ = nnx.split(block)
    weights = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), x.dtype)

    def total(params, x):
        y = run(nnx.merge(graphdef, params), x)
        return jnp.sum(y * weights), y

    return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True)).lower(params, x).compile(QUICK)


def outcome(implementation, params, x, **options):
    (of_params, of_x), y = compiled(block_of(x.shape[2], implementation, **options), params, x)(params, x)
    return named(of_params, of_x, y)


def named(of_params, of_x, y):
    paths = jax.tree_util.tree_flatten_with_path(of_params)[0]
    return {**{jax.tree_util.keystr(path): bar for path, bar in paths}, "x": of_x, "y": y}


@pytest.fixture
def sizes(monkeypatch):
    """Sets how many tokens a block, and hidden channels a chunk, have at most."""

    def limit(most_tokens, most_hidden, cores=1):
        monkeypatch.setattr(tpu, "MOST_TOKENS", most_tokens)
        monkeypatch.setattr(tpu, "MOST_HIDDEN", most_hidden)
        monkeypatch.setattr(tpu, "cores", lambda: cores)
        fused_mlp.clear_cache()

    yield limit
    fused_mlp.clear_cache()


@pytest.mark.parametrize(
    ("tokens_and_channels", "limits", "axis", "blocks", "chunks", "parts"),
    [
        pytest.param((7, 12), (128, 512, 1), 1, 1, 1, 1, id="whole, channels along the lanes"),
        pytest.param((20, 12), (128, 512, 1), 0, 1, 1, 1, id="whole, tokens along the lanes"),
        pytest.param((300, 8), (128, 8, 2), 0, 3, 3, 2, id="the last block and chunk are smaller, two cores"),
        pytest.param((130, 140), (128, 128, 1), 1, 3, 3, 1, id="blocks along the other axis", marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_are_those_of_the_operations(
    tokens_and_channels, limits, axis, blocks, chunks, parts, x64, sizes
):
    """Also of a sample whose branch is dropped."""
    sizes(*limits)
    x = tokens(4, *tokens_and_channels)
    block = block_of(x.shape[2], "pallas")
    plan = tpu.plan(x, block.mlp.fc1.out_features, 1e-5)
    assert (plan.axis, plan.blocks, len(plan.chunks), plan.parts) == (axis, blocks, chunks, parts)
    params = parameters_of(block)
    expected = outcome("xla", params, x)
    assert [bool(np.array_equal(y, z)) for y, z in zip(expected["y"], x, strict=True)].count(True) == 1
    agree(outcome("pallas", params, x), expected, 1e-10)


def test_without_gradients_a_tpu_computes_the_same_by_operations(x64):
    block, x = block_of(8, "xla"), tokens(4, 20, 8)
    nnx.update(block, parameters_of(block))
    fc1, fc2, norm = block.mlp.fc1, block.mlp.fc2, block.norm2
    arrays = {
        "gamma": norm.scale,
        "beta": norm.bias,
        "w1": fc1.kernel,
        "b1": fc1.bias,
        "w2": fc2.kernel,
        "b2": fc2.bias,
    }
    arrays = {name: param[...] for name, param in arrays.items()}
    keep = layers.stochastic_depth(jnp.ones((4, 1, 1)), 0.3, KEY)
    y = fused_mlp({"x": x, "keep": keep, **arrays}, eps=1e-5, on_tpu=True)  # no kernel: this would not compile here
    np.testing.assert_allclose(y, block.add_mlp(x, None, KEY), rtol=0, atol=1e-12)


def test_nan_goes_through_where_it_does_by_operations(sizes):
    """Wherever the operations give NaN; and a dropped branch stays dropped."""
    sizes(128, 8)
    x = tokens(4, 20, 8, dtype="float32")
    blocks = {name: block_of(8, name, dtype="float32") for name in ("xla", "pallas")}
    params = parameters_of(blocks["xla"])
    programs = {name: compiled(block, params, x) for name, block in blocks.items()}
    given = [(params, x.at[1, 2, 3].set(np.nan))]
    for of_layer in (lambda p: p["norm2"], lambda p: p["mlp"]["fc1"], lambda p: p["mlp"]["fc2"]):
        for name in of_layer(params):
            broken = jax.tree.map(lambda p: p, params)
            array = of_layer(broken)[name][...]
            of_layer(broken)[name][...] = array.at[(0,) * array.ndim].set(np.nan)
            given.append((broken, x))
    for arguments in given:
        expected, found = (named(*bars, y) for bars, y in (programs[name](*arguments) for name in ("xla", "pallas")))
        assert any(np.isnan(array).any() for array in expected.values())
        for name, array in expected.items():
            assert np.isnan(found[name])[np.isnan(array)].all(), name
        if arguments[1] is x:
            np.testing.assert_array_equal(np.isnan(found["y"]), np.isnan(expected["y"]))


def test_in_bfloat16_zeros_give_finite_gradients():
    x = jnp.zeros((2, 20, 8), "bfloat16")
    block = block_of(8, "pallas", dtype="bfloat16")
    params = parameters_of(block)
    found = named(*(lambda bars, y: (*bars, y))(*compiled(block, params, x)(params, x)))
    assert found["y"].dtype == found["x"].dtype == jnp.bfloat16
    assert all(np.isfinite(array.astype("float32")).all() for array in found.values())


@pytest.mark.slow
def test_in_bfloat16_it_is_as_near_to_the_truth(x64):
    """As the operations are, but for a factor."""
    x = tokens(4, 20, 8).astype("bfloat16").astype("float64")
    params = jax.tree.map(lambda p: p.astype("float32").astype("float64"), parameters_of(block_of(8, "xla")))
    truth = outcome("xla", params, x)
    narrow = jax.tree.map(lambda p: p.astype("float32"), params)

    def errors(implementation):
        found = outcome(implementation, narrow, x.astype("bfloat16"), dtype="bfloat16")
        return {name: float(jnp.max(jnp.abs(found[name].astype("float64") - truth[name]))) for name in truth}

    fused, operations = errors("pallas"), errors("xla")
    for name, error in operations.items():
        assert fused[name] <= 1.5 * error + 1e-3 * float(jnp.max(jnp.abs(truth[name]))), name


@pytest.mark.slow
def test_over_a_mesh_each_device_has_its_examples():
    """And the gradients of parameters, which are sharded over `fsdp`, are summed once."""
    mesh, block, x = mesh_of(4, 2), block_of(8, "pallas", dtype="float32"), tokens(16, 20, 8, dtype="float32")
    params = parameters_of(block)
    (of_params, of_x), y = compiled(block, params, x)(params, x)
    alone = named(of_params, of_x, y)
    batch = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def placed(p):
        largest = int(np.argmax(p.shape))
        axes = ["fsdp" if axis == largest and p.shape[axis] % 2 == 0 else None for axis in range(p.ndim)]
        return jax.device_put(p, NamedSharding(mesh, PartitionSpec(*axes)))

    with jax.set_mesh(mesh):
        placed_params, placed_x = jax.tree.map(placed, params), jax.device_put(x, batch)
        program = compiled(block, placed_params, placed_x)
        (of_params, of_x), y = program(placed_params, placed_x)
    agree(named(of_params, of_x, y), alone, 1e-5)
    assert y.sharding.is_equivalent_to(batch, 3) and of_x.sharding.is_equivalent_to(batch, 3)
    moved = collectives(program.as_text())
    assert {item.kind for item in moved} <= {"all-reduce", "all-gather", "reduce-scatter"}


def lowered(
    platform, implementation, *, mesh=None, shape=(8, 256, 128), dtype="bfloat16", key=None, gradients=True, **rates
):
    block = nnx.eval_shape(lambda: block_of(shape[2], implementation, dtype=dtype, drop_path=0.0, **rates))
    graphdef, params = nnx.split(block)

    def run(params, x):
        return nnx.merge(graphdef, params).add_mlp(x, key, key)

    program = jax.jit(jax.grad(lambda params, x: jnp.sum(run(params, x).astype("float32"))) if gradients else run)
    with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh):
        traced = program.trace(params, jax.ShapeDtypeStruct(shape, dtype))
        return traced.lower(lowering_platforms=(platform,)).as_text()


def test_a_tpu_has_the_kernel_where_the_mesh_is_known_and_others_only_if_told(monkeypatch):
    calls, mesh = "tpu_custom_call", abstract_mesh("tpu")
    assert calls in lowered("tpu", "auto", mesh=mesh)
    assert calls not in lowered("tpu", "auto", mesh=mesh, gradients=False)  # operations move fewer bytes
    assert calls not in lowered("tpu", "xla", mesh=mesh)
    assert calls not in lowered("tpu", "auto", mesh=mesh, dtype="float32")  # not shown to be better
    assert calls not in lowered("tpu", "auto", mesh=mesh, shape=(8, 49, 128))  # too few tokens of an example
    assert calls not in lowered("tpu", "auto", mesh=abstract_mesh("tpu", kind="TPU v9"))  # its memory is not known
    assert "while" not in lowered("cpu", "auto", mesh=mesh)  # the interpreter of kernels is a loop
    cpus = mesh_of(8, 1).abstract_mesh
    assert "while" not in lowered("cpu", "auto", mesh=cpus) and "while" in lowered("cpu", "pallas", mesh=cpus)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind="TPU v5 lite")])
    assert calls not in lowered("tpu", "auto")  # eight devices, and no mesh says how the batch lies on them


def test_what_needs_too_much_memory_is_left_to_xla():
    wide = {"shape": (8, 196, 512), "ratio": 4.0}
    for kind, expected in (("TPU v5 lite", True), ("TPU v4", False)):
        mesh = abstract_mesh("tpu", kind=kind)
        for implementation in ("auto", "pallas"):
            program = lowered("tpu", implementation, mesh=mesh, **wide)
            assert ("tpu_custom_call" in program) == expected, (kind, implementation)


@pytest.mark.parametrize(("tokens", "channels", "needed"), [(196, 384, 22.12), (196, 512, 37.18), (784, 192, 20.91)])
def test_in_float32_it_asks_for_as_much_memory_as_it_needs(tokens, channels, needed):
    """MiB, as libtpu 0.0.52 told of the gradients' kernel when it was given less, with MLP ratio 4."""
    with jax.sharding.use_abstract_mesh(abstract_mesh("tpu")):
        plan = tpu.plan(jax.ShapeDtypeStruct((16, tokens, channels), jnp.float32), 4 * channels, 1e-5)
    assert needed < tpu.memory(plan, jnp.float32, backward=True) / 2**20 < 1.25 * needed


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="implementation 'fast': expected one of auto, xla, pallas"):
        block_of(8, "fast")


def test_dropout_within_the_mlp_is_by_operations(monkeypatch):
    with_dropout = {"drop_rate": 0.1, "dtype": "float32", "shape": (8, 20, 8)}
    assert "while" in lowered("cpu", "pallas", **with_dropout)  # in evaluation there is none
    monkeypatch.setattr(layers, "dropout", lambda x, rate, key: x)  # random numbers take a loop
    assert "while" not in lowered("cpu", "pallas", key=jax.random.key(0), **with_dropout)


def test_the_operations_of_a_step_are_counted_without_the_kernel():
    """Which computes the hidden activations again: see `Experiment.step_flops`."""
    x = jax.ShapeDtypeStruct((8, 256, 128), "bfloat16")

    def operations(implementation):
        block = block_of(128, implementation, dtype="bfloat16")
        graphdef, params = nnx.split(block)

        def total(params, x):
            return jnp.sum(nnx.merge(graphdef, params).add_mlp(x, None, KEY).astype("float32"))

        with jax.sharding.use_abstract_mesh(abstract_mesh("tpu")):
            return product_flops(jax.jit(jax.value_and_grad(total, argnums=(0, 1))).trace(params, x).jaxpr.jaxpr)

    assert operations("auto") == operations("xla") == 3 * 2 * 2 * 8 * 256 * 128 * 320


@pytest.mark.slow
def test_a_whole_block_with_stochastic_depth_and_recomputation(x64):
    def one(implementation):
        types = {"dtype": "float64", "param_dtype": "float64", "rngs": nnx.Rngs(0)}
        attn = PolarityAttention(8, 2, grid=(4, 5), projections="qkvg", attention_impl=implementation, **types)
        return block_of(8, implementation, attn=attn)

    params, x = parameters_of(one("xla")), tokens(4, 20, 8)

    def run(block, x):
        return rematerialised(block, x, KEY, static={"grid": (4, 5)})

    expected, found = (
        named(*(lambda bars, y: (*bars, y))(*compiled(one(name), params, x, run)(params, x)))
        for name in ("xla", "pallas")
    )
    agree(found, expected, 1e-10)
