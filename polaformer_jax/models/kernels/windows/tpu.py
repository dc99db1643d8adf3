"""The kernel of the windows' softmax attention for TPUs.

Arrays come as (n, windows, B, channels), which is how XLA lays out maps of a batch of images: no axis is padded where B
fills tiles, and the windows of a map are cut without moving anything. A program has the same window of some images. On
the chip it turns them into matrices (n, channels), one for each image.

Heads are not an axis. A group of them fills the 128 lanes of a register, or a multiple of them. Products are of whole
groups, one factor of which is zero in the lanes of other heads; a matrix unit has 128 lanes anyway. The grid is
(windows, blocks of images, groups of heads).
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
from polaformer_jax.models.kernels.tpu_chip import chip
from polaformer_jax.models.layers import accumulation_dtype

LANES = 128  # the last axis of a register
IMAGES = 16  # of a block: they fill tiles of 16 bits, and of more
LARGEST_GROUP = 512  # channels
UNASKED = 12 << 20  # bytes of memory (VMEM) that a kernel surely has without asking for more


class Plan(NamedTuple):
    """How the arrays are cut into blocks: everything that is static when the kernel is compiled.

    Attributes:
        tokens: of a window, n.
        windows: of an image.
        images: B.
        channels: C.
        heads: h.
        group: channels of a group of heads.
        block: images of a block; the last one may end beyond the arrays.
        dtype: of queries, keys and values.
    """

    tokens: int
    windows: int
    images: int
    channels: int
    heads: int
    group: int
    block: int
    dtype: jnp.dtype

    @classmethod
    def of(cls, qkv, heads: int) -> "Plan":
        """For `qkv` (n, windows, B, 3C), or its shape and dtype."""
        tokens, windows, images, channels = *qkv.shape[:3], qkv.shape[3] // 3
        block = min(images, IMAGES)
        return cls(tokens, windows, images, channels, heads, group_of(channels, heads), block, qkv.dtype)

    @property
    def width(self) -> int:
        return self.channels // self.heads

    @property
    def groups(self) -> int:
        return self.channels // self.group

    @property
    def memory(self) -> int:
        """Bytes of memory that the gradients take, about; more than the values."""
        n, full = self.tokens, accumulation_dtype(self.dtype)
        scores = _bytes(n, n, full)
        # Queries, keys, values and the result's gradient of a group, and the gradient of all channels of all three.
        blocks = n * _bytes(self.block, 4 * self.group + 3 * self.channels, self.dtype)
        turned = 7 * self.block * _bytes(n, self.group, self.dtype)
        at_work = 6 * (self.group // self.width) * scores + 16 * _bytes(n, self.group, full)
        return 2 * (blocks + (2 * self.heads + 1) * scores) + turned + at_work  # twice: while one is used, one moves


def group_of(channels: int, heads: int) -> int | None:
    """The fewest channels that are whole registers and whole heads; None if they do not divide all channels."""
    size = math.lcm(channels // heads, LANES)
    return None if channels % size or size > LARGEST_GROUP else size


def fits(plan: Plan) -> bool:
    """Whether the kernel's memory suffices on the TPU for which a program is traced, if it is known."""
    known = chip()
    return known is not None and plan.memory <= 0.75 * known.vmem_capacity_bytes


def _bytes(rows: int, columns: int, dtype) -> int:
    """Bytes of an array in tiles of 128 columns, and of 8 rows of 32 bits."""
    size = jnp.dtype(dtype).itemsize
    sublanes = 8 * max(4 // size, 1)
    return pl.cdiv(rows, sublanes) * sublanes * pl.cdiv(columns, LANES) * LANES * size


def forward(arrays: dict[str, jax.Array], interpret: bool) -> tuple[jax.Array, tuple]:
    """y (n, windows, B, C) and nothing; of qkv (n, windows, B, 3C), bias (h, n, n), perhaps mask (windows, n, n)."""
    return _call(_forward_kernel, arrays, interpret, results=("y",), turned=4, products=2)[0], ()


def backward(arrays: dict[str, jax.Array], interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Gradients of qkv, and of the bias summed over windows. `arrays` also holds y_bar, shaped as y."""
    return tuple(_call(_backward_kernel, arrays, interpret, results=("qkv", "bias"), turned=7, products=5))


def _call(
    kernel: Callable, arrays: dict[str, jax.Array], interpret: bool, *, results: tuple[str, ...], turned: int, products
):
    """Runs `kernel`, which needs space for `turned` blocks of matrices, and does so many products for each head."""
    qkv, heads, n = arrays["qkv"], arrays["bias"].shape[0], arrays["qkv"].shape[0]
    plan = Plan.of(qkv, heads)
    given = {name: qkv for name in "qkv"} | {name: x for name, x in arrays.items() if name != "qkv"}

    def part(first: int) -> pl.BlockSpec:  # of a group of channels
        return pl.BlockSpec((n, None, plan.block, plan.group), lambda w, i, j: (0, w, i, first * plan.groups + j))

    specs = {
        **{name: part(i) for i, name in enumerate("qkv")},
        **dict.fromkeys(("y", "y_bar"), part(0)),
        "qkv": pl.BlockSpec((n, None, plan.block, 3 * plan.channels), lambda w, i, j: (0, w, i, 0)),
        "bias": pl.BlockSpec((heads, n, n), lambda w, i, j: (0, 0, 0)),
        "mask": pl.BlockSpec((None, n, n), lambda w, i, j: (w, 0, 0)),
    }
    shapes = {**arrays, "y": jax.ShapeDtypeStruct((*qkv.shape[:3], plan.channels), qkv.dtype)}
    out_shape = [jax.ShapeDtypeStruct(shapes[name].shape, shapes[name].dtype) for name in results]
    scores = plan.images * plan.windows * heads * n * n
    cost = pl.CostEstimate(
        flops=2 * products * scores * plan.width,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays.values(), *out_shape)),
        transcendentals=scores,
    )
    return pl.pallas_call(
        functools.partial(kernel, plan, tuple(given)),
        grid=(plan.windows, pl.cdiv(plan.images, plan.block), plan.groups),
        in_specs=[specs[name] for name in given],
        out_specs=[specs[name] for name in results],
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM((turned, plan.block, n, plan.group), qkv.dtype)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",) * 3,
            vmem_limit_bytes=plan.memory * 4 // 3 if plan.memory > UNASKED else None,
        ),
        cost_estimate=cost,
        interpret=interpret,
        name="window" + kernel.__name__,
    )(*given.values())


def _forward_kernel(plan: Plan, names, *refs):
    x, (y, turned) = named(names, refs)
    heads, mask = _heads(plan), _turn(x, turned, "qkv")

    def image(i, _):
        q, k, v = (turned[part, i] for part in range(3))
        total = jnp.zeros(q.shape, x.bias.dtype)
        for head, own in heads:
            weights = _weights(plan, own(q), k, x.bias[head], mask)
            total += dot(weights.astype(q.dtype), own(v), (1, 0))
        turned[3, i] = total.astype(turned.dtype)

    _for_each_image(plan, image)
    y[...] = jnp.swapaxes(turned[3], 0, 1)


def _backward_kernel(plan: Plan, names, *refs):
    x, (qkv_bar, bias_bar, turned) = named(names, refs)
    heads, mask = _heads(plan), _turn(x, turned, ("q", "k", "v", "y_bar"))
    program = [pl.program_id(axis) for axis in range(3)]

    @pl.when((program[0] == 0) & (program[1] == 0) & (program[2] == 0))
    def _():
        bias_bar[...] = jnp.zeros_like(bias_bar)

    def image(i, _):
        q, k, v, y_bar = (turned[part, i] for part in range(4))
        q_bar = k_bar = v_bar = jnp.zeros(q.shape, bias_bar.dtype)
        for head, own in heads:
            weights = _weights(plan, own(q), k, x.bias[head], mask)
            weights_bar = dot(own(y_bar), v, (1, 1))
            v_bar += dot(weights.astype(q.dtype), own(y_bar), (0, 0))
            scores_bar = weights * (weights_bar - jnp.sum(weights * weights_bar, axis=1, keepdims=True))
            bias_bar[head] += scores_bar
            scores_bar = (scores_bar * plan.width**-0.5).astype(q.dtype)
            q_bar += dot(scores_bar, own(k), (1, 0))
            k_bar += dot(scores_bar, own(q), (0, 0))
        for part, bar in enumerate((q_bar, k_bar, v_bar)):
            turned[4 + part, i] = bar.astype(turned.dtype)

    _for_each_image(plan, image)
    for part in range(3):
        first = pl.multiple_of((part * plan.groups + program[2]) * plan.group, LANES)
        qkv_bar[:, :, pl.ds(first, plan.group)] = jnp.swapaxes(turned[4 + part], 0, 1)


def _turn(x, turned, names) -> jax.Array | None:
    """Turns blocks (n, images, G) into matrices (n, G) of each image; returns the window's mask."""
    for part, name in enumerate(names):
        turned[part] = jnp.swapaxes(getattr(x, name)[...], 0, 1)
    return x.mask[...] if hasattr(x, "mask") else None


def _for_each_image(plan: Plan, body: Callable):
    """Runs `body(i, None)` for the images of a block; what the last block has beyond the arrays is left out."""
    left = plan.images - pl.program_id(1) * plan.block
    jax.lax.fori_loop(0, plan.block if plan.images % plan.block == 0 else jnp.minimum(plan.block, left), body, None)


def _heads(plan: Plan) -> list[tuple[jax.Array, Callable]]:
    """For each head of the program's group: its index, and the function that sets other heads' channels to zero."""
    heads = plan.group // plan.width
    first = pl.program_id(2) * heads

    def only(i: int, x: jax.Array) -> jax.Array:
        if heads == 1:
            return x
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        return jnp.where((lane >= i * plan.width) & (lane < (i + 1) * plan.width), x, 0)

    return [(first + i, functools.partial(only, i)) for i in range(heads)]


def _weights(plan: Plan, q: jax.Array, k: jax.Array, bias: jax.Array, mask: jax.Array | None) -> jax.Array:
    """softmax(q k^T / √d + bias + mask), (n, n), of one head; q is zero in other heads' channels."""
    scores = dot(q, k, (1, 1)) * plan.width**-0.5 + bias
    if mask is not None:
        scores = scores + mask
    weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    return weights * (1 / jnp.sum(weights, axis=1, keepdims=True))
