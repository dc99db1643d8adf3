"""The depthwise convolution of the values within the TPU kernel, where tokens are along the lanes.

All tokens of an example are in the core's memory, row by row of their map: a neighbour is so many lanes away. Values
are moved along the lanes by each column of the convolution's kernel, products are added up by rows, and sums moved by
each row: eight moves for 5 x 5 taps. So the convolved values and their gradients never go to memory, nor does XLA
change layouts for a convolution of its own. The channels are computed some at a time.

Arrays are (R, L): R channels by L lanes, of which the first N hold tokens and the others are zero, at least float32.
Weights are (R, T), a column for each tap.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from polaformer_jax.models.kernels.polarity.taps import Taps

ROWS = 16  # channels at a time: a tile of 2-byte elements


def convolved(taps: Taps, x: jax.Array, weights: jax.Array, *, transposed: bool = False) -> jax.Array:
    """The convolution of x, or its transpose, for gradients. What it has at lanes without tokens is to be ignored."""
    columns = [_moved_columns(taps, x, -right if transposed else right) for right in _offsets(taps.sizes[1])]
    total = jnp.zeros_like(x)
    for row, down in enumerate(_offsets(taps.sizes[0])):
        first = row * taps.sizes[1]
        line = sum(columns[i] * weights[:, first + i : first + i + 1] for i in range(taps.sizes[1]))
        total = total + _moved_rows(taps, line, -down if transposed else down)
    return total


def weight_bars(taps: Taps, x: jax.Array, y_bar: jax.Array, lanes: int) -> jax.Array:
    """Gradients of the weights from that of the convolution's result, (R, lanes): one lane a tap, the others zero."""
    columns = [_moved_columns(taps, x, right) for right in _offsets(taps.sizes[1])]
    lane = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], lanes), 1)
    total = jnp.zeros((x.shape[0], lanes), x.dtype)
    for row, down in enumerate(_offsets(taps.sizes[0])):
        bars = _moved_rows(taps, y_bar, -down)
        for i, column in enumerate(columns):
            total = jnp.where(lane == row * taps.sizes[1] + i, jnp.sum(column * bars, axis=1, keepdims=True), total)
    return total


def by_channels(channels: int, body: Callable[[slice], None]) -> None:
    """Calls `body` for all channels of a block, some at a time."""
    if channels % ROWS:
        body(slice(None))
        return

    @pl.loop(0, channels // ROWS)
    def _(i):
        body(pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS))


def _offsets(size: int) -> Iterator[int]:
    return range(-(size // 2), size // 2 + 1)


def _moved_columns(taps: Taps, x: jax.Array, right: int) -> jax.Array:
    """At each token the value that is `right` columns further on its map, zero beyond the map."""
    width = taps.grid[1]
    if right == 0:
        return x
    if abs(right) >= width:
        return jnp.zeros_like(x)
    token = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    column = jax.lax.rem(token, np.int32(width)) + right
    return jnp.where((column >= 0) & (column < width), _moved(x, right), 0)


def _moved_rows(taps: Taps, x: jax.Array, down: int) -> jax.Array:
    """At each token the value that is `down` rows further on its map, zero beyond the map."""
    height, width = taps.grid
    if down == 0:
        return x
    if abs(down) >= height:
        return jnp.zeros_like(x)
    token = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) + down * width
    return jnp.where((token >= 0) & (token < height * width), _moved(x, down * width), 0)


def _moved(x: jax.Array, by: int) -> jax.Array:
    """x[:, lane + by] at each lane, around the ends."""
    return pltpu.roll(x, -by % x.shape[1], 1)
