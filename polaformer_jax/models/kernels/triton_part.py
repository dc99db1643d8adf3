"""Blocks of tokens in kernels that are written for Triton: what is loaded and stored, and what lies beyond an array."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


class Part:
    """Part `index` of an array's tokens; beyond the end of the array the last part reads zeros and writes nothing.

    References have tokens on their first axis. What follows a reference are indices into its next axes.
    """

    def __init__(self, index, size: int, tokens: int):
        self.at = pl.ds(index * size, size)
        self.tokens = index * size + jax.lax.broadcasted_iota(jnp.int32, (size,), 0)
        self.inside = self.tokens < tokens

    def of(self, ref, *rest) -> jax.Array:
        part = ref.at[(self.at, *_integers(rest))]
        return plgpu.load(part, mask=self._mask(part), other=0)

    def set(self, ref, value: jax.Array, *rest) -> None:
        part = ref.at[(self.at, *_integers(rest))]
        plgpu.store(part, value.astype(ref.dtype), mask=self._mask(part))

    def _mask(self, part) -> jax.Array:
        return self.inside if len(part.shape) == 1 else along(self.inside, part.shape)


def gathered(ref, tokens: jax.Array, there: jax.Array, *rest) -> jax.Array:
    """Rows `tokens` (T,) of a reference whose last axis has C entries: (T, C), zeros where `there` (T,) is False.

    All tokens have to lie within the array, also those that are not there.
    """
    shape = (*tokens.shape, ref.shape[-1])
    columns = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    part = ref.at[(along(tokens, shape), *_integers(rest), columns)]
    return plgpu.load(part, mask=along(there, shape), other=0)


def along(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One value for each token, (T,), repeated over a block's other axis."""
    return jnp.broadcast_to(values[:, None], shape)


def _integers(indices: tuple[int, ...]) -> tuple:
    """The interpreter takes no Python numbers, and only one type of integers in an index."""
    return tuple(jnp.result_type(int).type(index) for index in indices)
