"""The kernels of the fused MLP for TPUs: one block of tokens after the other, with all parameters on the chip.

The grid is (parts of the batch, examples of a part, blocks of an example). The parts are the cores of a chip; a core
runs its steps in order, so that the gradients of the parameters are summed in its memory (VMEM) from first to last.

A TPU keeps arrays in tiles of 128 lanes, the last axis, by 8 or 16 sublanes, and what fills no whole tile is padded:
64 channels along the lanes take the room of 128. Where tokens along the lanes take less, XLA has them there, and so
have the blocks, which are then (C, tokens).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from polaformer_jax.models.dtypes import accumulation_dtype
from polaformer_jax.models.kernels.mlp import blocks
from polaformer_jax.models.kernels.mlp.blocks import Plan
from polaformer_jax.models.kernels.tpu_chip import chip

LANES = 128  # the last axis of a register, and the side of the matrix unit
SUBLANES = 16  # the axis before it, of 2 bytes
MOST_TOKENS = 896  # of a block
MOST_HIDDEN = 512  # of a chunk
VECTORS = ("gamma", "beta", "b1", "b2")
PARAMETERS = ("gamma", "beta", "w1", "b1", "w2", "b2")


def plan(x, hidden: int, eps: float) -> Plan:
    """For tokens (B, N, C) and `hidden` channels between the two layers."""
    batch, tokens, channels = x.shape
    axis = min((1, 0), key=lambda axis: _bytes((tokens, channels) if axis else (channels, tokens), x.dtype))
    block = _block(tokens, SUBLANES if axis else LANES)
    parts = cores() if batch % cores() == 0 else 1
    return Plan(tokens, channels, hidden, block, min(MOST_HIDDEN, hidden), axis, eps, parts)


def _block(tokens: int, multiple: int) -> int:
    """Tokens of a block: all, or those that pad an example least, and of these the most."""
    if tokens <= MOST_TOKENS:
        return tokens
    sizes = range(multiple, MOST_TOKENS + 1, multiple)
    return min(sizes, key=lambda size: (pl.cdiv(tokens, size) * size, -size))


def cores() -> int:
    """Cores of a device of the kind that a program is traced for: two of a TPU v4 or v5p."""
    known = chip()
    return (known and known.num_cores) or 1  # an abstract device may not say it


def fits(x, hidden: int) -> bool:
    """Whether the backward pass fits in the memory (VMEM) of the TPU that a program is traced for.

    A quarter is left to XLA, which keeps arrays of other operations there.
    """
    known = chip()
    if known is None:
        return False
    return memory(plan(x, hidden, 0.0), x.dtype, backward=True) <= 0.75 * known.vmem_capacity_bytes


def memory(plan: Plan, dtype, *, backward: bool) -> int:
    """An estimate from above of the bytes that a kernel needs in a core's memory; `dtype` is that of the products."""
    full = accumulation_dtype(dtype)

    def block(channels, dtype):
        return _bytes((plan.block, channels) if plan.axis else (channels, plan.block), dtype)

    def vector(channels):
        return _bytes((1, channels) if plan.axis else (channels, 1), full)

    def parameters(dtype):
        matrices = _bytes((plan.channels, plan.hidden), dtype) + _bytes((plan.hidden, plan.channels), dtype)
        return matrices + 3 * vector(plan.channels) + vector(plan.hidden)

    # What is read or written is there twice, so that one is copied while the other is in use; sums are there once.
    copied = 2 * ((3 if backward else 2) * block(plan.channels, dtype) + parameters(dtype))
    sums = parameters(full) * (min(plan.parts, 2) if backward else 0)
    at_work = 3 * block(plan.chunk, full) + 4 * block(plan.channels, full)
    total = copied + sums + at_work
    # Products of 32 bits hold parts of their factors as well: compiled kernels needed up to 1.27 of the sum.
    return total if jnp.dtype(dtype).itemsize == 2 else total + total // 3


def _bytes(shape: tuple[int, int], dtype) -> int:
    """Bytes of an array in tiles of 128 columns, and of 8 rows of 32 bits."""
    size = jnp.dtype(dtype).itemsize
    rows, columns = (pl.cdiv(n, tile) * tile for n, tile in zip(shape, (8 * max(4 // size, 1), LANES), strict=True))
    return rows * columns * size


def forward(plan: Plan, interpret: bool, arrays: dict[str, jax.Array]) -> jax.Array:
    """y (B, N, C) of the arrays by name: see `fused_mlp`."""
    return _call(_forward_kernel, plan, interpret, arrays, sums=(), products=2)[0]


def backward(plan: Plan, interpret: bool, arrays: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The gradient of x, and those of the parameters by name, in the dtype of gamma. `arrays` also holds y_bar."""
    x_bar, *sums = _call(_backward_kernel, plan, interpret, arrays, sums=PARAMETERS, products=5)
    sums = {name: jnp.sum(total, axis=0) for name, total in zip(PARAMETERS, sums, strict=True)}
    return x_bar, {name: total.reshape(arrays[name].shape) for name, total in sums.items()}


def _call(kernel, plan: Plan, interpret: bool, arrays, sums: tuple[str, ...], products: int):
    """Runs `kernel`, which returns an array like x and, for each part, sums that are like the arrays of these names."""
    full = arrays["gamma"].dtype
    arrays = {name: _turned(plan, name, array) for name, array in arrays.items()}
    x = arrays["x"]
    examples = x.shape[0] // plan.parts
    shape = (1, plan.block, plan.channels) if plan.axis else (1, plan.channels, plan.block)
    tokens = pl.BlockSpec(shape, lambda p, b, i: (p * examples + b, *((i, 0) if plan.axis else (0, i))))
    specs = {name: pl.BlockSpec(arrays[name].shape, lambda p, b, i: (0, 0)) for name in PARAMETERS}
    specs |= {"x": tokens, "y_bar": tokens, "keep": pl.BlockSpec((1, 1, 1), lambda p, b, i: (p * examples + b, 0, 0))}
    totals = [jax.ShapeDtypeStruct((plan.parts, *arrays[name].shape), full) for name in sums]
    y, *totals = pl.pallas_call(
        functools.partial(kernel, plan, tuple(arrays)),
        grid=(plan.parts, examples, plan.blocks),
        in_specs=[specs[name] for name in arrays],
        out_specs=[tokens, *(pl.BlockSpec((None, *total.shape[1:]), lambda p, b, i: (p, 0, 0)) for total in totals)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), *totals],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=memory(plan, x.dtype, backward=bool(sums)),
        ),
        cost_estimate=_cost(plan, arrays, totals, products),
        interpret=interpret,
        name="mlp" + kernel.__name__,
    )(*arrays.values())
    return [y if plan.axis else jnp.swapaxes(y, 1, 2), *totals]


def _turned(plan: Plan, name: str, array: jax.Array) -> jax.Array:
    """An array as the kernels read it."""
    if name in VECTORS:
        return jnp.expand_dims(array, 1 - plan.axis)
    return jnp.swapaxes(array, 1, 2) if name in ("x", "y_bar") and not plan.axis else array


def _cost(plan: Plan, arrays, totals, products: int) -> pl.CostEstimate:
    """The estimate for the compiler: every array is read or written once; for `products` of C with H channels."""
    x = arrays["x"]
    per_token = plan.hidden * x.shape[0] * plan.tokens
    return pl.CostEstimate(
        flops=2 * products * plan.channels * per_token,
        bytes_accessed=sum(array.nbytes for array in arrays.values())
        + x.nbytes
        + sum(math.prod(total.shape) * total.dtype.itemsize for total in totals),
        transcendentals=per_token * (2 if totals else 1),
    )


def _forward_kernel(plan: Plan, names, *refs):
    at = dict(zip(names, refs, strict=False))
    y = refs[-1]
    x = at["x"][0]
    normed, *_ = blocks.normalised(x, at["gamma"][...], at["beta"][...], plan.eps, plan.axis)
    total = sum(blocks.branch(normed, *_chunk(plan, at, chunk), plan.axis) for chunk in plan.chunks)
    y[0] = blocks.output(x, total, at["b2"][...], at["keep"][0]).astype(y.dtype)


def _backward_kernel(plan: Plan, names, *refs):
    at = dict(zip(names, refs, strict=False))
    x_bar, *sums = refs[len(names) :]
    sums = dict(zip(PARAMETERS, sums, strict=True))

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _():
        for total in sums.values():
            total[...] = jnp.zeros_like(total)

    x, y_bar = (_inside(plan, at[name][0]) for name in ("x", "y_bar"))
    gamma = at["gamma"][...]
    normed, standard, inverse = blocks.normalised(x, gamma, at["beta"][...], plan.eps, plan.axis)
    branch_bar = blocks.scaled(y_bar.astype(gamma.dtype), at["keep"][0])
    sums["b2"][...] += jnp.sum(branch_bar, axis=1 - plan.axis, keepdims=True)
    branch_bar = branch_bar.astype(x.dtype)
    normed_bar = jnp.zeros(x.shape, gamma.dtype)
    for chunk in plan.chunks:
        more, w1, b1, w2 = blocks.branch_bars(normed, branch_bar, *_chunk(plan, at, chunk), plan.axis)
        normed_bar += more
        for ref, bar in zip(_chunk_refs(plan, sums, chunk), (w1, b1, w2), strict=True):
            ref[...] += bar
    bar, gamma_bar, beta_bar = blocks.input_bars(y_bar, normed_bar, standard, inverse, gamma, plan.axis)
    sums["gamma"][...] += gamma_bar
    sums["beta"][...] += beta_bar
    x_bar[0] = bar.astype(x_bar.dtype)


def _chunk_refs(plan: Plan, refs, chunk: slice):
    """References to the parts of w1, b1 and w2 (or of their gradients) that belong to some hidden channels."""
    return [
        refs["w1"].at[:, chunk],
        refs["b1"].at[:, chunk] if plan.axis else refs["b1"].at[chunk, :],
        refs["w2"].at[chunk, :],
    ]


def _chunk(plan: Plan, refs, chunk: slice) -> list[jax.Array]:
    return [ref[...] for ref in _chunk_refs(plan, refs, chunk)]


def _inside(plan: Plan, block):
    """Sets tokens beyond the end of the arrays, where the last block may read arbitrary values, to zero."""
    if plan.tokens % plan.block == 0:
        return block
    left = plan.tokens - pl.program_id(2) * plan.block
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, block.shape, 1 - plan.axis) < left, block, 0)
