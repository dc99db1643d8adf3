"""Softmax attention within windows in one kernel, there and back: scores and their gradients never leave the chip.

Whole arrays of scores have rows of as many numbers as a window has tokens, 49 in windows of 7 by 7, which a TPU's
memory pads to 128; so does it the 32 channels of a head where heads are an axis. The kernel takes queries, keys and
values as the linear layer leaves them, one array whose last axis is 3C, and returns its gradient as such an array.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np

from polaformer_jax.models.kernels import placement
from polaformer_jax.models.kernels.placement import Placement

_WITHOUT_BATCH = frozenset(("bias", "masks", "kinds"))


def supports(channels: int, heads: int) -> bool:
    """Whether the kernel can compute such an attention: some heads together have to fill registers of 128 lanes."""
    return channels % heads == 0 and _kernel().group_of(channels, heads) is not None


def usable(qkv: jax.Array, heads: int) -> bool:
    """Whether "auto" may choose the kernel for `qkv` (B * windows, n, 3C), which it does only on a TPU.

    Its blocks and the bias have to fit in a core's memory, and it has to be known how the batch is sharded.
    """
    if not placement.sharding_is_known() or not placement.for_tpu():
        return False
    return supports(qkv.shape[2] // 3, heads) and _kernel().fits(qkv, heads)


def window_attention(
    qkv: jax.Array, bias: jax.Array, *, mask: np.ndarray | None = None, on_tpu: bool = False
) -> jax.Array:
    """softmax(q k^T / √d + bias + mask) v of each window and head, d = C/h.

    It has gradients, but no forward mode.

    Args:
        qkv: (B * windows, n, 3C), queries, keys and values, whose channels are those of one head after another.
            `supports` says which C and h are possible.
        bias: (h, n, n) in the dtype of sums, `accumulation_dtype`.
        mask: (windows, n, n), added to the scores of each window of an image; -inf, if not in all of a row, is allowed.
        on_tpu: whether only a TPU will run it, which makes it faster to trace.

    Returns:
        (B * windows, n, C) in the dtype of `qkv`. Where a mesh is set, images are sharded over its devices if their
        number divides evenly.
    """
    windows, n, _ = qkv.shape
    of_image = 1 if mask is None else mask.shape[0]
    arrays = {"qkv": qkv.reshape(windows // of_image, of_image, n, -1), "bias": bias}
    if mask is not None:
        # Of many windows few differ: those inside, and those at the bottom, at the right, and at both.
        masks, kinds = np.unique(mask.reshape(of_image, -1), axis=0, return_inverse=True)
        arrays["masks"] = jnp.asarray(masks.reshape(-1, n, n), bias.dtype)
        arrays["kinds"] = jnp.asarray(kinds.reshape(-1), jnp.int32)
    return _fused(Placement.here(on_tpu), arrays).reshape(windows, n, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(where: Placement, arrays: dict[str, jax.Array]) -> jax.Array:
    return _run("forward", where, arrays)[0]


def _fwd(where, arrays):
    return _fused(where, arrays), arrays


def _bwd(where, arrays, y_bar):
    qkv_bar, bias_bar = _run("backward", where, arrays | {"y_bar": y_bar})
    return (dict.fromkeys(arrays) | {"qkv": qkv_bar, "bias": bias_bar},)  # None, zeros, for the masks and their kinds


_fused.defvjp(_fwd, _bwd)


def _run(direction: str, where: Placement, arrays: dict[str, jax.Array]):
    """Runs `direction` of the kernel on arrays with an axis of images and one of windows."""

    def by(interpret: bool):
        run = getattr(_kernel(), direction)

        def on_windows(arrays):
            flat = {name: x if name in _WITHOUT_BATCH else x.reshape(-1, *x.shape[2:]) for name, x in arrays.items()}
            result, sums = run(flat, interpret)
            return result.reshape(*arrays["qkv"].shape[:3], -1), sums

        return on_windows

    makers = {"tpu": lambda: by(False), "default": lambda: by(True)}
    return where.run(makers, arrays, replicated=_WITHOUT_BATCH)


def _kernel() -> types.ModuleType:
    """Imported where it is needed: importing Pallas takes a while."""
    from polaformer_jax.models.kernels.windows import tpu

    return tpu
