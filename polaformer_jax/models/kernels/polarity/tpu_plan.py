"""How the TPU kernel of the fused attention lays out and cuts its arrays: shapes only, no arithmetic.

A TPU keeps arrays in tiles of 128 lanes, the last axis, by 16 sublanes (of 2 bytes; 8 of 4). What fills no whole tile
is padded: 96 channels along the lanes take the room of 128. Tokens are there instead where that takes less.
"""

import math

import jax
from jax.experimental import pallas as pl

from polaformer_jax.models.kernels import placement
from polaformer_jax.models.kernels.polarity.blocks import Plan
from polaformer_jax.models.kernels.polarity.taps import Taps

LANES = 128  # the last axis of a register, and the side of the matrix unit
SUBLANES = 16  # the axis before it, of 2 bytes
BLOCK = 512 * LANES  # the most elements of a block; about thirty blocks are in memory at a time
LARGEST_GROUP = 384  # channels; about twenty matrices of this side are in memory at a time
WHOLE = 32 * 2**20  # bytes of a core's memory that all tokens of an example may take
OF_A_STEP = 16 * 2**20  # bytes for what a step computes
OF_BLOCKS = 7 * 2**20  # bytes that blocks of `BLOCK` elements take, of 4 bytes each
SMALL_MEMORY = ("TPU v2", "TPU v3", "TPU v4")  # 16 MiB; later devices have at least 64


def supported(channels: int, width: int) -> bool:
    """Whether the matrices of a group of heads fit in a core's memory, however the arrays lie."""
    return group_of(channels, width, tokens=0) <= LARGEST_GROUP


def plan(q: jax.Array, k: jax.Array, width: int, eps: float, masked: bool) -> Plan:
    """For queries (B, N, C) and keys (B, n, C) with heads of `width` channels, masked or not."""
    channels, lengths = q.shape[2], (q.shape[1], k.shape[1])
    tokens = min((0, 1), key=lambda axis: sum(_room(length, channels, axis) for length in lengths))
    group = group_of(channels, width, tokens)
    limit, multiple = BLOCK // _up(group, SUBLANES if tokens else LANES), LANES if tokens else SUBLANES
    query_block = _block(lengths[0], limit, multiple)
    key_block = _block(lengths[1], limit, LANES if masked else multiple)  # a mask's tokens are along the lanes
    cut = Plan.of(q, k, group=group, width=width, query_block=query_block, key_block=key_block, eps=eps, tokens=tokens)
    return cut._replace(whole=_fits(cut, q.dtype.itemsize))


def group_of(channels: int, width: int, tokens: int) -> int:
    """The channels of a block, which are whole heads and divide `channels`; `tokens` is the axis of tokens.

    Along the lanes the fewest that fill registers, otherwise the most up to the side of the matrix unit; or else all.
    """
    size = math.lcm(width, SUBLANES if tokens else LANES)
    if channels % size:
        return channels
    sizes = [n for n in range(size, channels + 1, size) if channels % n == 0]
    return max((n for n in sizes if n <= LANES), default=size)


def convolves(plan: Plan) -> bool:
    """Whether the kernel can compute the convolution of the values: it needs all tokens, along the lanes."""
    return plan.whole and plan.tokens == 1 and plan.queries == plan.keys


def tap_lanes(taps: Taps) -> int:
    """Lanes for one number of each tap and five more."""
    return _up(taps.count + 5, LANES)


def _up(length: int, multiple: int) -> int:
    return pl.cdiv(length, multiple) * multiple


def _room(length: int, channels: int, tokens: int) -> int:
    """Elements that so many tokens take, with padding, where `tokens` is their axis of two."""
    sublanes, lanes = (channels, length) if tokens else (length, channels)
    return _up(sublanes, SUBLANES) * _up(lanes, LANES)


def _block(tokens: int, limit: int, multiple: int) -> int:
    """Tokens of a block: all, or the largest tileable divisor, or, if that is small, about equal parts."""
    if tokens <= limit:
        return tokens
    largest = max(limit // multiple, 1) * multiple
    divisor = next((size for size in range(largest, 0, -multiple) if tokens % size == 0), 0)
    if divisor >= largest // 2:
        return divisor
    even = pl.cdiv(tokens, pl.cdiv(tokens, largest))
    return _up(even, multiple)


def bytes_at_once(plan: Plan, size: int) -> int:
    """What the arrays of an example, of `size` bytes an element, take in memory while the next one's are being read."""
    queries, keys = (_room(length, plan.group, plan.tokens) for length in (plan.queries, plan.keys))
    # q, g, u and y_bar, the gradients of q and g; k, v and w, the gradients of k and v, and the table in float32.
    return 2 * size * (6 * queries + 5 * keys) + 2 * 4 * keys


def memory_limit(plan: Plan, size: int) -> int | None:
    """Bytes of memory for a kernel that reads all tokens at once; None where the compiler's own limit will do.

    No more than it needs: in the rest XLA keeps arrays that would otherwise go to the device's memory and back.
    """
    needed = bytes_at_once(plan, size)
    if not plan.whole or needed <= OF_BLOCKS:
        return None
    if not convolves(plan):
        return needed + OF_A_STEP
    # About twelve arrays of float32, of the channels that are convolved at a time.
    channels = plan.group if plan.group % SUBLANES else SUBLANES
    return needed + max(OF_A_STEP, OF_A_STEP // 2 + 12 * 4 * _room(plan.keys, channels, plan.tokens))


def _fits(plan: Plan, size: int) -> bool:
    """Whether all tokens of an example are in a core's memory at once.

    They may be where they are one block; otherwise they are where memory is large enough.
    """
    if plan.query_blocks == plan.key_blocks == 1:
        return True
    return not placement.device_kind().startswith(SMALL_MEMORY) and bytes_at_once(plan, size) <= WHOLE
