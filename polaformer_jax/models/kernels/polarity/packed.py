"""Polarity attention for GPUs, from the results of the linear layers as they lie in memory: see `packed_gpu`.

Between the linear layers before and after it, memory holds nothing but what they write and read.
"""

import functools
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from polaformer_jax.models.kernels import placement, polarity
from polaformer_jax.models.kernels.placement import Placement
from polaformer_jax.models.kernels.polarity.taps import Taps
from polaformer_jax.models.layers import ConvParams, without_bias


def usable(implementation: str, x: jax.Array, width: int) -> bool:
    """Whether tokens are computed in this way: on a GPU that a program is being traced for, if told."""
    return placement.for_gpu() and polarity.chosen(implementation, x, width)


def attention(
    tokens: dict[str, jax.Array],
    layers: dict[str, nnx.Linear],
    convolution: ConvParams,
    *,
    s: jax.Array,
    p: jax.Array,
    table: jax.Array,
    grid: tuple[int, ...],
    eps: float,
) -> jax.Array:
    """y of `models.attention.polarity_attention`, for as many queries as keys.

    Args:
        tokens: what each layer takes, (B, N, C).
        layers: those that compute q, k, v and g, by the letters of their results: "qkvg", or "qg" and "kv".
        convolution: that of the values.
        s, p: (h, d), at least float32.
        table: (1, N, C), added to the keys.
        grid: how the N tokens are arranged.
        eps: added to the denominators.

    Returns:
        (B, N, C) in the dtype of the layers. Where a mesh is set, the batch is sharded over its devices if it divides
        evenly.
    """
    (heads, width), full = s.shape, s.dtype
    taps = Taps.on(grid, convolution.kernel.shape[:-2])
    arrays = {
        "table": table.astype(full),
        "s": s.reshape(1, -1),
        "p": p.reshape(1, -1),
        "kernel": jnp.tile(convolution.kernel[...].astype(full).reshape(taps.count, width), heads),  # (taps, C)
        "u_bias": jnp.tile(convolution.bias[...].astype(full).reshape(1, width), heads),
    }
    for letters, layer in layers.items():
        shape = (len(letters), heads * width)
        arrays[letters] = without_bias(layer, tokens[letters]).reshape(
            *tokens[letters].shape[:2], *shape
        )  # (B, N, parts, C)
        bias = jnp.zeros(shape, full) if layer.bias is None else layer.bias[...].astype(full)
        arrays[f"{letters}_bias"] = bias.reshape(shape)
    return packed_attention(arrays, width=width, eps=eps, taps=taps, packs=tuple(layers))


@functools.partial(jax.jit, static_argnames=("width", "eps", "taps", "packs"))
def packed_attention(arrays, *, width, eps, taps, packs) -> jax.Array:
    """Traced once for all blocks of one shape."""
    return _packed(_Setting(width, eps, taps, packs, Placement.here(only_tpu=False)), arrays)


class _Setting(NamedTuple):
    """Everything that a program of the kernel depends on, except for its arrays: see `attention` and `PackedPlan`."""

    width: int
    eps: float
    taps: Taps
    packs: tuple[str, ...]
    placement: Placement


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _packed(setting: _Setting, arrays: dict[str, jax.Array]) -> jax.Array:
    return _run("forward", setting, arrays)[0]


def _fwd(setting, arrays):
    return _packed(setting, arrays), arrays


def _bwd(setting, arrays, y_bar):
    bars, sums = _run("backward", setting, arrays | {"y_bar": y_bar})
    return (bars | sums,)


_packed.defvjp(_fwd, _bwd)


def _run(direction: str, setting: _Setting, arrays: dict[str, jax.Array]) -> tuple:
    """Runs `direction` of the kernel: y, or gradients of the packs, and of the parameters, summed over the examples."""
    width, eps, taps, packs, where = setting

    def by(interpret: bool):
        kernel = _kernel()

        def run(examples):
            plan = kernel.plan(examples, width, eps, taps, packs)
            found = getattr(kernel, direction)(plan, interpret, examples)
            if direction == "forward":
                return found, {}
            sums = {name: jnp.sum(bars, axis=0) for name, bars in found.items() if name not in packs}
            bars = {pack: found[pack] for pack in packs}
            pack, index = plan.place("k")
            sums["table"] = jnp.sum(bars[pack][:, :, index], axis=0, keepdims=True, dtype=sums["s"].dtype)
            return bars, sums

        return run

    makers = {"cuda": lambda: by(False), "default": lambda: by(True)}
    return where.run(makers, arrays, replicated=frozenset(arrays) - {*packs, "y_bar"})


def _kernel() -> types.ModuleType:
    """Imported where it is needed: importing Pallas takes a while."""
    from polaformer_jax.models.kernels.polarity import packed_gpu

    return packed_gpu
