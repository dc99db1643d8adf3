"""The kernel of the fused attention for TPUs: passes over blocks of tokens, one after the other, in one program.

The grid is (groups of channels, batch, steps), and the steps of one example are its blocks of keys, of queries, and
for gradients its blocks of keys again. A TPU core runs them in this order, so that the sums over keys stay in its
memory (VMEM) from the first pass to the last.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from polaformer_jax.models.kernels.polarity import blocks
from polaformer_jax.models.kernels.polarity.blocks import Plan

LANES = 128  # the last axis of a register, and the side of the matrix unit
BLOCK = 512 * LANES  # the most elements of a block; about thirty blocks are in memory at a time
LARGEST_GROUP = 384  # channels; about twenty matrices of this side are in memory at a time


def plan(q, k, width: int, eps: float, masked: bool) -> Plan:
    """For queries (B, N, C) and keys (B, n, C) with heads of `width` channels."""
    group = group_of(q.shape[2], width)
    limit = BLOCK // (pl.cdiv(group, LANES) * LANES)
    query_block = _block(q.shape[1], limit, 16)
    key_block = _block(k.shape[1], limit, LANES if masked else 16)  # a mask's tokens are along the lanes
    return Plan.of(q, k, group=group, width=width, query_block=query_block, key_block=key_block, eps=eps)


def group_of(channels: int, width: int) -> int:
    """The fewest channels that fill registers, hold whole heads and divide `channels`; otherwise `channels`."""
    size = math.lcm(width, LANES)
    return channels if channels % size else size


def _block(tokens: int, limit: int, multiple: int) -> int:
    """Tokens of a block: all, or the largest tileable divisor, or, if that is small, about equal parts."""
    if tokens <= limit:
        return tokens
    largest = max(limit // multiple, 1) * multiple
    divisor = next((size for size in range(largest, 0, -multiple) if tokens % size == 0), 0)
    if divisor >= largest // 2:
        return divisor
    even = pl.cdiv(tokens, pl.cdiv(tokens, largest))
    return pl.cdiv(even, multiple) * multiple


def forward(plan: Plan, interpret: bool, arrays: dict[str, jax.Array]) -> jax.Array:
    """y (B, N, C) of the arrays by name: q, k, v, g, u, table, s, p, count, and optionally mask."""
    return _call(_forward_kernel, plan, interpret, arrays, results=("q",), squares=(True, False), passes_over_keys=1)[0]


def backward(plan: Plan, interpret: bool, arrays: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
    """Gradients of q, k, v, g, u, and of s and p for each example, (B, 1, C). `arrays` also holds y_bar."""
    results = ("q", "k", "v", "g", "u", "each", "each")
    return _call(_backward_kernel, plan, interpret, arrays, results, squares=(True, False, True), passes_over_keys=2)


def _call(kernel, plan: Plan, interpret: bool, arrays, results, squares, passes_over_keys: int):
    """Runs `kernel`. `squares`: its (4, G, G) scratch arrays, True for those in the accumulation dtype."""
    batch, full = arrays["q"].shape[0], arrays["s"].dtype
    steps = passes_over_keys * plan.key_blocks + plan.query_blocks
    second_pass = plan.key_blocks + plan.query_blocks

    def query_at(step):
        return jnp.clip(step - plan.key_blocks, 0, plan.query_blocks - 1)

    def key_at(step):
        return jnp.where(step < second_pass, jnp.minimum(step, plan.key_blocks - 1), step - second_pass)

    query = pl.BlockSpec((1, plan.query_block, plan.group), lambda j, b, i: (b, query_at(i), j))
    key = pl.BlockSpec((1, plan.key_block, plan.group), lambda j, b, i: (b, key_at(i), j))
    of_channels = pl.BlockSpec((1, plan.group), lambda j, b, i: (0, j))
    specs = {
        **dict.fromkeys(("q", "g", "u", "y_bar"), query),
        **dict.fromkeys(("k", "v"), key),
        "table": pl.BlockSpec((1, plan.key_block, plan.group), lambda j, b, i: (0, key_at(i), j)),
        **dict.fromkeys(("s", "p"), of_channels),
        "count": pl.BlockSpec((1, 1, 1), lambda j, b, i: (b, 0, 0)),
        "mask": pl.BlockSpec((1, 1, plan.key_block), lambda j, b, i: (b, 0, key_at(i))),
        "each": pl.BlockSpec((1, 1, plan.group), lambda j, b, i: (b, 0, j)),
    }
    shapes = {**arrays, "each": jax.ShapeDtypeStruct((batch, 1, plan.channels), full)}
    reads = _reads(plan, arrays, passes_over_keys)
    return pl.pallas_call(
        functools.partial(kernel, plan, tuple(arrays)),
        grid=(plan.channels // plan.group, batch, steps),
        in_specs=[specs[name] for name in arrays],
        out_specs=[specs[name] for name in results],
        out_shape=[jax.ShapeDtypeStruct(shapes[name].shape, shapes[name].dtype) for name in results],
        scratch_shapes=[
            pltpu.VMEM((4, plan.group, plan.group), full if wide else arrays["q"].dtype) for wide in squares
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(plan, arrays, results, passes_over_keys, reads),
        metadata={"reads": " ".join(str(reads[name]) for name in arrays)},  # for `aot --traffic`
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(*arrays.values())


def _reads(plan: Plan, arrays, passes_over_keys: int) -> dict[str, int]:
    """How often each array is read from the device's memory."""
    reads = dict.fromkeys(arrays, 1)
    if plan.key_blocks > 1:  # otherwise keys stay for both passes, and the table for all examples
        reads |= {name: passes_over_keys for name in ("k", "v", "mask") if name in arrays}
        reads["table"] = arrays["q"].shape[0] * passes_over_keys
    return reads


def _cost(plan: Plan, arrays, results, passes_over_keys: int, reads: dict[str, int]) -> pl.CostEstimate:
    """The estimate for the compiler: bytes as often as blocks are read, and the operations of both passes."""
    keys = arrays["k"].size
    read = sum(array.nbytes * reads[name] for name, array in arrays.items())
    written = sum(arrays[name].nbytes for name in results if name != "each")
    products = {1: 4 * keys + 4 * arrays["q"].size, 2: 10 * keys + 12 * arrays["q"].size}[passes_over_keys]
    return pl.CostEstimate(
        flops=2 * products * plan.group,
        bytes_accessed=read + written,
        transcendentals=2 * (passes_over_keys * keys + arrays["q"].size),
    )


def _forward_kernel(plan: Plan, names, *refs):
    x, (y, sums, m) = blocks.named(names, refs)
    step = pl.program_id(2)
    _sum_keys(plan, step, x, sums, m)

    @pl.when(step >= plan.key_blocks)
    def _():
        z = x.q[0].astype(x.s.dtype) / x.s[...]
        y[0] = blocks.output(z, x.p[...], x.g[0], x.u[0], m, plan.eps).astype(y.dtype)


def _backward_kernel(plan: Plan, names, *refs):
    x, (q_bar, k_bar, v_bar, g_bar, u_bar, s_bar, p_bar, sums, m, m_bar) = blocks.named(names, refs)
    step, second_pass = pl.program_id(2), plan.key_blocks + plan.query_blocks

    @pl.when(step == 0)
    def _():
        for ref in (s_bar, p_bar, m_bar):
            ref[...] = jnp.zeros_like(ref)

    _sum_keys(plan, step, x, sums, m)

    @pl.when((step >= plan.key_blocks) & (step < second_pass))
    def _():
        inside = _Inside(step - plan.key_blocks, plan.query_block, plan.queries)
        q, g, u, y_bar = (inside(ref[0]) for ref in (x.q, x.g, x.u, x.y_bar))
        z = q.astype(x.s.dtype) / x.s[...]
        *bars, s_more, p_more, m_more = blocks.query_bars(z, x.s[...], x.p[...], g, u, y_bar, m, plan.eps)
        for ref, bar in zip((q_bar, g_bar, u_bar), bars, strict=True):
            ref[0] = bar.astype(ref.dtype)
        s_bar[0] += s_more
        p_bar[0] += p_more
        for i, more in enumerate(m_more):
            m_bar[i] += more

    @pl.when(step == second_pass)
    def _():
        _set(m, blocks.matrices(m_bar, x.count[0], plan.width, m.dtype))  # from here on m holds gradients of the sums

    @pl.when(step >= second_pass)
    def _():
        z, values, there = _keys(plan, step - second_pass, x)
        *bars, s_more, p_more = blocks.key_bars(z, x.s[...], x.p[...], values, there, m)
        for ref, bar in zip((k_bar, v_bar), bars, strict=True):
            ref[0] = bar.astype(ref.dtype)
        s_bar[0] += s_more
        p_bar[0] += p_more


def _sum_keys(plan: Plan, step, x, sums, m):
    """The first pass; after it `m` holds the matrices that queries are multiplied with."""

    @pl.when(step == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)

    @pl.when(step < plan.key_blocks)
    def _():
        for i, more in enumerate(blocks.key_sums(*_keys(plan, step, x), x.p[...])):
            sums[i] += more

    @pl.when(step == plan.key_blocks)
    def _():
        _set(m, blocks.matrices(sums, x.count[0], plan.width, m.dtype))


def _set(ref, values):
    for i, value in enumerate(values):
        ref[i] = value


def _keys(plan: Plan, index, x):
    """z of a block of keys, its values, and ones at valid keys."""
    full = x.s.dtype
    inside = _Inside(index, plan.key_block, plan.keys)
    z = inside((x.k[0].astype(full) + x.table[0].astype(full)) / x.s[...])
    values = inside(x.v[0])
    there = jnp.ones_like(values)
    if hasattr(x, "mask"):
        # (1, tokens) by (1, G) over the axis of size 1: the mask in each column, without transposing registers.
        there = inside(blocks.dot(x.mask[0], there[:1], (0, 0)).astype(there.dtype))
        z = jnp.where(there == 0, 0, z)
    return z, values, there


class _Inside:
    """Sets tokens beyond the end of the arrays, where the last block may read arbitrary values, to zero."""

    def __init__(self, index, size: int, tokens: int):
        self.left = tokens - index * size if tokens % size else None

    def __call__(self, block):
        if self.left is None:
            return block
        return jnp.where(jax.lax.broadcasted_iota(jnp.int32, block.shape, 0) < self.left, block, 0)
