"""Polarity attention in one kernel: one pass over keys and values, one over queries, gates and convolved values.

Powers, products and quotients, which `models.attention` computes as whole arrays that go to memory and back, are
computed here block by block. The sums over keys never leave the chip, and the backward pass recomputes them and the
feature maps.
"""

import functools
import importlib.util
import math
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp

from polaformer_jax.models.depthwise import of_all_heads, rounded_depthwise_conv, upsample_tokens
from polaformer_jax.models.kernels import placement
from polaformer_jax.models.kernels.placement import Placement
from polaformer_jax.models.kernels.polarity.taps import Taps

_WITHOUT_BATCH = frozenset(("table", "s", "p", "weights", "offset"))


def chosen(implementation: str, q: jax.Array, width: int) -> bool:
    """Whether `implementation` ("auto", "xla", "pallas") means the kernel, for queries (B, N, C)."""
    if implementation == "xla" or q.shape[1] == 1:  # for one token there is nothing to fuse
        return False
    if implementation == "auto" and not placement.for_tpu():
        return False
    return supports(q, width)


def supports(q: jax.Array, width: int) -> bool:
    """Whether the kernel can be told to run for heads of this width: on TPUs, on GPUs if they have one, and on CPUs."""
    if placement.interprets():
        return True
    if not placement.compiles(q.dtype):
        return False
    if placement.for_gpu():
        return _kernel_of_gpus(width) is not None
    return placement.for_tpu() and _kernel_of_tpus().supported(q.shape[2], width)


def has_kernel(platform: str, width: int) -> bool:
    """Whether a platform, as `jax.default_backend` names it, has a kernel for heads of this width."""
    return platform == "tpu" or (platform == "gpu" and _kernel_of_gpus(width) is not None)


def fused_attention(
    arrays: dict[str, jax.Array], *, grid: tuple[int, ...], width: int, eps: float, on_tpu: bool = False
) -> jax.Array:
    """y of `polarity_attention`, ([o1, o2] + conv(v)) * g.

    Args:
        arrays: q, g: (B, N, C). k, v: (B, n, C), all in one dtype, that of the products. kernel, bias: of the
            convolution. table: (1, n, C), added to the keys. s, p: (1, C), at least float32.
            count: (B, 1, 1), the number of valid keys, in the dtype of s. mask (optional): (B, 1, n), zero at masked
            keys, whose values are zero.
        grid: how the N tokens are arranged, for the convolution.
        width: channels of a head, d.
        eps: added to the denominators.
        on_tpu: whether only a TPU will run it, which makes it faster to trace.

    Returns:
        (B, N, C) in the dtype of `q`. Where a mesh is set, the batch is sharded over its devices if it divides evenly.
    """
    return _fused(Setting.of(arrays, grid=grid, width=width, eps=eps, on_tpu=on_tpu), arrays)


class Setting(NamedTuple):
    """Everything that a program of the kernel depends on, except for its arrays; see `fused_attention`."""

    grid: tuple[int, ...]
    taps: Taps
    width: int
    eps: float
    packs: tuple[str, ...]
    placement: Placement

    @classmethod
    def of(
        cls, arrays: dict[str, jax.Array], *, grid, width: int, eps: float, on_tpu: bool, packs=("qkvg",)
    ) -> "Setting":
        """For the arguments of `fused_attention`. `packs`: see `Plan`."""
        return cls(grid, Taps.on(grid, arrays["kernel"].shape[:-2]), width, eps, packs, Placement.here(on_tpu))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(setting: Setting, arrays: dict[str, jax.Array]) -> jax.Array:
    return forward(setting, arrays)[0]


def forward(setting: Setting, arrays: dict[str, jax.Array]) -> tuple[jax.Array, tuple]:
    """y of `fused_attention`, and the residuals for `backward`."""
    if _convolves(setting, arrays):
        return _run("forward", setting, _of_kernel(arrays, _weights(*_of_convolution(arrays)))), (arrays, None)
    u = _convolved(setting, *_of_convolution(arrays))
    return _run("forward", setting, _of_kernel(arrays, {"u": u})), (arrays, u)


def backward(setting: Setting, residuals: tuple, y_bar: jax.Array) -> tuple[dict, dict]:
    """Gradients of q, k, v and g as the kernel left them, which `part` reads; and of the other arrays.

    The latter may have "sums": a dictionary with the sums over examples and tokens of the former, (C,).
    """
    arrays, u = residuals
    full = arrays["s"].dtype
    if u is None:
        v, *parameters = _of_convolution(arrays)
        weights, pull_back = jax.vjp(functools.partial(_weights, v), *parameters)
        found = _run("backward", setting, _of_kernel(arrays, weights) | {"y_bar": y_bar})
        totals, taps = jnp.sum(found.pop("channel_sums"), axis=0), setting.taps.count  # (C, lanes)
        kernel, bias = pull_back({"weights": totals[:, :taps], "offset": totals[:, taps : taps + 1]})
        sums = {"sums": {name: totals[:, taps + 1 + i] for i, name in enumerate("qkvg")}}
    else:
        # First what reaches the values through the convolution, w: the kernel adds it to its own gradients, which it
        # writes once, instead of the gradient of u and sums of both that would go to memory and back.
        u_bar = (y_bar.astype(full) * arrays["g"].astype(full)).astype(u.dtype)
        _, pull_back = jax.vjp(functools.partial(_convolved, setting), *_of_convolution(arrays))
        w, kernel, bias = pull_back(u_bar)
        sums = {}
        found = _run("backward", setting, _of_kernel(arrays, {"u": u}) | {"y_bar": y_bar, "w": w})
    others = {name: jnp.sum(found.pop(name), axis=0) for name in ("s", "p")}
    table = jnp.sum(part(found, "k"), axis=0, keepdims=True, dtype=full).astype(arrays["table"].dtype)
    return found, others | sums | {"kernel": kernel, "bias": bias, "table": table}


def part(bars: dict[str, jax.Array], name: str) -> jax.Array:
    """One of the gradients that a kernel has left in one array, or in several, as (B, N, C)."""
    names = next(names for names in bars if name in names)
    array = bars[names]
    return array if len(names) == 1 else jnp.swapaxes(array[:, names.index(name)], 1, 2)


def _bwd(setting, residuals, y_bar):
    bars, others = backward(setting, residuals, y_bar)
    others.pop("sums", None)
    bars = {name: part(bars, name) for name in "qkvg"} | others
    return (jax.tree.map(jnp.zeros_like, residuals[0]) | bars,)  # zeros for the count and the mask


_fused.defvjp(forward, _bwd)


def _of_convolution(arrays: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
    return arrays["v"], arrays["kernel"], arrays["bias"]


def _convolved(setting: Setting, v: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return rounded_depthwise_conv(upsample_tokens(v, math.prod(setting.grid)), kernel, bias, grid=setting.grid)


def _convolves(setting: Setting, arrays: dict[str, jax.Array]) -> bool:
    """Whether the kernel computes the convolution: that of TPUs, if it can and no other will run."""
    if not setting.placement.only_tpu and _kernel_of_gpus(setting.width) is not None:
        return False
    kernel = _kernel_of_tpus() if setting.placement.only_tpu else _interpreted()
    return kernel.convolves(kernel.plan(arrays["q"], arrays["k"], setting.width, setting.eps, "mask" in arrays))


def _weights(v: jax.Array, kernel: jax.Array, bias: jax.Array) -> dict[str, jax.Array]:
    """The convolution's parameters for all channels of v: weights (C, taps), offset (C, 1), at least float32."""
    kernel, bias = of_all_heads(v, kernel, bias)
    channels = kernel.shape[-1]
    return {"weights": kernel.reshape(-1, channels).T, "offset": bias.reshape(channels, 1)}


def _of_kernel(arrays: dict[str, jax.Array], convolution: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What the kernel takes: `convolution`, the convolved values or weights, in place of the parameters."""
    first = {name: arrays[name] for name in ("q", "k", "v", "g")}
    return (
        first | convolution | {name: array for name, array in arrays.items() if name not in (*first, "kernel", "bias")}
    )


def _run(direction: str, setting: Setting, arrays: dict[str, jax.Array]):
    """Runs `direction` of the kernel: y, or gradients by name. All results have a batch axis."""
    _, taps, width, eps, packs, where = setting

    def by(kernel, interpret: bool):
        plan = kernel.plan(arrays["q"], arrays["k"], width, eps, "mask" in arrays)
        plan = plan._replace(packs=packs, taps=taps if "weights" in arrays else None)

        def run(examples):
            found = getattr(kernel, direction)(plan, interpret, examples)
            if direction == "backward" and not where.only_tpu:  # all kernels have to return the same arrays
                others = {name: found.pop(name) for name in tuple(found) if not set(name) <= set("qkvg")}
                found = {name: part(found, name) for name in "qkvg"} | others
            return found, ()

        return run

    makers = {"tpu": lambda: by(_kernel_of_tpus(), False), "default": lambda: by(_interpreted(), True)}
    if not where.only_tpu and (gpu := _kernel_of_gpus(width)) is not None:
        makers["cuda"] = lambda: by(gpu, False)
    return where.run(makers, arrays, replicated=_WITHOUT_BATCH)[0]


# Imported where they are needed: importing Pallas takes a while.


def _kernel_of_tpus() -> types.ModuleType:
    from polaformer_jax.models.kernels.polarity import tpu

    return tpu


def _interpreted() -> types.ModuleType:
    """The kernel that is interpreted on devices that have none of their own."""
    return _kernel_of_tpus()


def _kernel_of_gpus(width: int) -> types.ModuleType | None:
    """The kernel of GPUs; None if it does not support this width, or jax has no Triton (deprecated since 0.11)."""
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return None
    from polaformer_jax.models.kernels.polarity import gpu

    return gpu if gpu.has_width(width) else None
