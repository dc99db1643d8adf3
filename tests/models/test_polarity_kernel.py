"""The fused kernels, interpreted: the same function as the operations, whole, in blocks, masked, and over a mesh."""

import contextlib
import functools
import os
import subprocess
import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from polaformer_jax.aot.collectives import collectives
from polaformer_jax.errors import UserError
from polaformer_jax.models.attention import polarity_attention
from polaformer_jax.models.kernels import placement, polarity
from polaformer_jax.models.kernels.polarity import gpu, tpu, tpu_plan
from polaformer_jax.training import sharding
from polaformer_jax.training.experiment import Experiment
from tests.models.test_attention import draw
from tests.support import small_models
from tests.support.kernels import abstract_mesh, agree
from tests.support.quick import QUICK
from tests.training.test_sharding import config_of, mesh_of

# Heads, width, grid, reduction of the keys, and channels in a group. For TPUs the last two have channels along the
# lanes, the others tokens.
SHAPES = {
    "one head": (1, 8, (4, 6), 1, 8),
    "heads share a group": (3, 4, (5, 5), 1, 12),
    "reduced keys": (2, 8, (8, 8), 4, 16),
    "a sequence": (2, 4, (1, 37), 1, 8),
    "many tokens": (2, 4, (10, 14), 1, 8),
    "many queries": (12, 16, (20, 18), 2, 96),
    "groups of heads": (8, 32, (5, 5), 1, 128),
    "many channels": (8, 32, (8, 8), 4, 128),
}


def arguments(shape, dtype=np.float64, batch=2):
    heads, width, grid, ratio, _ = SHAPES[shape]
    given = draw(heads, width, grid, ratio, 3, batch=batch)
    given["q"][0, 0] = 0  # where powers have no slope
    given["k"][0, 0] = -given["positional_encoding"][0, 0]
    return {name: jnp.asarray(value, dtype) for name, value in given.items()}


def compiled(given, shape, implementation, mask=None):
    """A program of the result, and of the gradients of a number that depends on all of it."""
    grid = SHAPES[shape][2] if mask is None else mask.shape[1:]
    weights = np.random.default_rng(1).normal(size=given["q"].shape)
    weights = jnp.asarray(weights if mask is None else weights * mask[:, :, None], given["q"].dtype)

    def total(given):
        y = polarity_attention(**given, grid=grid, mask=mask, implementation=implementation)
        return jnp.sum(y * weights), y if mask is None else jnp.where(mask[:, :, None], y, 0)

    return jax.jit(jax.grad(total, has_aux=True)).lower(given).compile(QUICK)


def outcome(given, *how, **options):
    gradients, y = compiled(given, *how, **options)(given)
    return {**gradients, "y": y}


@pytest.fixture
def blocks_of(monkeypatch):
    """Sets how many tokens a block of 128 channels has at most, and whether all are read at once.

    Tokens that are along the lanes are cut into multiples of 128.
    """

    def limit(tokens, *, whole=True):
        monkeypatch.setattr(tpu_plan, "BLOCK", tokens * tpu_plan.LANES)
        monkeypatch.setattr(tpu_plan, "WHOLE", tpu_plan.WHOLE if whole else 0)
        polarity_attention.clear_cache()  # `polarity_attention` has been traced with another limit

    yield limit
    polarity_attention.clear_cache()


@pytest.mark.parametrize(
    ("shape", "limit", "whole", "blocks"),
    [
        pytest.param("one head", 512, True, (1, 1), marks=pytest.mark.slow),
        pytest.param("heads share a group", 16, True, (1, 1), marks=pytest.mark.slow),
        pytest.param("reduced keys", 16, True, (1, 1), marks=pytest.mark.slow),
        pytest.param("many tokens", 16, True, (2, 2), marks=pytest.mark.slow),
        pytest.param("many tokens", 16, False, (2, 2), marks=pytest.mark.slow),
        pytest.param("many queries", 96, True, (3, 1), marks=pytest.mark.slow),
        pytest.param("many queries", 96, False, (3, 1), marks=pytest.mark.slow),
        pytest.param("groups of heads", 512, True, (1, 1), marks=pytest.mark.slow),
        ("groups of heads", 16, False, (2, 2)),
        pytest.param("many channels", 16, True, (4, 1), marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_are_those_of_the_operations(shape, limit, whole, blocks, x64, blocks_of):
    """In blocks, of which the last is shorter where they do not divide the tokens, read one by one or all at once."""
    blocks_of(limit, whole=whole)
    given = arguments(shape)
    _, width, _, _, group = SHAPES[shape]
    plan = tpu.plan(given["q"], given["k"], width, 1e-6, False)
    assert (plan.group, plan.query_blocks, plan.key_blocks, plan.whole) == (group, *blocks, whole)
    assert plan.tokens == (shape not in ("groups of heads", "many channels"))
    agree(outcome(given, shape, "pallas"), outcome(given, shape, "xla"), 1e-12)


def test_blocks_of_the_models_use_the_memory_of_tpus(monkeypatch):
    """In stage 1 all tokens are in memory at once and lie along the lanes, also of 512x512 images where it is large."""

    def plan(tokens, channels, width, keys=None):
        shape = (2, tokens, channels)
        q, k = (jax.ShapeDtypeStruct((2, n, channels), jnp.bfloat16) for n in (tokens, keys or tokens))
        found = tpu.plan(q, k, width, 1e-6, False)
        assert found.query_blocks * found.query_block >= tokens and shape[2] % found.group == 0
        return found.tokens, found.whole, found.group, found.query_blocks, found.key_blocks

    monkeypatch.setattr(placement, "device_kind", lambda: "TPU v5 lite")
    assert plan(3136, 96, 32) == (1, True, 96, 5, 5)  # Pola-Swin-T
    assert plan(3136, 64, 64, keys=49) == (1, True, 64, 4, 1)  # Pola-PVT
    assert plan(784, 192, 32) == (1, True, 96, 2, 2)
    assert plan(784, 128, 64, keys=49) == (0, True, 128, 2, 1)
    assert plan(16384, 64, 64, keys=256)[1] and not plan(16384, 96, 32)[1]
    monkeypatch.setattr(placement, "device_kind", lambda: "TPU v4")
    assert plan(3136, 96, 32) == (1, False, 96, 5, 5)


def assert_nan_goes_through(shape):
    """NaN wherever the operations give NaN, in values and gradients.

    At a token inside the map: at its border operations multiply NaN by the zeros around the map as well.
    """
    given = arguments(shape, np.float32)
    by_operations, by_kernel = (compiled(given, shape, how) for how in ("xla", "pallas"))
    for name in ("q", "k", "v", "g", "power", "scale", "positional_encoding"):
        array = given[name]
        token = array.shape[1] * 8 // 15 if name in "qkvg" else 0
        broken = {**given, name: array.at[(0, token, *(0 for _ in array.shape[3:]), 1)].set(np.nan)}
        for expected, found in zip(
            jax.tree.leaves(by_operations(broken)), jax.tree.leaves(by_kernel(broken)), strict=True
        ):
            assert np.isnan(found)[np.isnan(expected)].all(), name


def test_nan_goes_through_the_kernel(blocks_of):
    blocks_of(16)
    assert_nan_goes_through("many tokens")


@pytest.mark.slow
def test_nan_goes_through_the_gpu_kernel(gpu_kernel):
    assert_nan_goes_through("one head")


@pytest.fixture
def gpu_kernel(monkeypatch):
    """The kernel for GPUs is what is interpreted, in blocks of 16 tokens."""
    monkeypatch.setattr(polarity, "_interpreted", lambda: gpu)
    monkeypatch.setattr(gpu, "BLOCK", 16)
    polarity_attention.clear_cache()
    yield
    polarity_attention.clear_cache()


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "blocks"), [("reduced keys", (4, 1)), ("heads share a group", (2, 2))])
def test_values_and_gradients_on_a_gpu_are_those_of_the_operations(shape, blocks, x64, gpu_kernel):
    given = arguments(shape)
    plan = gpu.plan(given["q"], given["k"], SHAPES[shape][1], 1e-6, False)
    assert (plan.query_blocks, plan.key_blocks) == blocks
    agree(outcome(given, shape, "pallas"), outcome(given, shape, "xla"), 1e-12)


@pytest.mark.slow
def test_a_mask_hides_keys_on_a_gpu(x64, gpu_kernel):
    check_mask(tokens=37, lengths=(33, 1))


@pytest.mark.parametrize(
    ("heads", "width", "whole"),
    [
        (2, 4, True),
        pytest.param(2, 4, False, marks=pytest.mark.slow),
        pytest.param(8, 32, True, marks=pytest.mark.slow),
    ],
)
def test_a_mask_hides_keys(heads, width, whole, x64, blocks_of):
    blocks_of(16, whole=whole)
    check_mask(
        tokens=140, lengths=(133, 1), heads=heads, width=width
    )  # in blocks of 128, as a mask's are along the lanes


def check_mask(tokens, lengths, heads=2, width=4):
    mask = jnp.arange(tokens).reshape(1, -1) < jnp.array(lengths).reshape(-1, 1)
    given = {name: jnp.asarray(value) for name, value in draw(heads, width, (1, tokens), 1, 3).items()}
    given["kernel"] = given["kernel"][1]  # along a sequence
    agree(outcome(given, "a sequence", "pallas", mask), outcome(given, "a sequence", "xla", mask), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_fewer_bits_it_is_as_near_to_the_truth(dtype, x64):
    """As the operations are, but for a factor; in bfloat16 the convolved values are rounded once more."""
    shape = "heads share a group"
    given = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float64), arguments(shape))
    truth = outcome(given, shape, "xla")
    parameters = ("power", "scale", "positional_encoding", "kernel", "bias")
    typed = {name: x.astype("float32" if name in parameters else dtype) for name, x in given.items()}

    def errors(implementation):
        found = outcome(typed, shape, implementation)
        return {name: float(jnp.max(jnp.abs(found[name].astype(jnp.float64) - truth[name]))) for name in truth}

    fused, operations = errors("pallas"), errors("xla")
    slack = {"float32": 1e-6, "bfloat16": 1e-2}[dtype]
    for name, error in operations.items():
        assert fused[name] <= 2 * error + slack * float(jnp.max(jnp.abs(truth[name]))), name


@pytest.mark.slow
def test_over_a_mesh_each_device_has_its_examples():
    shape, mesh = "heads share a group", mesh_of(4, 2)
    given = arguments(shape, np.float32, batch=16)
    alone = outcome(given, shape, "pallas")
    batch = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    placed = {
        name: jax.device_put(array, batch if name in "qkvg" else sharding.replicated(mesh))
        for name, array in given.items()
    }
    with jax.set_mesh(mesh):
        program = compiled(placed, shape, "pallas")
        gradients, y = program(placed)
    found, moved = {**gradients, "y": y}, collectives(program.as_text())
    agree(found, alone, 1e-6)
    assert found["q"].sharding.is_equivalent_to(batch, 3)
    assert moved and {item.kind for item in moved} <= {"all-reduce"}  # gradients of the parameters, nothing else


def lowered(platform, implementation, shape="one head", mesh=None):
    given = {name: jax.ShapeDtypeStruct(x.shape, jnp.float32) for name, x in arguments(shape, np.float32).items()}
    program = jax.jit(functools.partial(polarity_attention, grid=SHAPES[shape][2], implementation=implementation))
    with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh):
        return program.trace(**given).lower(lowering_platforms=(platform,)).as_text()


def test_a_tpu_has_the_kernel_where_the_mesh_is_known_and_others_only_if_told(monkeypatch):
    calls, mesh = "tpu_custom_call", abstract_mesh("tpu")
    assert calls in lowered("tpu", "auto", mesh=mesh)
    assert calls not in lowered("tpu", "xla", mesh=mesh)
    assert "while" not in lowered("cpu", "auto", mesh=mesh)  # the interpreter of kernels is a loop
    cpus = mesh_of(8, 1).abstract_mesh
    assert "while" not in lowered("cpu", "auto", mesh=cpus) and "while" in lowered("cpu", "pallas", mesh=cpus)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind="TPU v5 lite")])
    assert calls not in lowered("tpu", "auto")  # eight devices, and no mesh says how the batch lies on them
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    polarity_attention.clear_cache()
    assert calls in lowered("tpu", "auto")


def test_the_kernel_is_not_even_imported_for_a_cpu():
    """Pallas takes a while, and its kernels a good part of a program's tracing."""
    script = (
        "import sys, jax, polaformer_jax as pf; from flax import nnx;"
        "model = pf.create_model('pola_pvt_nano', num_classes=2, kernel_size=1, rngs=nnx.Rngs(0));"
        "jax.make_jaxpr(lambda images: model(images))(jax.numpy.ones((1, 32, 32, 3)));"
        "sys.exit('jax.experimental.pallas' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # since jax 0.11
def test_a_gpu_has_its_kernel_if_told():
    calls, shape = "xla.gpu.triton", "groups of heads"
    mesh = abstract_mesh("cuda", size=1)
    assert calls in lowered("cuda", "pallas", shape, mesh) and calls not in lowered("cuda", "auto", shape, mesh)
    narrow = lowered("cuda", "pallas", "one head", mesh)  # of 8 channels, too narrow for Triton's products
    assert calls not in narrow and "while" not in narrow  # nor is that of TPUs interpreted there


def test_groups_of_heads_that_need_too_much_memory_are_left_to_xla(monkeypatch):
    monkeypatch.setattr(tpu_plan, "LARGEST_GROUP", 7)
    polarity_attention.clear_cache()
    for implementation in ("auto", "pallas"):
        assert "tpu_custom_call" not in lowered("tpu", implementation, mesh=abstract_mesh("tpu"))


def test_the_default_device_counts():
    """A program for the CPU of a machine with TPUs has no kernel."""
    others = [types.SimpleNamespace(device_kind="TPU v5 lite")]
    with mock.patch.object(jax, "devices", lambda platform=None: jax.local_devices() if platform == "cpu" else others):
        assert placement.for_tpu()
        for default in (jax.local_devices()[0], "cpu"):
            with jax.default_device(default):
                assert placement.interprets() and not placement.for_tpu()


def test_what_cannot_be_compiled_is_left_to_operations(x64, monkeypatch):
    """64 bits, and a batch that lies unknown on several devices."""
    given = [jax.ShapeDtypeStruct((2, 24, 8), dtype) for dtype in (jnp.bfloat16, jnp.float64)]
    with jax.sharding.use_abstract_mesh(abstract_mesh("tpu")):
        assert [polarity.supports(x, 8) for x in given] == [True, False]
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind="TPU v5 lite")])
    assert not polarity.supports(given[0], 8)


def test_convolutions_of_even_size_are_refused():
    given = {**arguments("one head", np.float32), "kernel": jnp.zeros((4, 4, 1, 8))}
    with pytest.raises(ValueError, match=r"kernel has shape \(4, 4, 1, 8\), expected odd sizes"):
        polarity_attention(**given, grid=(4, 6))


def test_devices_of_other_kinds_have_operations():
    """Kernels are interpreted on CPUs alone."""
    program = lowered("rocm", "pallas", mesh=abstract_mesh("rocm", kind="AMD Instinct MI300X", size=1))
    assert "while" not in program and "custom_call" not in program


@pytest.mark.slow
@pytest.mark.parametrize("family", ["pvt", "swin"])
def test_a_model_gives_the_same_logits(family, x64):
    types = {"dtype": "float64", "param_dtype": "float64"}
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3))
    one, other = (
        jax.jit(small_models.build(family, attention_impl=name, **types), compiler_options=QUICK)(images)
        for name in ("xla", "pallas")
    )
    np.testing.assert_allclose(other, one, rtol=0, atol=1e-12)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="implementation 'fast': expected one of auto, xla, pallas"):
        polarity_attention(**arguments("one head", np.float32), grid=(4, 6), implementation="fast")
    with pytest.raises(UserError, match="attention_impl='fast': expected one of auto, xla, pallas"):
        small_models.build("pvt", attention_impl="fast")


@pytest.mark.slow
def test_the_training_step_of_a_tpu_has_the_kernel(monkeypatch):
    """The step says on which mesh the batch lies."""
    monkeypatch.setattr(placement, "for_tpu", lambda: True)  # the devices of that mesh are this machine's
    made = Experiment(config_of(), num_examples=64)
    step = made.train_step.trace(made.abstract_batch(16)).lower(lowering_platforms=("tpu",))
    assert step.as_text().count("tpu_custom_call") >= 2  # there and back; blocks of one shape share theirs
