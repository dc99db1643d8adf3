"""Softmax attention within windows in one kernel, there and back: scores and their gradients never leave the chip.

As whole arrays scores have rows of as many numbers as a window has tokens, 49 in windows of 7 by 7, which a TPU's
memory pads to 128; so it does the 32 channels of a head where heads are an axis. The kernel takes queries, keys and
values as the linear layer leaves them, one array whose last axis is 3C, and returns its gradient as such an array.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np

from polaformer_jax.models.kernels import placement
from polaformer_jax.models.kernels.placement import Placement

FEWEST_IMAGES = 8  # on a device: of fewer, memory would hold tiles that are mostly padding

_WITHOUT_BATCH = frozenset(("bias", "mask"))


def supports(qkv: jax.Array, heads: int) -> bool:
    """Whether the kernel can be told to run for `qkv` (B, windows, n, 3C): on TPUs with enough memory, and on CPUs.

    Some heads together have to fill registers of 128 lanes.
    """
    tpu, channels = _kernel(), qkv.shape[3] // 3
    if channels % heads or tpu.group_of(channels, heads) is None:
        return False
    if placement.interprets():
        return True
    return placement.for_tpu() and placement.compiles(qkv.dtype) and tpu.fits(_plan(qkv, heads))


def usable(qkv: jax.Array, heads: int) -> bool:
    """Whether "auto" may choose the kernel for `qkv` (B, windows, n, 3C), which it does only on a TPU.

    A device has to have some images: see also `supports`.
    """
    return placement.for_tpu() and _images(qkv) >= FEWEST_IMAGES and supports(qkv, heads)


def window_attention(
    qkv: jax.Array, bias: jax.Array, *, mask: np.ndarray | None = None, on_tpu: bool = False
) -> jax.Array:
    """softmax(q k^T / √d + bias + mask) v of each window and head, d = C/h.

    It has gradients, but no forward mode.

    Args:
        qkv: (B, windows, n, 3C), queries, keys and values, whose channels are those of one head after another.
            `supports` says which C and h are possible.
        bias: (h, n, n) in the dtype of sums, `accumulation_dtype`.
        mask: (windows, n, n), added to the scores; -inf, if not in all of a row, is allowed.
        on_tpu: whether only a TPU will run it, which makes it faster to trace.

    Returns:
        (B, windows, n, C) in the dtype of `qkv`. Where a mesh is set, the batch is sharded over its devices if it
        divides evenly.
    """
    arrays = {"qkv": qkv, "bias": bias}
    if mask is not None:
        arrays["mask"] = jnp.asarray(mask, bias.dtype)
    return _fused(Placement.here(on_tpu), arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(where: Placement, arrays: dict[str, jax.Array]) -> jax.Array:
    return _run("forward", where, arrays)[0]


def _fwd(where, arrays):
    return _fused(where, arrays), arrays


def _bwd(where, arrays, y_bar):
    qkv_bar, bias_bar = _run("backward", where, arrays | {"y_bar": y_bar})
    return (dict.fromkeys(arrays) | {"qkv": qkv_bar, "bias": bias_bar},)  # None, no gradient, for the mask


_fused.defvjp(_fwd, _bwd)


def _images(qkv: jax.Array) -> int:
    """The images of a device."""
    images, devices = qkv.shape[0], Placement.here(only_tpu=True).devices
    return images // devices if images % devices == 0 else images


def _plan(qkv: jax.Array, heads: int):
    """How the kernel of TPUs cuts what a device has of `qkv` (B, windows, n, 3C)."""
    _, windows, n, channels = qkv.shape
    return _kernel().Plan.of(jax.ShapeDtypeStruct((n, windows, _images(qkv), channels), qkv.dtype), heads)


def _run(direction: str, where: Placement, arrays: dict[str, jax.Array]):
    """Runs `direction` of the kernel, whose arrays have the axis of images next to that of channels."""

    def by(interpret: bool):
        run = getattr(_kernel(), direction)

        def on_images(arrays):
            arrays = {name: x if name in _WITHOUT_BATCH else jnp.swapaxes(x, 0, 2) for name, x in arrays.items()}
            result, sums = run(arrays, interpret)
            return jnp.swapaxes(result, 0, 2), sums

        return on_images

    makers = {"tpu": lambda: by(False), "default": lambda: by(True)}
    return where.run(makers, arrays, replicated=_WITHOUT_BATCH)


def _kernel() -> types.ModuleType:
    """Imported where it is needed: importing Pallas takes a while."""
    from polaformer_jax.models.kernels.windows import tpu

    return tpu
