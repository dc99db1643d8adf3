"""Blocks of tokens in kernels that are written for Triton: what is loaded and stored, and what lies beyond an array."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


class Part:
    """Part `index` of an axis; beyond the end of the axis the last part reads zeros and writes nothing.

    `of` and `set` take a reference on whose first axis the part lies. What follows are parts of its next axes, or
    numbers; axes that are not named are whole.
    """

    def __init__(self, index, size: int, length: int):
        # A value of the program even where the index is a number: since jax 0.12 no slice may be known to end beyond an
        # array, whatever its mask.
        start = jax.lax.mul(_integer(index), _integer(size))
        self.at = pl.ds(start, size)
        self.indices = start + jax.lax.broadcasted_iota(jnp.int32, (size,), 0)
        self.inside = self.indices < length

    def of(self, ref, *rest) -> jax.Array:
        part, mask = self._place(ref, rest)
        return plgpu.load(part, mask=mask, other=0)

    def set(self, ref, value: jax.Array, *rest) -> None:
        part, mask = self._place(ref, rest)
        plgpu.store(part, value.astype(ref.dtype), mask=mask)

    def _place(self, ref, rest):
        part = ref.at[tuple(one.at if isinstance(one, Part) else _integer(one) for one in (self, *rest))]
        mask, parts = jnp.ones(part.shape, bool), [one for one in (self, *rest) if isinstance(one, Part)]
        for axis, one in enumerate(parts):
            shape = [1] * len(part.shape)
            shape[axis] = -1
            mask &= jnp.broadcast_to(one.inside.reshape(shape), part.shape)
        return part, mask


def gathered(ref, tokens: jax.Array, there: jax.Array, *rest) -> jax.Array:
    """Rows `tokens` (T,) of a reference whose last axis has C entries: (T, C), zeros where `there` (T,) is False.

    All tokens have to lie within the array, also those that are not there.
    """
    shape = (*tokens.shape, ref.shape[-1])
    columns = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    part = ref.at[(along(tokens, shape), *map(_integer, rest), columns)]
    return plgpu.load(part, mask=along(there, shape), other=0)


def along(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One value for each token, (T,), repeated over a block's other axis."""
    return jnp.broadcast_to(values[:, None], shape)


def _integer(index):
    """An index or the start of a slice: the interpreter takes no Python numbers, and all of them in one type."""
    dtype = jnp.result_type(int)
    return dtype.type(index) if isinstance(index, int) else index.astype(dtype)
