"""The kernel of the fused attention for TPUs: passes over blocks of tokens, one after the other, in one program.

The grid is (groups of channels, batch, steps), and the steps of one example are its blocks of keys, of queries, and
for gradients its blocks of keys again. A TPU core runs them in this order, so that the sums over keys stay in its
memory (VMEM) from the first pass to the last. Where all tokens of an example fit in that memory they are read once, and
blocks are parts of them; otherwise each step reads its own, and keys and values are read in each pass.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from polaformer_jax.models.kernels.polarity import blocks, tpu_convolution, tpu_plan, tpu_specs
from polaformer_jax.models.kernels.polarity.blocks import Plan
from polaformer_jax.models.kernels.polarity.tpu_plan import convolves, plan, supported

__all__ = ["backward", "convolves", "forward", "plan", "supported"]

WITH_TOKENS = ("q", "k", "v", "g", "u", "table", "y_bar", "w")


def forward(plan: Plan, interpret: bool, arrays: dict[str, jax.Array]) -> jax.Array:
    """y (B, N, C) of the arrays by name: q, k, v, g, u, table, s, p, count, and optionally mask.

    If the plan has taps, weights (C, taps) and offset (C, 1) of the convolution instead of u, at least float32.
    """
    return _call(_forward_kernel, plan, interpret, arrays, results=("q",), squares=(True, False), passes_over_keys=1)[0]


def backward(plan: Plan, interpret: bool, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Gradients of q, k, v, g, and of s and p for each example, (B, 1, C).

    Several in one array are under their names together, such as "qkvg", (B, 4, C, N): `polarity.part` reads them.
    `arrays` also holds y_bar; and w, (B, n, C), to be added to the gradient of v. If the plan has taps, there is no w,
    and sums over tokens are "channel_sums", (B, C, at least taps + 5): the gradients of the taps' weights, of the
    offset, and the sums of those of q, k, v and g, which are gradients of biases.
    """
    names = (*_packs(plan), "s", "p")
    results, squares = (*_packs(plan), "each", "each"), (True, False, True)
    if plan.taps is not None:
        names, results = (*names, "channel_sums"), (*results, "channel_sums")
    found = _call(_backward_kernel, plan, interpret, arrays, results, squares, passes_over_keys=2)
    return dict(zip(names, found, strict=True))


def _packs(plan: Plan) -> tuple[str, ...]:
    """The gradients in each array of results, one behind the other along the channels.

    One array holds several where channels are not along the lanes. Steps over queries write q and g, those over keys
    k and v, and to one block both can only write while it stays in memory.
    """
    if plan.tokens == 0:
        return ("q", "k", "v", "g")
    return plan.packs if plan.whole and plan.queries == plan.keys else ("qg", "kv")


def _call(kernel, plan: Plan, interpret: bool, arrays, results, squares, passes_over_keys: int) -> list[jax.Array]:
    """Runs `kernel`. `squares`: its (4, G, G) scratch arrays, True for those in the accumulation dtype."""
    batch, full, narrow = arrays["q"].shape[0], arrays["s"].dtype, arrays["q"].dtype
    turn = functools.partial(jnp.swapaxes, axis1=-1, axis2=-2) if plan.tokens else lambda x: x
    operands = {name: turn(x) if name in (*WITH_TOKENS, "s", "p") else x for name, x in arrays.items()}
    specs, reads = tpu_specs.specs(plan, passes_over_keys), tpu_specs.reads(plan, arrays, passes_over_keys)
    written = tpu_specs.specs(plan, passes_over_keys, written=True)

    def shape(name):
        if name == "channel_sums":
            return jax.ShapeDtypeStruct((batch, plan.channels, tpu_plan.tap_lanes(plan.taps)), full)
        if name == "each":
            return jax.eval_shape(turn, jax.ShapeDtypeStruct((batch, 1, plan.channels), full))
        one = operands[name[0]].shape
        return jax.ShapeDtypeStruct(one if len(name) == 1 else (batch, len(name), *one[1:]), narrow)

    found = pl.pallas_call(
        functools.partial(kernel, plan, tuple(arrays)),
        grid=(plan.channels // plan.group, batch, passes_over_keys * plan.key_blocks + plan.query_blocks),
        in_specs=[specs[name] for name in arrays],
        out_specs=[written[name] for name in results],
        out_shape=[shape(name) for name in results],
        scratch_shapes=[
            *(pltpu.VMEM((4, plan.group, plan.group), full if wide else narrow) for wide in squares),
            *_of_convolution(plan, narrow, passes_over_keys),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tpu_plan.memory_limit(plan, narrow.itemsize),
        ),
        cost_estimate=tpu_specs.cost(plan, arrays, results, passes_over_keys, reads),
        metadata={"reads": " ".join(str(reads[name]) for name in arrays)},  # for `aot --traffic`
        interpret=interpret,
        name="polarity" + kernel.__name__,
    )(*operands.values())
    return [x if name == "channel_sums" or x.ndim == 4 else turn(x) for name, x in zip(results, found, strict=True)]


def _of_convolution(plan: Plan, dtype, count: int) -> list:
    """The convolved values of an example, and for gradients what reaches values through the convolution."""
    if plan.taps is None:
        return []
    return [pltpu.VMEM((1, plan.group, plan.query_blocks * plan.query_block), dtype)] * count


def _forward_kernel(plan: Plan, names, *refs):
    x, (y, sums, m, *convolved) = blocks.named(names, refs)
    step = pl.program_id(2)
    _sum_keys(plan, step, x, sums, m)
    if plan.taps is not None:
        (x.u,) = convolved
        pl.when(step == plan.key_blocks)(lambda: _convolve(plan, x))

    @pl.when(step >= plan.key_blocks)
    def _():
        part = _Part.of_queries(plan, step - plan.key_blocks)
        z = part.of(x.q).astype(x.s.dtype) / x.s[...]
        part.set(y, value=blocks.output(z, x.p[...], part.of(x.g), part.of(x.u), m, plan.eps, plan.tokens))


def _backward_kernel(plan: Plan, names, *refs):
    packs = _packs(plan)
    x, refs = blocks.named(names, refs)
    if plan.taps is not None:
        *refs, x.u, x.w = refs
        x.channel_sums = refs.pop(len(packs) + 2)
    *bars, s_bar, p_bar, sums, m, m_bar = refs
    bars = {
        name: (ref, *((i,) if len(pack) > 1 else ()))
        for pack, ref in zip(packs, bars, strict=True)
        for i, name in enumerate(pack)
    }
    step, second_pass = pl.program_id(2), plan.key_blocks + plan.query_blocks

    @pl.when(step == 0)
    def _():
        for ref in (s_bar, p_bar, m_bar):
            ref[...] = jnp.zeros_like(ref)

    _sum_keys(plan, step, x, sums, m)
    if plan.taps is not None:
        pl.when(step == plan.key_blocks)(lambda: _convolve(plan, x))

    @pl.when((step >= plan.key_blocks) & (step < second_pass))
    def _():
        part = _Part.of_queries(plan, step - plan.key_blocks)
        q, g, u, y_bar = (part.inside(part.of(ref)) for ref in (x.q, x.g, x.u, x.y_bar))
        s, p = x.s[...], x.p[...]
        found = blocks.query_bars(q.astype(s.dtype) / s, s, p, g, u, y_bar, m, plan.eps, plan.tokens)
        q_bar, g_bar, _, s_more, p_more, m_more = found
        part.set(*bars["q"], value=q_bar)
        part.set(*bars["g"], value=g_bar)
        _add_sums(plan, x, q=q_bar, g=g_bar)
        s_bar[0] += s_more
        p_bar[0] += p_more
        for i, more in enumerate(m_more):
            m_bar[i] += more

    @pl.when(step == second_pass)
    def _():
        # From here on m holds gradients of the sums.
        _set(m, blocks.matrices(m_bar, x.count[0], plan.width, m.dtype, plan.tokens))

    @pl.when(step >= second_pass)
    def _():
        part = _Part.of_keys(plan, step - second_pass)
        z, values, there = _keys(part, x)
        k_bar, v_bar, s_more, p_more = blocks.key_bars(z, x.s[...], x.p[...], values, there, m, plan.tokens)
        v_bar = v_bar + part.inside(part.of(x.w).astype(v_bar.dtype))
        part.set(*bars["k"], value=k_bar)
        part.set(*bars["v"], value=v_bar)
        _add_sums(plan, x, k=k_bar, v=v_bar)
        s_bar[0] += s_more
        p_bar[0] += p_more


def _convolve(plan: Plan, x) -> None:
    """Sets u of an example; and for gradients w, and the sums over tokens but for those that `_add_sums` adds.

    As the operations do, it rounds u and the gradient of u to the dtype of the values.
    """
    full, narrow, taps = x.s.dtype, x.v.dtype, plan.taps

    def tokens(ref, rows):
        array = ref[0, rows, :].astype(full)
        return jnp.where(jax.lax.broadcasted_iota(jnp.int32, array.shape, 1) < plan.keys, array, 0)

    def some(rows):
        values, weights = tokens(x.v, rows), x.weights[rows, :]
        x.u[0, rows, :] = (tpu_convolution.convolved(taps, values, weights) + x.offset[rows, :]).astype(narrow)
        if not hasattr(x, "y_bar"):
            return
        u_bar = (tokens(x.y_bar, rows) * tokens(x.g, rows)).astype(narrow).astype(full)
        x.w[0, rows, :] = tpu_convolution.convolved(taps, u_bar, weights, transposed=True).astype(narrow)
        bars = tpu_convolution.weight_bars(taps, values, u_bar, x.channel_sums.shape[2])
        lane = jax.lax.broadcasted_iota(jnp.int32, bars.shape, 1)
        x.channel_sums[0, rows, :] = jnp.where(lane == taps.count, jnp.sum(u_bar, axis=1, keepdims=True), bars)

    tpu_convolution.by_channels(plan.group, some)


def _add_sums(plan: Plan, x, **bars: jax.Array) -> None:
    """Adds gradients of a block, summed over its tokens, to those of the example, which `_convolve` has begun."""
    if plan.taps is None:
        return
    for name, bar in bars.items():
        lane = jax.lax.broadcasted_iota(jnp.int32, x.channel_sums.shape[1:], 1)
        total = jnp.sum(bar.astype(x.channel_sums.dtype), axis=1, keepdims=True)
        x.channel_sums[0] += jnp.where(lane == plan.taps.count + 1 + "qkvg".index(name), total, 0)


def _sum_keys(plan: Plan, step, x, sums, m):
    """The first pass; after it `m` holds the matrices that queries are multiplied with."""

    @pl.when(step == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)

    @pl.when(step < plan.key_blocks)
    def _():
        for i, more in enumerate(blocks.key_sums(*_keys(_Part.of_keys(plan, step), x), x.p[...], plan.tokens)):
            sums[i] += more

    @pl.when(step == plan.key_blocks)
    def _():
        _set(m, blocks.matrices(sums, x.count[0], plan.width, m.dtype, plan.tokens))


def _set(ref, values):
    for i, value in enumerate(values):
        ref[i] = value


def _keys(part: "_Part", x):
    """z of a block of keys, its values, and ones at valid keys."""
    full = x.s.dtype
    z = part.inside((part.of(x.k).astype(full) + part.of(x.table).astype(full)) / x.s[...])
    values = part.inside(part.of(x.v))
    there = part.inside(jnp.ones_like(values))
    if hasattr(x, "mask"):
        mask, ones = part.of(x.mask, tokens=1), jnp.ones((1, part.channels), values.dtype)
        # (1, tokens) by (1, G) over the axis of size 1: the mask for each channel, without transposing registers.
        repeated = blocks.dot(ones, mask, (0, 0)) if part.tokens else blocks.dot(mask, ones, (0, 0))
        there = part.inside(repeated.astype(there.dtype))
        z = jnp.where(there == 0, 0, z)
    return z, values, there


class _Part:
    """The tokens of one step: block `index` of `size` tokens, of `length` in all; `tokens` is their axis."""

    def __init__(self, plan: Plan, index, size: int, length: int):
        self.tokens, self.size, self.channels = plan.tokens, size, plan.group
        self.left = length - index * size if length % size else None
        self.start = index * size if plan.whole and length > size else None

    @classmethod
    def of_queries(cls, plan: Plan, index) -> "_Part":
        return cls(plan, index, plan.query_block, plan.queries)

    @classmethod
    def of_keys(cls, plan: Plan, index) -> "_Part":
        return cls(plan, index, plan.key_block, plan.keys)

    def of(self, ref, tokens: int | None = None) -> jax.Array:
        """What a reference (1, ...) holds of these tokens; they are its axis 1 + `tokens`."""
        return ref[self._at(tokens)]

    def set(self, ref, *part, value) -> None:
        """Sets it, for one of the arrays that the reference holds, if several."""
        ref[(0, *part, *self._at(None)[1:])] = value.astype(ref.dtype)

    def inside(self, block):
        """Sets tokens beyond the end of the arrays, where the last block may read arbitrary values, to zero."""
        if self.left is None:
            return block
        return jnp.where(jax.lax.broadcasted_iota(jnp.int32, block.shape, self.tokens) < self.left, block, 0)

    def _at(self, tokens: int | None) -> tuple:
        """The index into a reference whose tokens are on another axis than the plan's if `tokens` says so."""
        if self.start is None:
            return 0, slice(None), slice(None)
        tokens = self.tokens if tokens is None else tokens
        span = pl.ds(pl.multiple_of(self.start, self.size), self.size)
        return (0, slice(None), span) if tokens else (0, span, slice(None))
