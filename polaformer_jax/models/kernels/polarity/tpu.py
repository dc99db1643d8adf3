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

from polaformer_jax.models.kernels.polarity import blocks, tpu_plan
from polaformer_jax.models.kernels.polarity.blocks import Plan
from polaformer_jax.models.kernels.polarity.tpu_plan import plan, supported

__all__ = ["backward", "forward", "plan", "supported"]

WITH_TOKENS = ("q", "k", "v", "g", "u", "table", "y_bar", "w")


def forward(plan: Plan, interpret: bool, arrays: dict[str, jax.Array]) -> jax.Array:
    """y (B, N, C) of the arrays by name: q, k, v, g, u, table, s, p, count, and optionally mask."""
    return _call(_forward_kernel, plan, interpret, arrays, results=("q",), squares=(True, False), passes_over_keys=1)[0]


def backward(plan: Plan, interpret: bool, arrays: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
    """Gradients of q, k, v, g, and of s and p for each example, (B, 1, C).

    `arrays` also holds y_bar, and w, (B, n, C), to be added to the gradient of v.
    """
    packs = _packs(plan)
    results, squares = (*packs, "each", "each"), (True, False, True)
    *bars, s, p = _call(_backward_kernel, plan, interpret, arrays, results, squares, passes_over_keys=2)
    parts = {}
    for names, bar in zip(packs, bars, strict=True):
        if len(names) == 1:
            parts[names] = bar
        else:
            # (B, parts, C, N) -> (B, N, parts, C). XLA joins these slices again where they are stacked, for products.
            bar = jnp.moveaxis(bar, 3, 1)
            parts |= {name: bar[:, :, i] for i, name in enumerate(names)}
    return *(parts[name] for name in "qkvg"), s, p


def _packs(plan: Plan) -> tuple[str, ...]:
    """The gradients in each array of results, one behind the other along the channels.

    One array holds several where channels are not along the lanes. Steps over queries write q and g, those over keys
    k and v, and to one block both can only write while it stays in memory.
    """
    if plan.tokens == 0:
        return ("q", "k", "v", "g")
    return ("qkvg",) if plan.whole and plan.queries == plan.keys else ("qg", "kv")


def _call(kernel, plan: Plan, interpret: bool, arrays, results, squares, passes_over_keys: int) -> list[jax.Array]:
    """Runs `kernel`. `squares`: its (4, G, G) scratch arrays, True for those in the accumulation dtype."""
    batch, full, narrow = arrays["q"].shape[0], arrays["s"].dtype, arrays["q"].dtype
    turn = functools.partial(jnp.swapaxes, axis1=-1, axis2=-2) if plan.tokens else lambda x: x
    operands = {name: turn(x) if name in (*WITH_TOKENS, "s", "p") else x for name, x in arrays.items()}
    specs, reads = _specs(plan, passes_over_keys), _reads(plan, arrays, passes_over_keys)

    def shape(name):
        if name == "each":
            return jax.eval_shape(turn, jax.ShapeDtypeStruct((batch, 1, plan.channels), full))
        one = operands[name[0]].shape
        return jax.ShapeDtypeStruct(one if len(name) == 1 else (batch, len(name), *one[1:]), narrow)

    reads = _reads(plan, arrays, passes_over_keys)
    found = pl.pallas_call(
        functools.partial(kernel, plan, tuple(arrays)),
        grid=(plan.channels // plan.group, batch, passes_over_keys * plan.key_blocks + plan.query_blocks),
        in_specs=[specs[name] for name in arrays],
        out_specs=[specs[name] for name in results],
        out_shape=[shape(name) for name in results],
        scratch_shapes=[pltpu.VMEM((4, plan.group, plan.group), full if wide else narrow) for wide in squares],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tpu_plan.memory_limit(plan, narrow.itemsize),
        ),
        cost_estimate=_cost(plan, arrays, results, passes_over_keys, reads),
        metadata={"reads": " ".join(str(reads[name]) for name in arrays)},  # for `aot --traffic`
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(*operands.values())
    return [x if x.ndim == 4 else turn(x) for x in found]


def _specs(plan: Plan, passes_over_keys: int) -> dict[str, pl.BlockSpec]:
    """The blocks of arrays by name; those of gradients in one array by their names together."""
    second_pass = plan.key_blocks + plan.query_blocks

    def query_at(step):
        return jnp.clip(step - plan.key_blocks, 0, plan.query_blocks - 1)

    def key_at(step):
        if passes_over_keys == 1:
            return jnp.minimum(step, plan.key_blocks - 1)
        return jnp.where(step < second_pass, jnp.minimum(step, plan.key_blocks - 1), step - second_pass)

    sizes = {"query": plan.query_block, "key": plan.key_block}
    at = {"query": query_at, "key": key_at}
    if plan.whole:
        sizes = {"query": plan.query_blocks * plan.query_block, "key": plan.key_blocks * plan.key_block}
        at = dict.fromkeys(at, lambda step: 0)

    def block(of: str, examples: bool = True, parts: int | None = None) -> pl.BlockSpec:
        size, where = sizes[of], at[of]
        before = () if parts is None else (parts,)

        def index(j, b, i):
            last = (j, where(i)) if plan.tokens else (where(i), j)
            return (b if examples else 0, *(0 for _ in before), *last)

        return pl.BlockSpec((1, *before, *((plan.group, size) if plan.tokens else (size, plan.group))), index)

    of_channels = (plan.group, 1) if plan.tokens else (1, plan.group)

    def index_of_channels(j):
        return (j, 0) if plan.tokens else (0, j)

    return {
        **dict.fromkeys(("q", "g", "u", "y_bar"), block("query")),
        **dict.fromkeys(("k", "v", "w"), block("key")),
        **{pack: block("key" if pack == "kv" else "query", parts=len(pack)) for pack in ("qkvg", "qg", "kv")},
        "table": block("key", examples=False),
        **dict.fromkeys(("s", "p"), pl.BlockSpec(of_channels, lambda j, b, i: index_of_channels(j))),
        "count": pl.BlockSpec((1, 1, 1), lambda j, b, i: (b, 0, 0)),
        "mask": pl.BlockSpec((1, 1, sizes["key"]), lambda j, b, i: (b, 0, at["key"](i))),
        "each": pl.BlockSpec((1, *of_channels), lambda j, b, i: (b, *index_of_channels(j))),
    }


def _reads(plan: Plan, arrays, passes_over_keys: int) -> dict[str, int]:
    """How often each array is read from the device's memory."""
    reads = dict.fromkeys(arrays, 1)
    if plan.key_blocks > 1 and not plan.whole:  # otherwise keys stay for both passes, and the table for all examples
        reads |= {name: passes_over_keys for name in ("k", "v", "mask") if name in arrays}
        reads["table"] = arrays["q"].shape[0] * passes_over_keys
    return reads


def _cost(plan: Plan, arrays, results, passes_over_keys: int, reads: dict[str, int]) -> pl.CostEstimate:
    """The estimate for the compiler: bytes as often as blocks are read, and the operations of both passes."""
    keys = arrays["k"].size
    read = sum(array.nbytes * reads[name] for name, array in arrays.items())
    written = sum(arrays[name].nbytes for result in results if result != "each" for name in result)
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
        part = _Part.of_queries(plan, step - plan.key_blocks)
        z = part.of(x.q).astype(x.s.dtype) / x.s[...]
        part.set(y, value=blocks.output(z, x.p[...], part.of(x.g), part.of(x.u), m, plan.eps, plan.tokens))


def _backward_kernel(plan: Plan, names, *refs):
    packs = _packs(plan)
    x, (*bars, s_bar, p_bar, sums, m, m_bar) = blocks.named(names, refs)
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

    @pl.when((step >= plan.key_blocks) & (step < second_pass))
    def _():
        part = _Part.of_queries(plan, step - plan.key_blocks)
        q, g, u, y_bar = (part.inside(part.of(ref)) for ref in (x.q, x.g, x.u, x.y_bar))
        s, p = x.s[...], x.p[...]
        found = blocks.query_bars(q.astype(s.dtype) / s, s, p, g, u, y_bar, m, plan.eps, plan.tokens)
        q_bar, g_bar, _, s_more, p_more, m_more = found
        part.set(*bars["q"], value=q_bar)
        part.set(*bars["g"], value=g_bar)
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
        part.set(*bars["k"], value=k_bar)
        part.set(*bars["v"], value=v_bar + part.of(x.w).astype(v_bar.dtype))
        s_bar[0] += s_more
        p_bar[0] += p_more


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
