"""The kernel of the windows' softmax attention for TPUs.

Heads are not an axis. A group of them fills the 128 lanes of a register, or a multiple of them. Products are of whole
groups, one factor of which is zero in the lanes of other heads; a matrix unit has 128 lanes anyway. The grid is
(blocks of windows, groups of heads); a program loops over the windows of its block.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from polaformer_jax.models.kernels.polarity.blocks import dot, named
from polaformer_jax.models.layers import accumulation_dtype

LANES = 128  # the last axis of a register
LARGEST_GROUP = 512  # channels
BLOCK = 2 << 20  # the most bytes of a block of windows and their gradients, unless one window has more
UNASKED = 16 << 20  # bytes of memory (VMEM) that a kernel has without asking for more


class Plan(NamedTuple):
    """How the arrays are cut into blocks: everything that is static when the kernel is compiled.

    Attributes:
        windows: of all images together.
        tokens: of a window, n.
        channels: C.
        heads: h.
        group: channels of a group of heads.
        block: windows of a block; the last one may end beyond the arrays.
        memory: bytes of memory that the gradients take, about.
    """

    windows: int
    tokens: int
    channels: int
    heads: int
    group: int
    block: int
    memory: int

    @property
    def width(self) -> int:
        return self.channels // self.heads

    @property
    def groups(self) -> int:
        return self.channels // self.group

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.windows, self.block)


def group_of(channels: int, heads: int) -> int | None:
    """The fewest channels that are whole registers and whole heads; None if they do not divide all channels."""
    size = math.lcm(channels // heads, LANES)
    return None if channels % size or size > LARGEST_GROUP else size


def plan(qkv: jax.ShapeDtypeStruct, heads: int) -> Plan:
    """For `qkv` (windows, n, 3C)."""
    windows, n, channels = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    group, full = group_of(channels, heads), accumulation_dtype(qkv.dtype)
    # Queries, keys, values and the result's gradient by groups, and the gradient of all channels of all three.
    window = _bytes(n, 4 * group + 3 * channels, qkv.dtype)
    block = _block(windows, max(BLOCK // window, 1))
    scores = _bytes(n, n, full)
    at_work = 6 * (group * heads // channels) * scores + 8 * _bytes(n, group, full)
    memory = 2 * (block * window + 2 * heads * scores) + at_work  # blocks and biases are there twice: the next arrives
    return Plan(windows, n, channels, heads, group, block, memory)


def _block(windows: int, most: int) -> int:
    """Windows of a block: the largest divisor of their number, or, if that is small, about equal parts."""
    divisor = next(size for size in range(min(most, windows), 0, -1) if windows % size == 0)
    return divisor if 2 * divisor >= most else pl.cdiv(windows, pl.cdiv(windows, most))


def fits(qkv: jax.ShapeDtypeStruct, heads: int) -> bool:
    """Whether the kernel's memory suffices on the TPU for which a program is traced."""
    return plan(qkv, heads).memory <= 0.75 * pltpu.get_tpu_info().vmem_capacity_bytes


def _bytes(rows: int, columns: int, dtype) -> int:
    """Bytes of an array in tiles of 128 columns, and of 8 rows of 32 bits."""
    size = jnp.dtype(dtype).itemsize
    sublanes = 8 * max(4 // size, 1)
    return pl.cdiv(rows, sublanes) * sublanes * pl.cdiv(columns, LANES) * LANES * size


def forward(arrays: dict[str, jax.Array], interpret: bool) -> tuple[jax.Array, tuple]:
    """y (windows, n, C) and nothing, of the arrays qkv (windows, n, 3C), bias, and optionally masks and kinds."""
    return _call(_forward_kernel, arrays, interpret, results=("y",), products=2)[0], ()


def backward(arrays: dict[str, jax.Array], interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Gradients of qkv, and of the bias summed over windows. `arrays` also holds y_bar (windows, n, C)."""
    return tuple(_call(_backward_kernel, arrays, interpret, results=("qkv", "bias"), products=5))


def _call(kernel: Callable, arrays: dict[str, jax.Array], interpret: bool, *, results: tuple[str, ...], products: int):
    qkv, heads, n = arrays["qkv"], arrays["bias"].shape[0], arrays["qkv"].shape[1]
    cut = plan(qkv, heads)
    given = {name: qkv for name in "qkv"} | {name: x for name, x in arrays.items() if name != "qkv"}

    def part(first: int) -> pl.BlockSpec:  # of a group of channels
        return pl.BlockSpec((cut.block, n, cut.group), lambda i, j: (i, 0, first * cut.groups + j))

    def whole(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda i, j: (0,) * len(shape))

    specs = {
        **{name: part(i) for i, name in enumerate("qkv")},
        **dict.fromkeys(("y", "y_bar"), part(0)),
        "qkv": pl.BlockSpec((cut.block, n, 3 * cut.channels), lambda i, j: (i, 0, 0)),
        "bias": whole(heads, n, n),
        "kinds": pl.BlockSpec(memory_space=pltpu.SMEM),
    }
    if "masks" in arrays:
        specs["masks"] = whole(*arrays["masks"].shape)
    shapes = {**arrays, "y": jax.ShapeDtypeStruct((cut.windows, n, cut.channels), qkv.dtype)}
    out_shape = [jax.ShapeDtypeStruct(shapes[name].shape, shapes[name].dtype) for name in results]
    scores = cut.windows * heads * n * n
    cost = pl.CostEstimate(
        flops=2 * products * scores * cut.width,
        bytes_accessed=sum(_nbytes(x) for x in (*arrays.values(), *out_shape)),
        transcendentals=scores,
    )
    return pl.pallas_call(
        functools.partial(kernel, cut, tuple(given)),
        grid=(cut.blocks, cut.groups),
        in_specs=[specs[name] for name in given],
        out_specs=[specs[name] for name in results],
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"),
            vmem_limit_bytes=cut.memory * 5 // 4 if cut.memory > UNASKED * 3 // 4 else None,
        ),
        cost_estimate=cost,
        interpret=interpret,
        name="window" + kernel.__name__,
    )(*given.values())


def _nbytes(x) -> int:
    return x.size * x.dtype.itemsize


def _forward_kernel(cut: Plan, names, *refs):
    x, (y,) = named(names, refs)
    heads = _heads(cut)

    def window(w, mask):
        q, k, v = x.q[w], x.k[w], x.v[w]
        total = jnp.zeros(q.shape, x.bias.dtype)
        for head, own in heads:
            weights = _weights(cut, own(q), k, x.bias[head], mask)
            total += dot(weights.astype(q.dtype), own(v), (1, 0))
        y[w] = total.astype(y.dtype)

    _for_each_window(cut, x, window)


def _backward_kernel(cut: Plan, names, *refs):
    x, (qkv_bar, bias_bar) = named(names, refs)
    heads = _heads(cut)
    lanes = [pl.ds(pl.multiple_of((i * cut.groups + pl.program_id(1)) * cut.group, LANES), cut.group) for i in range(3)]

    @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0))
    def _():
        bias_bar[...] = jnp.zeros_like(bias_bar)

    def window(w, mask):
        q, k, v, y_bar = x.q[w], x.k[w], x.v[w], x.y_bar[w]
        q_bar = k_bar = v_bar = jnp.zeros(q.shape, bias_bar.dtype)
        for head, own in heads:
            weights = _weights(cut, own(q), k, x.bias[head], mask)
            weights_bar = dot(own(y_bar), v, (1, 1))
            v_bar += dot(weights.astype(q.dtype), own(y_bar), (0, 0))
            scores_bar = weights * (weights_bar - jnp.sum(weights * weights_bar, axis=1, keepdims=True))
            bias_bar[head] += scores_bar
            scores_bar = (scores_bar * cut.width**-0.5).astype(q.dtype)
            q_bar += dot(scores_bar, own(k), (1, 0))
            k_bar += dot(scores_bar, own(q), (0, 0))
        for at, bar in zip(lanes, (q_bar, k_bar, v_bar), strict=True):
            qkv_bar[w, :, at] = bar.astype(qkv_bar.dtype)

    _for_each_window(cut, x, window)


def _for_each_window(cut: Plan, x, body: Callable):
    """Runs `body(window, mask)` for the windows of a block; what the last block has beyond the arrays is left out."""
    first = pl.program_id(0) * cut.block
    there = cut.block if cut.windows % cut.block == 0 else jnp.minimum(cut.block, cut.windows - first)

    def step(w, _):
        body(w, x.masks[x.kinds[(first + w) % x.kinds.shape[0]]] if hasattr(x, "masks") else None)

    jax.lax.fori_loop(0, there, step, None)


def _heads(cut: Plan) -> list[tuple[jax.Array, Callable]]:
    """For each head of the program's group: its index, and the function that sets other heads' channels to zero."""
    heads = cut.group // cut.width
    first = pl.program_id(1) * heads

    def only(i: int, x: jax.Array) -> jax.Array:
        if heads == 1:
            return x
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        return jnp.where((lane >= i * cut.width) & (lane < (i + 1) * cut.width), x, 0)

    return [(first + i, functools.partial(only, i)) for i in range(heads)]


def _weights(cut: Plan, q: jax.Array, k: jax.Array, bias: jax.Array, mask: jax.Array | None) -> jax.Array:
    """softmax(q k^T / √d + bias + mask), (n, n), of one head; q is zero in other heads' channels."""
    scores = dot(q, k, (1, 1)) * cut.width**-0.5 + bias
    if mask is not None:
        scores = scores + mask
    weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    return weights * (1 / jnp.sum(weights, axis=1, keepdims=True))
