"""The kernel of softmax attention within windows, interpreted: the same function as the operations."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from polaformer_jax.aot.collectives import collectives
from polaformer_jax.models.kernels import windows as kernel
from polaformer_jax.models.kernels.windows import tpu
from polaformer_jax.models.layers import rematerialised
from polaformer_jax.models.window_attention import SwinBlock, WindowAttention, softmax_in_windows
from polaformer_jax.models.windows import Windows
from polaformer_jax.training import sharding
from tests.support.kernels import abstract_mesh, agree
from tests.support.quick import QUICK
from tests.support.small_models import all_finite, noise, perturbed
from tests.training.test_sharding import mesh_of

# Grid, side of the windows, whether they are shifted, heads and channels.
SHAPES = {
    "one window": ((3, 3), 3, False, 2, 128),
    "shifted": ((4, 6), 2, True, 8, 128),
    "padded": ((3, 5), 2, False, 2, 128),
    "shifted and padded": ((3, 5), 2, True, 2, 128),
    "groups of heads": ((2, 4), 2, True, 4, 256),
    "wide heads": ((2, 4), 2, True, 1, 256),
    "49 tokens": ((14, 7), 7, True, 4, 128),
    "144 tokens": ((12, 12), 12, False, 4, 128),
}


def arguments(shape, *, images=3, dtype=np.float64):
    """The windows, and qkv, bias and weights that make one number of the result."""
    grid, side, shifted, heads, channels = SHAPES[shape]
    windows, n, rng = Windows.on(grid, side, shifted=shifted), side**2, np.random.default_rng(0)
    narrow = (images, windows.count, n, channels)
    qkv, weights = (jnp.asarray(rng.normal(size=(*narrow[:3], times * channels)), dtype) for times in (3, 1))
    full = jnp.promote_types(dtype, jnp.float32)
    return windows, {"qkv": 2 * qkv, "bias": jnp.asarray(rng.normal(size=(heads, n, n)), full)}, weights


def compiled(windows, given, weights, implementation):
    """A program of the result and of the gradients of its weighted sum."""

    def total(given):
        y = softmax_in_windows(**given, windows=windows, implementation=implementation)
        return jnp.sum(y * weights), y

    return jax.jit(jax.grad(total, has_aux=True)).lower(given).compile(QUICK)


def outcome(windows, given, weights, implementation):
    gradients, y = compiled(windows, given, weights, implementation)(given)
    return {**gradients, "y": y}


@pytest.fixture
def blocks_of_two_images(monkeypatch):
    monkeypatch.setattr(tpu, "IMAGES", 2)
    softmax_in_windows.clear_cache()  # it has been traced with larger blocks
    yield
    softmax_in_windows.clear_cache()


@pytest.mark.parametrize(
    "shape",
    [
        "shifted and padded",
        *(pytest.param(name, marks=pytest.mark.slow) for name in SHAPES if name != "shifted and padded"),
    ],
)
def test_values_and_gradients_are_those_of_the_operations(shape, x64, blocks_of_two_images):
    """The last of the three images is alone in its block, whose rest holds anything: interpreted, NaN."""
    windows, given, weights = arguments(shape)
    found = outcome(windows, given, weights, "pallas")
    agree(found, outcome(windows, given, weights, "xla"), 1e-12)
    if (valid := windows.valid) is not None:
        channels = weights.shape[-1]
        keys = np.asarray(found["qkv"])[..., channels : 2 * channels]
        assert np.all(keys[:, ~valid] == 0) and np.any(keys[:, valid] != 0)  # padding is no key


@pytest.fixture(scope="module")
def in_bfloat16():
    """The kernel's program in bfloat16, and its arguments."""
    made = arguments("shifted and padded", dtype=jnp.bfloat16)
    return compiled(*made, "pallas"), made[1]


def test_zeros_in_bfloat16_give_finite_gradients(in_bfloat16):
    program, given = in_bfloat16
    gradients, y = program(jax.tree.map(jnp.zeros_like, given))
    assert y.dtype == gradients["qkv"].dtype == jnp.bfloat16 and gradients["bias"].dtype == jnp.float32
    assert all_finite((gradients, y)) and np.any(gradients["qkv"] != 0)  # those of the values


@pytest.mark.parametrize("part", ["q", "k", "v", "bias"])
def test_nan_goes_through(part, in_bfloat16):
    """To all that depends on it: at least the rows, here of the second head, that the number is in."""
    program, given = in_bfloat16
    image, window, token, channel = 1, 0, 0, 70  # whose window has no padding
    if part == "bias":
        broken = {**given, "bias": given["bias"].at[1, 0, 0].set(np.nan)}
    else:
        broken = {**given, "qkv": given["qkv"].at[image, window, token, 128 * "qkv".index(part) + channel].set(np.nan)}
    gradients, y = program(broken)
    found = np.isnan(np.asarray(y, np.float32)[image, window])  # (n, C)
    rows = [token] if part in ("q", "bias") else slice(None)
    assert found[rows][:, channel if part == "v" else slice(64, 128)].all()
    assert np.isnan(gradients["bias"][1, rows]).any()


@pytest.mark.slow
def test_in_bfloat16_it_is_as_near_to_the_truth(x64):
    windows, given, weights = arguments("49 tokens")
    narrow = {"qkv": given["qkv"].astype(jnp.bfloat16), "bias": given["bias"].astype(jnp.float32)}
    truth = outcome(windows, jax.tree.map(lambda x: x.astype(jnp.float64), narrow), weights, "xla")
    fused, operations = (outcome(windows, narrow, weights.astype(jnp.bfloat16), how) for how in ("pallas", "xla"))
    for name, exact in truth.items():
        fused_error, error = (float(jnp.max(jnp.abs(found[name] - exact))) for found in (fused, operations))
        assert fused_error <= 1.5 * error + 1e-3 * float(jnp.max(jnp.abs(exact))), name


def block_of(implementation):
    """A shifted block on a map of 3 x 4 tokens whose windows of 2 x 2 are padded, in float64."""
    types = {"dtype": jnp.float64, "param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
    attn = WindowAttention(128, 4, window=2, qkv_bias=True, drop_rate=0.0, attention_impl=implementation, **types)
    block = SwinBlock(
        attn, 128, window=2, shifted=True, mlp_ratio=0.1, epsilon=1e-5, drop_rate=0.2, drop_path=0.1, **types
    )
    return nnx.split(perturbed(block))


@pytest.mark.slow
def test_a_block_is_the_same_function_recomputed_or_not(x64):
    """With dropout and stochastic depth; the gradients of all parameters, the table of relative positions included."""
    graphdef, params = block_of("xla")
    fused, _ = block_of("pallas")
    x, key, grid = noise(3, 12, 128).astype(jnp.float64), jax.random.key(2), (3, 4)

    def total(params, run):
        y = run(params)
        return jnp.sum(y**2), y

    def run(graphdef, params):
        return nnx.merge(graphdef, params)(x, key, grid=grid)

    def recomputed(graphdef, params):
        return rematerialised(nnx.merge(graphdef, params), x, key, static={"grid": grid})

    def found(run, graphdef):
        gradient = jax.grad(functools.partial(total, run=functools.partial(run, graphdef)), has_aux=True)
        return jax.jit(gradient, compiler_options=QUICK)(params)

    expected = found(run, graphdef)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(expected)]
    assert any("relative_position_bias_table" in name for name in names)
    expected, fused = (
        dict(zip(names, jax.tree.leaves(tree), strict=True)) for tree in (expected, found(recomputed, fused))
    )
    agree(fused, expected, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("images", [16, 3])
def test_over_a_mesh_each_device_has_its_images(images):
    """Or all of them, if they do not divide evenly."""
    mesh = mesh_of(4, 2)
    windows, given, weights = arguments("shifted and padded", images=images, dtype=np.float32)
    alone = outcome(windows, given, weights, "pallas")
    batch = NamedSharding(mesh, PartitionSpec(("data", "fsdp")) if images % 8 == 0 else PartitionSpec())
    given = {
        "qkv": jax.device_put(given["qkv"], batch),
        "bias": jax.device_put(given["bias"], sharding.replicated(mesh)),
    }
    with jax.set_mesh(mesh):
        program = compiled(windows, given, jax.device_put(weights, batch), "pallas")
        gradients, y = program(given)
    agree({**gradients, "y": y}, alone, 1e-6)
    if images % 8 == 0:
        moved = collectives(program.as_text())
        assert gradients["qkv"].sharding.is_equivalent_to(batch, 4)
        assert moved and {item.kind for item in moved} <= {"all-reduce"}  # the bias's gradient, nothing else


def lowered(platform, implementation, *, mesh, images=64, heads=4, channels=128, dtype=jnp.bfloat16):
    windows = Windows.on((14, 14), 7, shifted=True)
    qkv = jax.ShapeDtypeStruct((images, 4, 49, 3 * channels), dtype)
    bias = jax.ShapeDtypeStruct((heads, 49, 49), jnp.promote_types(dtype, jnp.float32))
    program = jax.jit(functools.partial(softmax_in_windows, windows=windows, implementation=implementation))
    with jax.sharding.use_abstract_mesh(mesh):
        return program.trace(qkv, bias).lower(lowering_platforms=(platform,)).as_text()


def test_a_tpu_has_the_kernel_and_others_only_if_told():
    calls, mesh = "tpu_custom_call", abstract_mesh("tpu")
    assert calls in lowered("tpu", "auto", mesh=mesh) and calls not in lowered("tpu", "xla", mesh=mesh)
    cpus = mesh_of(8, 1).abstract_mesh
    assert "while" not in lowered("cpu", "auto", mesh=mesh)  # the interpreter of kernels is a loop
    assert "while" not in lowered("cpu", "auto", mesh=cpus) and "while" in lowered("cpu", "pallas", mesh=cpus)
    for implementation in ("auto", "pallas"):  # a GPU has none, and interprets none
        assert "while" not in lowered("cuda", implementation, mesh=abstract_mesh("cuda", size=1))
        assert calls not in lowered("tpu", implementation, mesh=abstract_mesh("tpu", kind="TPU v9"))  # not known


def test_tpus_have_no_kernel_of_64_bits(x64):
    for implementation in ("auto", "pallas"):
        program = lowered("tpu", implementation, mesh=abstract_mesh("tpu"), dtype=jnp.float64)
        assert "tpu_custom_call" not in program


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"images": 32}, id="few images on a device"),
        pytest.param({"heads": 3, "channels": 96}, id="heads that fill no registers"),
    ],
)
def test_operations_compute_what_the_kernel_would_pad(given):
    mesh = abstract_mesh("tpu")
    assert "tpu_custom_call" not in lowered("tpu", "auto", mesh=mesh, **given)


def test_windows_that_need_too_much_memory_are_left_to_xla(monkeypatch):
    monkeypatch.setattr(tpu.Plan, "memory", math.inf)
    softmax_in_windows.clear_cache()
    for implementation in ("auto", "pallas"):
        assert "tpu_custom_call" not in lowered("tpu", implementation, mesh=abstract_mesh("tpu"))


@pytest.mark.parametrize(
    "channels, heads, expected",
    [
        (384, 12, True),
        (1024, 32, True),
        (384, 8, True),
        (96, 3, False),  # fewer than a register's lanes
        (192, 6, False),  # heads of a register and a half
        (128, 3, False),
    ],
)
def test_which_channels_the_kernel_supports(channels, heads, expected):
    assert kernel.supports(jax.ShapeDtypeStruct((8, 4, 49, 3 * channels), jnp.bfloat16), heads) == expected


def test_an_unknown_implementation_is_refused():
    windows, given, _ = arguments("one window", dtype=np.float32)
    with pytest.raises(ValueError, match="implementation 'fast': expected one of auto, xla, pallas"):
        softmax_in_windows(**given, windows=windows, implementation="fast")
