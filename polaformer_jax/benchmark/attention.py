"""Speed of the attention core by itself against the number of tokens, compared with softmax attention.

    polaformer benchmark attention --tokens 49 196 784 3136 --csv attention.csv

Polarity is `polarity_attention` on a square grid, with its depthwise convolution and gate, in XLA operations; kernel
is the same in one kernel, on devices that have one; softmax is `jax.nn.dot_product_attention`. None includes the linear
layers around it. The floor is a lower bound of every core's time: a program that only reads the inputs of the polarity
core once, and writes as much as its results once. Measurements take turns, on one device.
"""

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from polaformer_jax.benchmark import options, sweep
from polaformer_jax.benchmark.sweep import Job, Point
from polaformer_jax.errors import UserError
from polaformer_jax.files import tables
from polaformer_jax.models.attention import polarity_attention
from polaformer_jax.models.kernels.polarity import has_kernel

MODES = ("forward", "gradient")
KERNEL = 5  # size of the depthwise convolution

Arrays = dict[str, jax.Array]


class Sizes(NamedTuple):
    """Sizes and dtype of the arrays (batch, tokens, heads * width)."""

    batch: int
    heads: int
    width: int
    dtype: str


def polarity(given: Arrays, implementation: str = "xla") -> jax.Array:
    """(B, N, C) from all arrays of `arguments`."""
    side = math.isqrt(given["q"].shape[1])
    return polarity_attention(**given, grid=(side, side), implementation=implementation)


def softmax(given: Arrays) -> jax.Array:
    """(B, N, h, d) from q, k and v of the same shape."""
    return jax.nn.dot_product_attention(given["q"], given["k"], given["v"])


def floor(given: Arrays) -> jax.Array:
    """(B, N, C) from q, k, v and g, each read once."""
    return given["q"] + given["k"] + given["v"] + given["g"]


def floor_gradient(given: Arrays) -> Arrays:
    """Arrays of the sizes of the gradients of q, k, v and g, each of which is read once."""
    total = floor(given)
    return {name: total * given[name] for name in "qkvg"}


ATTENTIONS: dict[str, Callable[[Arrays], jax.Array]] = {
    "polarity": polarity,
    "kernel": functools.partial(polarity, implementation="pallas"),
    "softmax": softmax,
    "floor": floor,
}
RATIOS = (("softmax", "polarity"), ("polarity", "floor"), ("kernel", "floor"))


def here(width: int) -> tuple[str, ...]:
    """The names of `ATTENTIONS` to measure on this process's devices: without the kernel if it would be interpreted."""
    kernel = has_kernel(jax.default_backend(), width)
    return tuple(name for name in ATTENTIONS if kernel or name != "kernel")


def arguments(attention: str, tokens: int, sizes: Sizes) -> Arrays:
    """Random queries, keys and values, and except for softmax a gate and parameters, these in float32."""
    batch, heads, width, dtype = sizes
    shape = (batch, tokens, heads, width) if attention == "softmax" else (batch, tokens, heads * width)
    keys = jax.random.split(jax.random.key(0), 5)
    given = {name: jax.random.normal(key, shape, dtype) for name, key in zip("qkvg", keys[:4], strict=True)}
    if attention == "softmax":
        del given["g"]
        return given
    return given | {
        "power": jnp.zeros((1, heads, 1, width)),
        "scale": jnp.zeros((1, 1, heads * width)),
        "positional_encoding": jnp.zeros((1, tokens, heads * width)),
        "kernel": jax.random.normal(keys[4], (KERNEL, KERNEL, 1, width)) / KERNEL,
        "bias": jnp.zeros(width),
    }


def job(tokens: int, attention: str, mode: str, *, sizes: Sizes) -> Job:
    """The attention, or ("gradient") the sum of its result and the gradients of all its arguments."""
    forward = ATTENTIONS[attention]

    def total(given: Arrays) -> jax.Array:
        return jnp.sum(forward(given), dtype=jnp.float32)

    gradient = floor_gradient if attention == "floor" else jax.value_and_grad(total)
    function = jax.jit(forward if mode == "forward" else gradient)
    make = functools.partial(arguments, attention, tokens, sizes)

    def start(program: jax.stages.Compiled) -> Callable[[], object]:
        given = make()
        return lambda: program(given)

    return Job(lambda: function.trace(jax.eval_shape(make)), start)


def table(points: Sequence[Point]) -> str:
    """A line for each mode and length, and the `RATIOS` of the times."""
    by_name = {point[:3]: point for point in points}
    names = [name for name in ATTENTIONS if any(point.attention == name for point in points)]
    ratios = [pair for pair in RATIOS if set(pair) <= set(names)]
    head = ["mode", "tokens", *(f"{name} {cell}" for name in names for cell in sweep.CELLS)]
    lines = []
    for mode in MODES:
        for tokens in sorted({point.tokens for point in points}):
            found = {name: by_name[tokens, name, mode] for name in names}
            texts = [text for point in found.values() for text in sweep.cells(point)]
            lines.append([mode, f"{tokens:,}", *texts, *(_ratio(found[a], found[b]) for a, b in ratios)])
    return tables.columns([*head, *("/".join(pair) for pair in ratios)], lines)


def _ratio(a: Point, b: Point) -> str:
    return tables.number(a.timing.median / b.timing.median if a.timing and b.timing else None, ".2f")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=[49, 196, 784, 3136], help="square numbers [49 196 784 3136]"
    )
    parser.add_argument("--heads", type=int, default=2, help="[2]")
    parser.add_argument("--width", type=int, default=32, help="channels of a head [32]")
    parser.add_argument("--batch-size", type=int, default=8, help="[8]")
    parser.add_argument("--dtype", choices=options.DTYPES, default="float32", help="[float32]")
    sweep.add_arguments(parser)


def main(args: argparse.Namespace) -> None:
    sweep.check(args)
    for flag, value in (("--heads", args.heads), ("--width", args.width), ("--batch-size", args.batch_size)):
        options.check_positive(flag, value)
    if wrong := [tokens for tokens in args.tokens if tokens < 1 or math.isqrt(tokens) ** 2 != tokens]:
        raise UserError(f"--tokens has {wrong[0]}: expected square numbers, such as 49, 196, 784, 3136")
    if args.width % 2:
        raise UserError(f"--width is {args.width}: expected an even number, since each stream has half of a head")
    sizes = Sizes(args.batch_size, args.heads, args.width, args.dtype)
    sweep.run(
        args,
        args.tokens,
        functools.partial(job, sizes=sizes),
        attentions=here(args.width),
        modes=MODES,
        sizes=sizes._asdict(),
        table=table,
    )
