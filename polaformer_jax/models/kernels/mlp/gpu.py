"""The Triton kernels of the fused MLP for GPUs.

Triton's arrays have sizes that are powers of two: channels are padded with zeros on the chip, hidden channels come in
chunks. Tokens of all examples are one axis.

The gradients of the matrices do not fit into the registers of one program. So there are two kernels for gradients: one
program of the first computes that of x for a block of tokens; one of the second those of the parameters that belong to
a chunk of hidden channels, over many blocks. Programs write what they have summed to places of their own, which makes
the results the same from run to run.
"""

import functools
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from polaformer_jax.models.kernels.erf import erf
from polaformer_jax.models.kernels.mlp import blocks
from polaformer_jax.models.kernels.triton_part import Part

LARGEST = 64  # tokens of a block, and hidden channels of a chunk
ELEMENTS = 64 * 128  # of a block, and of the matrices of a chunk; more would not fit into the registers
PROGRAMS = 132  # of the second kernel for gradients: an H100 has as many multiprocessors
WIDEST = 256  # padded channels; with more a block has few tokens, for each of which all matrices are read
LEAST = 16  # sides of Triton's products


class Plan(NamedTuple):
    """How the kernels cut their arrays: everything that is static when they are compiled.

    Attributes:
        tokens: of all examples; `example`: of one.
        channels, hidden: C and H; `padded`: channels on the chip.
        block: tokens of a block; the last one may end beyond the arrays.
        chunk: hidden channels that are computed at a time; the last chunk may end beyond the arrays.
        eps: added to the variance.
    """

    tokens: int
    example: int
    channels: int
    padded: int
    hidden: int
    block: int
    chunk: int
    eps: float

    @property
    def for_parameters(self) -> "Plan":
        """With smaller blocks, since a program keeps the gradients of a chunk's matrices in registers too."""
        return self._replace(block=max(self.block // 2, LEAST))

    @property
    def groups(self) -> int:
        """Into which the blocks are divided for the gradients of the parameters."""
        return min(max(PROGRAMS // self.chunks, 1), self.blocks)

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.tokens, self.block)

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.hidden, self.chunk)

    def token_block(self, index) -> Part:
        return Part(index, self.block, self.tokens)

    def hidden_chunk(self, index) -> Part:
        return Part(index, self.chunk, self.hidden)

    def all_channels(self) -> Part:
        return Part(0, self.padded, self.channels)


def has_channels(channels: int) -> bool:
    """Whether x may have that many channels."""
    return pl.next_power_of_2(channels) <= WIDEST


def plan(x, hidden: int, eps: float) -> Plan:
    """For tokens (B, N, C) and `hidden` channels between the two layers."""
    batch, tokens, channels = x.shape
    padded = max(pl.next_power_of_2(channels), LEAST)
    size = max(min(ELEMENTS // padded, LARGEST), LEAST)
    return Plan(batch * tokens, tokens, channels, padded, hidden, block=size, chunk=size, eps=eps)


def forward(plan: Plan, interpret: bool, arrays: dict[str, jax.Array]) -> jax.Array:
    """y (B, N, C) of the arrays by name: see `fused_mlp`."""
    (y,) = _call(_forward_kernel, plan, interpret, arrays, (plan.blocks,), {"x": None})
    return y.reshape(arrays["x"].shape)


def backward(plan: Plan, interpret: bool, arrays: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The gradient of x, and those of the parameters by name, in the dtype of gamma. `arrays` also holds y_bar."""
    vectors = dict.fromkeys(("gamma", "beta", "b2"), plan.blocks)
    x_bar, *vector_bars = _call(_input_kernel, plan, interpret, arrays, (plan.blocks,), {"x": None, **vectors})
    plan = plan.for_parameters
    matrices = dict.fromkeys(("w1", "b1", "w2"), plan.groups)
    matrix_bars = _call(_parameter_kernel, plan, interpret, arrays, (plan.chunks, plan.groups), matrices)
    sums = zip((*vectors, *matrices), (*vector_bars, *matrix_bars), strict=True)
    return x_bar.reshape(arrays["x"].shape), {name: jnp.sum(total, axis=0) for name, total in sums}


def _call(kernel, plan: Plan, interpret: bool, arrays, grid: tuple[int, ...], results: dict[str, int | None]):
    """Runs `kernel`, whose results are like the arrays of these names, or as many parts of a sum of such arrays."""
    full = arrays["gamma"].dtype
    arrays = {name: _flat(name, array) for name, array in arrays.items()}
    sizes = {"C": plan.padded, "H": plan.chunks * plan.chunk, "tokens": plan.blocks * plan.block}
    axes = {
        **dict.fromkeys(("x", "y_bar"), ("tokens", "C")),
        **dict.fromkeys(("gamma", "beta", "b2"), ("C",)),
        "w1": ("C", "H"),
        "b1": ("H",),
        "w2": ("H", "C"),
    }

    def spec(name: str, parts: int | None = None) -> pl.BlockSpec:
        """A whole array, up to the end of its last parts: where a program reads and writes is up to itself."""
        shape = tuple(sizes[axis] for axis in axes[name]) if name in axes else arrays[name].shape
        shape = shape if parts is None else (parts, *shape)
        return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))

    def shape(name: str, parts: int | None) -> jax.ShapeDtypeStruct:
        own = arrays[name]
        return jax.ShapeDtypeStruct(*((own.shape, own.dtype) if parts is None else ((parts, *own.shape), full)))

    return pl.pallas_call(
        functools.partial(kernel, plan, tuple(arrays)),
        grid=grid,
        in_specs=[spec(name) for name in arrays],
        out_specs=[spec(*result) for result in results.items()],
        out_shape=[shape(*result) for result in results.items()],
        compiler_params=plgpu.CompilerParams(num_warps=8),
        interpret=interpret,
        name="mlp" + kernel.__name__,
    )(*arrays.values())


def _flat(name: str, array: jax.Array) -> jax.Array:
    """An array as the kernels read it: (tokens of all examples, C), and one factor for each example."""
    if name in ("x", "y_bar"):
        return array.reshape(-1, array.shape[-1])
    return array.reshape(-1) if name == "keep" else array


def _forward_kernel(plan: Plan, names, *refs):
    at, (y,) = _named(names, refs)
    tokens, channels = plan.token_block(pl.program_id(0)), plan.all_channels()
    x = tokens.of(at.x, channels)
    normed, *_ = _normalised(plan, at, x)

    def chunk(i, total):
        return total + blocks.branch(normed, *_matrices(at, plan.hidden_chunk(i), channels), 1, erf)

    total = jax.lax.fori_loop(0, plan.chunks, chunk, jnp.zeros(x.shape, at.gamma.dtype))
    tokens.set(y, blocks.output(x, total, _row(at.b2, channels), _keep(plan, at, tokens)), channels)


def _input_kernel(plan: Plan, names, *refs):
    at, (x_bar, *vector_bars) = _named(names, refs)
    index = pl.program_id(0)
    tokens, channels = plan.token_block(index), plan.all_channels()
    x, y_bar = (tokens.of(ref, channels) for ref in (at.x, at.y_bar))
    normed, standard, inverse = _normalised(plan, at, x)
    branch_bar = _branch_bar(plan, at, tokens, y_bar)
    narrow_bar = branch_bar.astype(x.dtype)

    def chunk(i, total):
        matrices = _matrices(at, plan.hidden_chunk(i), channels)
        return total + blocks.branch_bars(normed, narrow_bar, *matrices, 1, erf)[0]

    normed_bar = jax.lax.fori_loop(0, plan.chunks, chunk, jnp.zeros_like(standard))
    gamma = _row(at.gamma, channels)
    bar, *bars = blocks.input_bars(y_bar, normed_bar, standard, inverse, gamma, 1, plan.channels)
    tokens.set(x_bar, bar, channels)
    for ref, total in zip(vector_bars, (*bars, jnp.sum(branch_bar, axis=0, keepdims=True)), strict=True):
        Part(index, 1, plan.blocks).set(ref, total, channels)


def _parameter_kernel(plan: Plan, names, *refs):
    at, (w1_bar, b1_bar, w2_bar) = _named(names, refs)
    hidden, group, channels = plan.hidden_chunk(pl.program_id(0)), pl.program_id(1), plan.all_channels()
    matrices = _matrices(at, hidden, channels)

    def block(i, totals):
        tokens = plan.token_block(i)
        x, y_bar = (tokens.of(ref, channels) for ref in (at.x, at.y_bar))
        normed, *_ = _normalised(plan, at, x)
        branch_bar = _branch_bar(plan, at, tokens, y_bar).astype(x.dtype)
        return jax.tree.map(jnp.add, totals, blocks.branch_bars(normed, branch_bar, *matrices, 1, erf)[1:])

    first, after = (jax.lax.div((group + more) * plan.blocks, np.int32(plan.groups)) for more in (0, 1))
    zeros = tuple(jnp.zeros(matrix.shape, at.gamma.dtype) for matrix in matrices)
    w1, b1, w2 = jax.lax.fori_loop(first, after, block, zeros)
    own = Part(group, 1, plan.groups)
    own.set(w1_bar, w1[None], channels, hidden)
    own.set(b1_bar, b1, hidden)
    own.set(w2_bar, w2[None], hidden, channels)


def _named(names, refs) -> tuple[types.SimpleNamespace, tuple]:
    return types.SimpleNamespace(**dict(zip(names, refs, strict=False))), refs[len(names) :]


def _normalised(plan: Plan, at, x: jax.Array):
    gamma, beta = (_row(ref, plan.all_channels()) for ref in (at.gamma, at.beta))
    return blocks.normalised(x, gamma, beta, plan.eps, 1, plan.channels)


def _matrices(at, hidden: Part, channels: Part) -> tuple[jax.Array, jax.Array, jax.Array]:
    """w1, b1 and w2 of a chunk."""
    return channels.of(at.w1, hidden), _row(at.b1, hidden), hidden.of(at.w2, channels)


def _row(ref, part: Part) -> jax.Array:
    return part.of(ref)[None, :]


def _branch_bar(plan: Plan, at, tokens: Part, y_bar: jax.Array) -> jax.Array:
    """The gradient of fc2's result."""
    return blocks.scaled(y_bar.astype(at.gamma.dtype), _keep(plan, at, tokens))


def _keep(plan: Plan, at, tokens: Part) -> jax.Array:
    """The factor of each token's branch, (T, 1), that of its example."""
    examples = jax.lax.div(tokens.indices, tokens.indices.dtype.type(plan.example))
    examples = jnp.where(tokens.inside, examples, 0)
    return plgpu.load(at.keep.at[examples], mask=tokens.inside, other=0)[:, None]
