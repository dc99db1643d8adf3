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

from polaformer_jax.models.depthwise import rounded_depthwise_conv, upsample_tokens
from polaformer_jax.models.kernels import placement
from polaformer_jax.models.kernels.placement import Placement

_WITHOUT_BATCH = frozenset(("table", "s", "p"))


def chosen(implementation: str, tokens: int, channels: int, width: int) -> bool:
    """Whether `implementation` ("auto", "xla", "pallas") means the kernel, for so many query tokens."""
    if implementation == "xla" or tokens == 1:  # for one token there is nothing to fuse
        return False
    return implementation == "pallas" or usable(channels, width)


def usable(channels: int, width: int) -> bool:
    """Whether "auto" may choose the kernel, which it does only on a TPU.

    The kernel has to support such heads, and it has to be known how the batch is sharded.
    """
    if not placement.sharding_is_known() or not placement.for_tpu():
        return False
    return _kernel_of_tpus().supported(channels, width)


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
    return _fused(_Setting(grid, width, eps, Placement.here(on_tpu)), arrays)


class _Setting(NamedTuple):
    """Everything that a program of the kernel depends on, except for its arrays; see `fused_attention`."""

    grid: tuple[int, ...]
    width: int
    eps: float
    placement: Placement


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(setting: _Setting, arrays: dict[str, jax.Array]) -> jax.Array:
    return _fwd(setting, arrays)[0]


def _fwd(setting, arrays):
    u = _convolved(setting, *_of_convolution(arrays))
    return _run("forward", setting, _of_kernel(arrays, u)), (arrays, u)


def _bwd(setting, residuals, y_bar):
    # First what reaches the values through the convolution, w: the kernel adds it to its own gradients, which it writes
    # once, instead of the gradient of u and sums of both that would go to memory and back.
    arrays, u = residuals
    full = arrays["s"].dtype
    u_bar = (y_bar.astype(full) * arrays["g"].astype(full)).astype(u.dtype)
    _, pull_back = jax.vjp(functools.partial(_convolved, setting), *_of_convolution(arrays))
    w, kernel, bias = pull_back(u_bar)
    q, k, v, g, s, p = _run("backward", setting, _of_kernel(arrays, u) | {"y_bar": y_bar, "w": w})
    table = jnp.sum(k, axis=0, keepdims=True, dtype=full).astype(arrays["table"].dtype)
    bars = {"q": q, "k": k, "v": v, "g": g, "kernel": kernel, "bias": bias, "table": table}
    bars |= {"s": jnp.sum(s, axis=0), "p": jnp.sum(p, axis=0)}
    return (jax.tree.map(jnp.zeros_like, arrays) | bars,)  # zeros for the count and the mask


_fused.defvjp(_fwd, _bwd)


def _of_convolution(arrays: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
    return arrays["v"], arrays["kernel"], arrays["bias"]


def _convolved(setting: _Setting, v: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return rounded_depthwise_conv(upsample_tokens(v, math.prod(setting.grid)), kernel, bias, grid=setting.grid)


def _of_kernel(arrays: dict[str, jax.Array], u: jax.Array) -> dict[str, jax.Array]:
    """What the kernel takes: the convolved values in place of the convolution's parameters."""
    first = {name: arrays[name] for name in ("q", "k", "v", "g")}
    return first | {"u": u} | {name: array for name, array in arrays.items() if name not in (*first, "kernel", "bias")}


def _run(direction: str, setting: _Setting, arrays: dict[str, jax.Array]):
    """Runs `direction` of the kernel. All results have a batch axis."""
    _, width, eps, where = setting

    def by(kernel, interpret: bool):
        plan = kernel.plan(arrays["q"], arrays["k"], width, eps, "mask" in arrays)
        run = functools.partial(getattr(kernel, direction), plan, interpret)
        return lambda examples: (run(examples), ())

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
