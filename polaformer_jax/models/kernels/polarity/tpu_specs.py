"""Which blocks of its arrays each step of the TPU kernel of the fused attention reads and writes, and at what cost."""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from polaformer_jax.models.kernels.polarity import tpu_plan
from polaformer_jax.models.kernels.polarity.blocks import Plan


def specs(plan: Plan, passes_over_keys: int, *, written: bool = False) -> dict[str, pl.BlockSpec]:
    """The blocks of arrays by name, read or `written`; those of gradients in one array by their names together."""
    second_pass = plan.key_blocks + plan.query_blocks

    def query_at(step):
        return jnp.clip(step - plan.key_blocks, 0, plan.query_blocks - 1)

    def key_at(step):
        if written:  # in the second pass alone: until then the first block stays in memory
            return jnp.maximum(step - second_pass, 0)
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
        **_specs_of_convolution(plan),
    }


def _specs_of_convolution(plan: Plan) -> dict[str, pl.BlockSpec]:
    if plan.taps is None:
        return {}
    return {
        "weights": pl.BlockSpec((plan.group, plan.taps.count), lambda j, b, i: (j, 0)),
        "offset": pl.BlockSpec((plan.group, 1), lambda j, b, i: (j, 0)),
        "channel_sums": pl.BlockSpec((1, plan.group, tpu_plan.tap_lanes(plan.taps)), lambda j, b, i: (b, j, 0)),
    }


def reads(plan: Plan, arrays, passes_over_keys: int) -> dict[str, int]:
    """How often each array is read from the device's memory."""
    found = dict.fromkeys(arrays, 1)
    if plan.key_blocks > 1 and not plan.whole:  # otherwise keys stay for both passes, and the table for all examples
        found |= {name: passes_over_keys for name in ("k", "v", "mask") if name in arrays}
        found["table"] = arrays["q"].shape[0] * passes_over_keys
    return found


def cost(plan: Plan, arrays, results, passes_over_keys: int, times: dict[str, int]) -> pl.CostEstimate:
    """The estimate for the compiler: bytes as often as blocks are read, and the operations of both passes."""
    keys = arrays["k"].size
    read = sum(array.nbytes * times[name] for name, array in arrays.items())
    written = sum(arrays[name].nbytes for pack in results if pack not in ("each", "channel_sums") for name in pack)
    products = {1: 4 * keys + 4 * arrays["q"].size, 2: 10 * keys + 12 * arrays["q"].size}[passes_over_keys]
    return pl.CostEstimate(
        flops=2 * products * plan.group,
        bytes_accessed=read + written,
        transcendentals=2 * (passes_over_keys * keys + arrays["q"].size),
    )
