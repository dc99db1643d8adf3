"""To which part of a model the memory traffic of a compiled program belongs."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import polaformer_jax as pf
from polaformer_jax.aot import hlo, traffic
from polaformer_jax.aot.attribution import MODULES, OPTIMIZER, OTHER, by_module, origin
from polaformer_jax.models.pola_sequence import Sequences
from tests.support import small_models
from tests.support.kernels import abstract_mesh

# --- names


@pytest.mark.parametrize(
    "op_name, expected",
    [
        ("jit(train_step)/jvp(block)/mlp/jit(gelu)/mul", ("MLP", False)),
        ("jit(train_step)/transpose(jvp(block))/mlp/jit(apply_kernel)/dot_general", ("MLP", True)),
        ("jit(f)/jvp(block)/attention/dot_general", ("projections of attention", False)),
        ("jit(f)/jvp(block)/attention/jit(polarity_attention)/depthwise_conv/mul", ("depthwise convolution", False)),
        ("jit(f)/transpose(jvp(patch_merging))/layer_norm/mul", ("LayerNorm", True)),
        ("jit(train_step)/optimizer/add", (OPTIMIZER, False)),
        ("reshape;jit(f)/jvp(head)/reshape", ("heads, loss, metrics", False)),  # merged
        ("jit(f)/jvp()/dot_general", None),
        ("params['blocks'][0]['mlp']['fc1']['kernel']", None),  # an argument
        ("", None),
    ],
)
def test_the_innermost_known_name_counts(op_name, expected):
    assert origin(op_name) == expected


# --- a program

A = "f32[256,1024]{1,0:T(8,128)}"  # a MiB
PROGRAM = f"""\
HloModule test

%fused (p: f32[256,1024], w: f32[1024,1024]) -> f32[256,1024] {{
  %p = {A} parameter(0)
  %w = f32[1024,1024]{{1,0:T(8,128)}} parameter(1)
  %product = {A} dot(%p, %w), metadata={{op_name="jit(f)/jvp(block)/mlp/dot_general"}}
  ROOT %sum = {A} add(%product, %p), metadata={{op_name="jit(f)/jvp(block)/add"}}
}}

%turn (p: f32[256,1024]) -> f32[256,1024] {{
  %p = {A} parameter(0)
  ROOT %turned = {A} transpose(%p), dimensions={{1,0}}, metadata={{op_name="jit(f)/jvp(block)/mlp/transpose"}}
}}

ENTRY %main (a: f32[256,1024], w: f32[1024,1024]) -> (f32[256,1024], f32[256,1024]) {{
  %a = {A} parameter(0)
  %w = f32[1024,1024]{{1,0:T(8,128)}} parameter(1)
  %copied = {A} copy(%a), metadata={{op_name="params['x']"}}
  %b = {A} fusion(%copied, %w), kind=kOutput, calls=%fused, metadata={{op_name="jit(f)/jvp(block)/add"}}
  %turned = {A} fusion(%b), kind=kLoop, calls=%turn
  %start = ({A.replace("}", "S(1)}")}, {A}, u32[]{{:S(2)}}) copy-start(%turned)
  %done = {A.replace("}", "S(1)}")} copy-done(%start)
  %c = {A} exponential(%done), metadata={{op_name="jit(f)/transpose(jvp(block))/attention/exp"}}
  %nameless = {A} negate(%c)
  %out = {A} copy(%nameless)
  %gradient = {A} all-reduce(%c), to_apply=%add, metadata={{op_name="jit(f)/transpose(jvp(block))/mlp/dot_general"}}
  %rng = {A} custom-call(), custom_call_target="random"
  ROOT %results = ({A}, {A}, {A}) tuple(%out, %gradient, %rng)
}}
"""


def test_a_program_by_part():
    program = hlo.Program(PROGRAM)
    found = {
        (row.module, row.backward): (row.read / 2**20, row.written / 2**20, row.copies / 2**20)
        for row in by_module(program, traffic.moves(program, platform="tpu"))
    }
    assert found == {
        # The fusion is its product's; the copy of the argument is for it.
        ("MLP", False): (1 + 5, 1 + 1, 2),
        # What turns `b`, brings it onto the chip, and what has no name but reads `c`.
        ("projections of attention", True): (1 + 1 + 0 + 1 + 1, 1 + 0 + 1 + 1 + 1, 2 + 1 + 2),
        (OPTIMIZER, False): (1, 1, 0),
        (OTHER, False): (0, 1, 0),
    }


def test_the_largest_part_is_the_first():
    program = hlo.Program(PROGRAM)
    rows = by_module(program, traffic.moves(program, platform="tpu"))
    assert [row.bytes / 2**20 for row in rows] == [8, 8, 2, 1]
    assert [row.module for row in rows] == ["MLP", "projections of attention", OPTIMIZER, OTHER]


# --- the models

SEQUENCE = {"num_classes": 3, "vocabulary": 7, "max_length": 16, "dim": 8, "depth": 1, "num_heads": 2}
IMAGES = jnp.zeros((4, 32, 32, 3))


def sequence_model(attention: str):
    sizes = {**SEQUENCE, "mlp_dim": 16, "head_dim": 8, "drop_rate": 0.0}
    model = small_models.build_once(pf.PolaSequence, **sizes, attention=attention)
    return model, (Sequences(jnp.ones((4, 16), jnp.int32), jnp.full(4, 16)),)


def segmenter():
    config = pf.PolaPVTConfig(**{**small_models.PVT, "num_classes": 0})
    model = small_models.build_once(pf.Segmenter, backbone=config, num_classes=3, head_channels=4)
    return model, (IMAGES,)


MODELS = {
    "pvt": lambda: (small_models.build("pvt", drop_path_rate=0.1), (IMAGES,)),
    "swin": lambda: (small_models.build("swin", drop_path_rate=0.1), (IMAGES,)),
    "pp": lambda: (small_models.tiny_pp(drop_path_rate=0.1), (IMAGES,)),
    "sequence": lambda: sequence_model("polarity"),
    "relu": lambda: sequence_model("relu"),
    "segmenter": segmenter,
}


def lower(name: str, platform: str = "cpu", **changes):
    """The gradients of a small model for a platform, not compiled: the names are there before."""
    model, inputs = MODELS[name]() if not changes else (small_models.build(name, **changes), (IMAGES,))
    graphdef, params = small_models.split(model)

    def objective(params, *inputs):
        outputs = nnx.merge(graphdef, params)(*inputs, train=True, rngs=nnx.Rngs(dropout=0))
        return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(outputs))

    return jax.jit(jax.grad(objective)).trace(params, *inputs).lower(lowering_platforms=(platform,))


@functools.cache
def program_of(name: str) -> hlo.Program:
    return hlo.Program(lower(name).as_text("hlo", debug_info=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_little_belongs_to_no_part(name):
    """A part that loses its name would be counted as `OTHER`."""
    program = program_of(name)
    rows = by_module(program, traffic.moves(program, platform="cpu"))
    total = sum(row.bytes for row in rows)
    other = sum(row.bytes for row in rows if row.module == OTHER)
    assert other < 0.02 * total
    backward = sum(row.bytes for row in rows if row.backward)
    assert 0.2 * total < backward < 0.9 * total  # less than half where random numbers are most of the forward pass


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # since jax 0.11
def test_every_name_is_that_of_something():
    """Renamed functions would silently be counted as what calls them."""
    texts = [
        item.op_name
        for name in MODELS
        for computation in program_of(name).computations.values()
        for item in computation.instructions.values()
    ]
    for platform in ("tpu", "cuda"):  # the kernels
        with jax.sharding.use_abstract_mesh(abstract_mesh(platform, size=1)):
            texts.append(lower("swin", platform, attention_impl="pallas").as_text(debug_info=True))
    words = set(re.findall(r"\w+", " ".join(texts)))
    assert set(MODULES) - words == {"augmentation", "optimizer", "loss"}  # of whole steps: see `test_aot`
