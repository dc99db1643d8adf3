"""The Triton kernel of GPUs that reads q, k, v and g from the results of the linear layers, as they lie in memory.

It adds their biases, convolves the values and writes the gradients into arrays of the same form: neither the parts nor
the convolved values are arrays of their own. One program for each head of each example, as in `gpu`; the neighbours
that the taps of the convolution read come from the caches.
"""

import functools
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from polaformer_jax.models.kernels.polarity import blocks, gpu
from polaformer_jax.models.kernels.polarity.blocks import Plan
from polaformer_jax.models.kernels.polarity.taps import Taps
from polaformer_jax.models.kernels.triton_part import Part, along, gathered


class PackedPlan(NamedTuple):
    """How the arrays are cut into blocks, and where in them q, k, v and g are.

    Attributes:
        cut: of queries and keys, which are as many.
        taps: of the convolution.
        packs: names of the packed arrays, ("qkvg",) or ("qg", "kv"): their letters are their parts, in this order.
    """

    cut: Plan
    taps: Taps
    packs: tuple[str, ...]

    def place(self, letter: str) -> tuple[str, int]:
        """The packed array that holds q, k, v or g, and which of its parts that is."""
        pack = next(pack for pack in self.packs if letter in pack)
        return pack, pack.index(letter)


def plan(arrays: dict[str, jax.Array], width: int, eps: float, taps: Taps, packs: tuple[str, ...]) -> PackedPlan:
    """For the arrays of `forward`, with heads of `width` channels."""
    batch, tokens, _, channels = arrays[packs[0]].shape
    one = jax.ShapeDtypeStruct((batch, tokens, channels), arrays[packs[0]].dtype)
    return PackedPlan(gpu.plan(one, one, width, eps, False), taps, packs)


def forward(plan: PackedPlan, interpret: bool, arrays: dict[str, jax.Array]) -> jax.Array:
    """y (B, N, C).

    `arrays` by name, all but the packs in the dtype of sums: each pack (B, N, parts, C), and its bias, named with
    "_bias", (parts, C). table: (1, N, C). s, p, u_bias: (1, C), u_bias that of the convolution. kernel: (taps, C).
    """
    return _call(_forward_kernel, plan, interpret, arrays, results=("y",), warps=4)[0]


def backward(plan: PackedPlan, interpret: bool, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Gradients by name of all arrays but the table; those of parameters for each example, (B, ..., C).

    `arrays` also holds y_bar.
    """
    results = tuple(name for name in arrays if name not in ("table", "y_bar"))
    return dict(zip(results, _call(_backward_kernel, plan, interpret, arrays, results, warps=8), strict=True))


def _call(kernel, plan: PackedPlan, interpret: bool, arrays, results, warps: int):
    cut, full = plan.cut, arrays["s"].dtype
    batch, tokens, _, _ = arrays[plan.packs[0]].shape
    length = cut.query_blocks * cut.query_block  # the whole array, up to the end of its last block
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
    token = pl.BlockSpec((None, length, cut.width), lambda b, h: (b, 0, h))
    in_specs, out_specs, out_shapes = {"y_bar": token}, {"y": token}, {}
    out_shapes["y"] = jax.ShapeDtypeStruct((batch, tokens, cut.channels), arrays[plan.packs[0]].dtype)
    for name, shape in shapes.items():
        if name in plan.packs:
            parts = shape.shape[2]
            in_specs[name] = pl.BlockSpec((None, length, parts, cut.width), lambda b, h: (b, 0, 0, h))
            out_specs[name], out_shapes[name] = in_specs[name], shape
        elif name == "table":
            in_specs[name] = pl.BlockSpec((None, length, cut.width), lambda b, h: (0, 0, h))
        elif name != "y_bar":
            rows = shape.shape[0]
            in_specs[name] = pl.BlockSpec((rows, cut.width), lambda b, h: (0, h))
            out_specs[name] = pl.BlockSpec((None, rows, cut.width), lambda b, h: (b, 0, h))
            out_shapes[name] = jax.ShapeDtypeStruct((batch, *shape.shape), full)
    return pl.pallas_call(
        functools.partial(kernel, plan, tuple(arrays), results),
        grid=(batch, cut.channels // cut.width),
        in_specs=[in_specs[name] for name in arrays],
        out_specs=[out_specs[name] for name in results],
        out_shape=[out_shapes[name] for name in results],
        compiler_params=plgpu.CompilerParams(num_warps=warps),
        interpret=interpret,
        name="packed" + kernel.__name__,
    )(*arrays.values())


def _forward_kernel(plan: PackedPlan, names, results, *refs):
    x, (y,) = blocks.named(names, refs)
    source, cut = _Source(plan, x), plan.cut
    m = _matrices(plan, x, _sum_keys(plan, source))

    def query(i, _):
        at = Part(i, cut.query_block, cut.queries)
        z = source.part(at, "q") / x.s[...]

        def tap(t, u):
            return u + source.neighbour(at, t) * source.weight(t)

        u = jax.lax.fori_loop(0, plan.taps.count, tap, jnp.zeros_like(z) + x.u_bias[...])
        at.set(y, blocks.output(z, x.p[...], source.part(at, "g").astype(y.dtype), u, m, cut.eps))

    jax.lax.fori_loop(0, cut.query_blocks, query, None)


def _backward_kernel(plan: PackedPlan, names, results, *refs):
    x, outputs = blocks.named(names, refs)
    bars = types.SimpleNamespace(**dict(zip(results, outputs, strict=True)))
    source, cut, s, p = _Source(plan, x), plan.cut, x.s[...], x.p[...]
    narrow = x.y_bar.dtype
    m = _matrices(plan, x, _sum_keys(plan, source))

    def set_bar(letter: str, at: Part, bar: jax.Array) -> jax.Array:
        """Writes the gradient of a part, and returns its sum over the block, that of the bias."""
        pack, index = plan.place(letter)
        bar = jnp.where(along(at.inside, bar.shape), bar, 0)
        at.set(getattr(bars, pack), bar, index)
        return jnp.sum(bar, axis=0, keepdims=True)

    tap_rows = pl.next_power_of_2(plan.taps.count)
    tap_row = jax.lax.broadcasted_iota(jnp.int32, (tap_rows, cut.width), 0)

    def query(i, totals):
        at = Part(i, cut.query_block, cut.queries)
        z, g = source.part(at, "q") / s, source.part(at, "g").astype(narrow)
        u_bar = source.u_bar(at.of(x.y_bar), g)

        def tap(t, both):
            u, kernel_bar = both
            v = source.neighbour(at, t)
            more = jnp.sum(v * u_bar, axis=0, keepdims=True)
            return u + v * source.weight(t), jnp.where(tap_row == t, kernel_bar + more, kernel_bar)

        u, kernel_bar = jax.lax.fori_loop(
            0, plan.taps.count, tap, (jnp.zeros_like(z) + x.u_bias[...], totals["kernel"])
        )
        q_bar, g_bar, _, s_more, p_more, m_more = blocks.query_bars(z, s, p, g, u, at.of(x.y_bar), m, cut.eps)
        more = {
            "s": s_more,
            "p": p_more,
            "m": m_more,
            "q": set_bar("q", at, q_bar),
            "g": set_bar("g", at, g_bar),
            "u_bias": jnp.sum(u_bar, axis=0, keepdims=True),
        }
        return {"kernel": kernel_bar} | {name: jax.tree.map(jnp.add, totals[name], more[name]) for name in more}

    square = (cut.width, cut.width)
    totals = {name: jnp.zeros_like(s) for name in ("s", "p", "q", "g", "u_bias")}
    totals["m"] = [jnp.zeros(square, s.dtype) for _ in range(4)]
    totals["kernel"] = jnp.zeros(tap_row.shape, s.dtype)
    totals = jax.lax.fori_loop(0, cut.query_blocks, query, totals)
    sums_bar = _matrices(plan, x, totals["m"])

    def key(i, totals):
        at = Part(i, cut.key_block, cut.keys)
        z, values, there = source.keys(at)
        k_bar, v_bar, s_more, p_more = blocks.key_bars(z, s, p, values, there, sums_bar)

        def tap(t, total):
            return total + source.u_bar(*source.readers(at, t)) * source.weight(t)

        v_bar = jax.lax.fori_loop(0, plan.taps.count, tap, v_bar)
        more = {"s": s_more, "p": p_more, "k": set_bar("k", at, k_bar), "v": set_bar("v", at, v_bar)}
        return jax.tree.map(jnp.add, totals, more)

    zeros = {"k": jnp.zeros_like(s), "v": jnp.zeros_like(s)}
    totals |= jax.lax.fori_loop(0, cut.key_blocks, key, {"s": totals["s"], "p": totals["p"]} | zeros)
    for name in ("s", "p", "u_bias"):
        getattr(bars, name)[...] = totals[name]
    for letter in "qkvg":
        pack, index = plan.place(letter)
        getattr(bars, f"{pack}_bias")[pl.ds(index, 1)] = totals[letter]
    Part(0, tap_rows, plan.taps.count).set(bars.kernel, totals["kernel"])


class _Source:
    """Reads q, k, v and g, with their biases, for one head of one example; `full` is the dtype of sums."""

    def __init__(self, plan: PackedPlan, x):
        self.plan, self.x, self.full, self.narrow = plan, x, x.s.dtype, getattr(x, plan.packs[0]).dtype

    def part(self, at: Part, letter: str) -> jax.Array:
        """A block of q, k, v or g, (T, d), at least float32. Beyond the end of the array it is the bias."""
        ref, index, bias = self._place(letter)
        return at.of(ref, index).astype(self.full) + bias

    def keys(self, at: Part) -> tuple[jax.Array, jax.Array, jax.Array]:
        """z of a block of keys, its values, and ones at keys that there are."""
        z = (self.part(at, "k") + at.of(self.x.table)) / self.x.s[...]
        there = along(at.inside, z.shape)
        values = jnp.where(there, self.part(at, "v"), 0).astype(self.narrow)
        return jnp.where(there, z, 0), values, there.astype(self.narrow)

    def neighbour(self, at: Part, tap) -> jax.Array:
        """The values that a tap reads, zeros beyond the map."""
        ref, index, bias = self._place("v")
        tokens, there = self.plan.taps.neighbours(tap, at.indices)
        values = gathered(ref, tokens, there, index).astype(self.full) + bias
        return jnp.where(along(there, values.shape), values, 0)

    def readers(self, at: Part, tap) -> tuple[jax.Array, jax.Array]:
        """y_bar, zeros beyond the map, and g of the tokens that read these by a tap."""
        ref, index, bias = self._place("g")
        tokens, there = self.plan.taps.neighbours(tap, at.indices, transposed=True)
        g = gathered(ref, tokens, there, index).astype(self.full) + bias
        return gathered(self.x.y_bar, tokens, there), g.astype(self.narrow)

    def u_bar(self, y_bar: jax.Array, g: jax.Array) -> jax.Array:
        """The gradient of the convolved values."""
        return y_bar.astype(self.full) * g.astype(self.full)

    def weight(self, tap) -> jax.Array:
        return self.x.kernel[pl.ds(tap, 1)]

    def _place(self, letter: str):
        pack, index = self.plan.place(letter)
        return getattr(self.x, pack), index, getattr(self.x, f"{pack}_bias")[pl.ds(index, 1)]


def _sum_keys(plan: PackedPlan, source: _Source) -> list[jax.Array]:
    cut = plan.cut

    def key(i, sums):
        more = blocks.key_sums(*source.keys(Part(i, cut.key_block, cut.keys)), source.x.p[...])
        return jax.tree.map(jnp.add, sums, more)

    zeros = [jnp.zeros((cut.width, cut.width), source.full) for _ in range(4)]
    return jax.lax.fori_loop(0, cut.key_blocks, key, zeros)


def _matrices(plan: PackedPlan, x, sums) -> list[jax.Array]:
    count = jnp.full((1, 1), plan.cut.keys, x.s.dtype)
    return blocks.matrices(sums, count, plan.cut.width, getattr(x, plan.packs[0]).dtype)
