"""The second half of a pre-norm block in one kernel: x + keep * fc2(gelu(fc1(LayerNorm(x)))).

The hidden activations, several times as large as x, never go to memory, nor does the normalised x. The backward pass
computes them again, and sums the gradients of the parameters over all tokens on the chip.
"""

import functools
import importlib.util
import math
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp

from polaformer_jax.models.dtypes import accumulation_dtype
from polaformer_jax.models.kernels import placement
from polaformer_jax.models.kernels.placement import Placement

FEWEST_TOKENS = 128  # for which "auto" chooses the kernel
_PARAMETERS = frozenset(("gamma", "beta", "w1", "b1", "w2", "b2"))


def usable(x: jax.Array, hidden: int) -> bool:
    """Whether "auto" may choose the kernel for tokens (B, N, C), which it does only on a TPU.

    It has to be known how the batch is sharded, and the kernel has to fit in a core's memory. Only for 16 bits has it
    been shown to save memory traffic; and a block, of one example, has to have enough tokens to be worth loading the
    matrix unit with all parameters.
    """
    if not placement.sharding_is_known() or not placement.for_tpu():
        return False
    return x.dtype.itemsize == 2 and x.shape[1] >= FEWEST_TOKENS and _kernel_of_tpus().fits(x, hidden)


def supports(x: jax.Array, hidden: int) -> bool:
    """Whether the kernel can be told to run: on TPUs with enough memory, on GPUs for few channels, and on CPUs."""
    if placement.interprets():
        return True
    if not placement.compiles(x.dtype):
        return False
    if placement.for_gpu():
        return _kernel_of_gpus(x.shape[2]) is not None
    return placement.for_tpu() and _kernel_of_tpus().fits(x, hidden)


@functools.partial(jax.jit, static_argnames=("eps", "on_tpu"))  # traced once for all blocks of one shape
def fused_mlp(arrays: dict[str, jax.Array], *, eps: float, on_tpu: bool = False) -> jax.Array:
    """x + keep * fc2(gelu(fc1(LayerNorm(x)))), with the exact GELU.

    Products are in the dtype of x, everything else at least in float32. The gradients of the parameters are summed in
    at least float32. There are gradients only: no forward-mode differentiation, no gradients of gradients.

    Args:
        arrays: x: (B, N, C). keep: (B, 1, 1), the factor of each example's branch: 0 if it is dropped. It has no
            gradient. gamma, beta: (C,), of the LayerNorm. w1: (C, H). b1: (H,). w2: (H, C). b2: (C,). The parameters
            in any dtype, that of their gradients.
        eps: added to the variance.
        on_tpu: whether only a TPU will run it, which makes it faster to trace. Then it is the kernel where gradients
            are taken, and operations where they are not: these move fewer bytes.

    Returns:
        (B, N, C) in the dtype of x. Where a mesh is set, the batch is sharded over its devices if it divides evenly.
    """
    return _fused(_Setting(eps, Placement.here(on_tpu)), arrays)


class _Setting(NamedTuple):
    """Everything that a program of the kernel depends on, except for its arrays; see `fused_mlp`."""

    eps: float
    placement: Placement


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(setting: _Setting, arrays: dict[str, jax.Array]) -> jax.Array:
    """Without gradients. XLA's programs for TPUs then keep the hidden activations on the chip by themselves."""
    return _by_operations(setting.eps, arrays) if setting.placement.only_tpu else _run("forward", setting, arrays)[0]


def _by_operations(eps: float, arrays: dict[str, jax.Array]) -> jax.Array:
    x, keep = arrays["x"], arrays["keep"]
    w1, w2 = (arrays[name].astype(x.dtype) for name in ("w1", "w2"))
    gamma, beta, b1, b2 = (arrays[name].reshape(1, 1, -1) for name in ("gamma", "beta", "b1", "b2"))
    full = x.astype(keep.dtype)
    centred = full - jnp.mean(full, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    normed = (centred * (jax.lax.rsqrt(variance + eps) * gamma) + beta).astype(x.dtype)
    hidden = (normed @ w1 + b1.astype(x.dtype)).astype(keep.dtype)
    activations = (hidden * (0.5 * (1 + jax.lax.erf(hidden * math.sqrt(0.5))))).astype(x.dtype)
    branch = activations @ w2 + b2.astype(x.dtype)
    return x + jnp.where(keep == 0, 0, keep * branch).astype(x.dtype)


def _fwd(setting, arrays):
    return _run("forward", setting, arrays)[0], arrays


def _bwd(setting, arrays, y_bar):
    x_bar, sums = _run("backward", setting, arrays | {"y_bar": y_bar})
    bars = {name: total.astype(arrays[name].dtype) for name, total in sums.items()}
    return ({"x": x_bar, "keep": jnp.zeros_like(arrays["keep"]), **bars},)


_fused.defvjp(_fwd, _bwd)


def _run(direction: str, setting: _Setting, arrays: dict[str, jax.Array]):
    """Runs `direction` of the kernel: its result by example, and its sums over the batch."""
    x = arrays["x"]
    full = accumulation_dtype(x.dtype)
    dtypes = {**dict.fromkeys(arrays, full), **dict.fromkeys(("x", "y_bar", "w1", "w2"), x.dtype)}
    typed = {name: array.astype(dtypes[name]) for name, array in arrays.items()}

    def by(kernel, interpret: bool):
        def run(arrays):
            plan = kernel.plan(arrays["x"], arrays["w1"].shape[1], setting.eps)
            results = getattr(kernel, direction)(plan, interpret, arrays)
            return results if direction == "backward" else (results, ())

        return run

    makers = {"tpu": lambda: by(_kernel_of_tpus(), False), "default": lambda: by(_interpreted(), True)}
    if not setting.placement.only_tpu and (gpu := _kernel_of_gpus(x.shape[2])) is not None:
        makers["cuda"] = lambda: by(gpu, False)
    return setting.placement.run(makers, typed, replicated=_PARAMETERS)


# Imported where they are needed: importing Pallas takes a while.


def _kernel_of_tpus() -> types.ModuleType:
    from polaformer_jax.models.kernels.mlp import tpu

    return tpu


def _interpreted() -> types.ModuleType:
    """The kernel that is interpreted on devices that have none of their own."""
    return _kernel_of_tpus()


def _kernel_of_gpus(channels: int) -> types.ModuleType | None:
    """The kernel of GPUs; None if it does not support that many channels, or jax has no Triton (see `polarity`)."""
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return None
    from polaformer_jax.models.kernels.mlp import gpu

    return gpu if gpu.has_channels(channels) else None
