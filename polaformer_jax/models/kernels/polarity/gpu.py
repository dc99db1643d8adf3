"""The Triton kernel of the fused attention for GPUs: one program for each head of each example.

A program loops over the blocks of keys, then over those of queries, and for gradients over those of keys again. The
matrices that it keeps from loop to loop, as wide as a head, stay in registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from polaformer_jax.models.kernels.polarity import blocks
from polaformer_jax.models.kernels.polarity.blocks import Plan
from polaformer_jax.models.kernels.triton_part import Part

BLOCK = 32 * 64  # the most elements of a block; more would not fit in the registers


def plan(q, k, width: int, eps: float, masked: bool) -> Plan:
    """For queries (B, N, C) and keys (B, n, C) with heads of `width` channels, masked or not."""
    query_block, key_block = (_block(x.shape[1], width) for x in (q, k))
    return Plan.of(q, k, group=width, width=width, query_block=query_block, key_block=key_block, eps=eps)


def has_width(width: int) -> bool:
    """Whether heads may have this width: Triton needs array sizes of powers of two, and products at least 16 wide.

    Of wider heads the sums over keys do not fit into the shared memory of a program.
    """
    return width in (16, 32, 64)


def _block(tokens: int, width: int) -> int:
    return min(max(pl.next_power_of_2(tokens), 16), max(BLOCK // width, 16))


def convolves(plan: Plan) -> bool:
    """Whether the kernel can compute the convolution of the values; this one takes its result."""
    return False


def forward(plan: Plan, interpret: bool, arrays: dict[str, jax.Array]) -> jax.Array:
    """y (B, N, C) of the arrays by name: q, k, v, g, u, table, s, p, count, and optionally mask."""
    return _call(_forward_kernel, plan, interpret, arrays, results=("q",), warps=4)[0]


def backward(plan: Plan, interpret: bool, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Gradients of q, k, v, g, and of s and p for each example, (B, 1, C). `arrays` also holds y_bar and w."""
    found = _call(_backward_kernel, plan, interpret, arrays, ("q", "k", "v", "g", "each", "each"), warps=8)
    return dict(zip("qkvgsp", found, strict=True))


def _call(kernel, plan: Plan, interpret: bool, arrays, results, warps: int):
    batch, full = arrays["q"].shape[0], arrays["s"].dtype
    # Blocks that cover whole arrays, up to the end of their last parts.
    queries, keys = plan.query_blocks * plan.query_block, plan.key_blocks * plan.key_block
    query = pl.BlockSpec((None, queries, plan.width), lambda b, h: (b, 0, h))
    key = pl.BlockSpec((None, keys, plan.width), lambda b, h: (b, 0, h))
    specs = {
        **dict.fromkeys(("q", "g", "u", "y_bar"), query),
        **dict.fromkeys(("k", "v", "w"), key),
        "table": pl.BlockSpec((None, keys, plan.width), lambda b, h: (0, 0, h)),
        **dict.fromkeys(("s", "p"), pl.BlockSpec((1, plan.width), lambda b, h: (0, h))),
        "count": pl.BlockSpec((None, 1, 1), lambda b, h: (b, 0, 0)),
        "mask": pl.BlockSpec((None, None, keys), lambda b, h: (b, 0, 0)),
        "each": pl.BlockSpec((None, 1, plan.width), lambda b, h: (b, 0, h)),
    }
    shapes = {**arrays, "each": jax.ShapeDtypeStruct((batch, 1, plan.channels), full)}
    return pl.pallas_call(
        functools.partial(kernel, plan, tuple(arrays)),
        grid=(batch, plan.channels // plan.width),
        in_specs=[specs[name] for name in arrays],
        out_specs=[specs[name] for name in results],
        out_shape=[jax.ShapeDtypeStruct(shapes[name].shape, shapes[name].dtype) for name in results],
        compiler_params=plgpu.CompilerParams(num_warps=warps),
        interpret=interpret,
        name="polarity" + kernel.__name__,
    )(*arrays.values())


def _forward_kernel(plan: Plan, names, *refs):
    x, (y,) = blocks.named(names, refs)
    s, p = x.s[...], x.p[...]
    m = _matrices(plan, x, _sum_keys(plan, x))

    def query(i, _):
        at = Part(i, plan.query_block, plan.queries)
        z = at.of(x.q).astype(s.dtype) / s
        at.set(y, blocks.output(z, p, at.of(x.g), at.of(x.u), m, plan.eps))

    jax.lax.fori_loop(0, plan.query_blocks, query, None)


def _backward_kernel(plan: Plan, names, *refs):
    x, (q_bar, k_bar, v_bar, g_bar, s_bar, p_bar) = blocks.named(names, refs)
    s, p = x.s[...], x.p[...]
    m = _matrices(plan, x, _sum_keys(plan, x))

    def query(i, totals):
        at = Part(i, plan.query_block, plan.queries)
        z = at.of(x.q).astype(s.dtype) / s
        given = (z, s, p, at.of(x.g), at.of(x.u), at.of(x.y_bar), m, plan.eps)
        of_q, of_g, _, s_more, p_more, m_more = blocks.query_bars(*given)
        at.set(q_bar, of_q)
        at.set(g_bar, of_g)
        return jax.tree.map(jnp.add, totals, (s_more, p_more, m_more))

    square = (plan.width, plan.width)
    zeros = (jnp.zeros_like(s), jnp.zeros_like(p), [jnp.zeros(square, s.dtype) for _ in range(4)])
    *s_and_p, m_bar = jax.lax.fori_loop(0, plan.query_blocks, query, zeros)
    sums_bar = _matrices(plan, x, m_bar)

    def key(i, totals):
        at = Part(i, plan.key_block, plan.keys)
        z, values, there = _keys(at, x)
        of_k, of_v, s_more, p_more = blocks.key_bars(z, s, p, values, there, sums_bar)
        at.set(k_bar, of_k)
        at.set(v_bar, of_v + at.of(x.w).astype(of_v.dtype))
        return jax.tree.map(jnp.add, totals, [s_more, p_more])

    s_bar[...], p_bar[...] = jax.lax.fori_loop(0, plan.key_blocks, key, s_and_p)


def _sum_keys(plan: Plan, x) -> list[jax.Array]:
    def key(i, sums):
        more = blocks.key_sums(*_keys(Part(i, plan.key_block, plan.keys), x), x.p[...])
        return jax.tree.map(jnp.add, sums, more)

    zeros = [jnp.zeros((plan.width, plan.width), x.s.dtype) for _ in range(4)]
    return jax.lax.fori_loop(0, plan.key_blocks, key, zeros)


def _matrices(plan: Plan, x, sums) -> list[jax.Array]:
    return blocks.matrices(sums, x.count[...], plan.width, x.q.dtype)


def _keys(at: Part, x):
    """z of a block of keys, its values, and ones at valid keys."""
    z = (at.of(x.k).astype(x.s.dtype) + at.of(x.table).astype(x.s.dtype)) / x.s[...]
    values = at.of(x.v)
    inside = at.inside
    if hasattr(x, "mask"):
        inside &= at.of(x.mask) != 0
    there = jnp.broadcast_to(inside[:, None], values.shape)
    return jnp.where(there, z, 0), values, there.astype(values.dtype)
