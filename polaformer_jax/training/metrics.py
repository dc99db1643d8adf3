"""Metrics as (sum, count) pairs: added up anywhere, divided once, at the end, on the host."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

Sums = Mapping[str, tuple[jax.Array, jax.Array]]


def masked(values: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum of the values (B,) where the mask (B,) is True, and how many those are, in float32 or wider.

    A masked value may be anything, NaN included.
    """
    dtype = jnp.promote_types(values.dtype, jnp.float32)
    return jnp.sum(jnp.where(mask, values, 0).astype(dtype)), jnp.sum(mask.astype(dtype))


class Mean:
    """Adds up sums and counts in double precision."""

    def __init__(self):
        self._sums: dict[str, np.ndarray] = {}

    def add(self, sums: Mapping[str, tuple[float, float]]) -> None:
        for name, pair in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + np.asarray(pair, np.float64)

    def result(self) -> dict[str, float]:
        """The means, `nan` where nothing was counted."""
        return {name: float(total / count) if count else float("nan") for name, (total, count) in self._sums.items()}

    def sums(self) -> dict[str, list[float]]:
        """[sum, count] of each metric; `add` takes them back without loss."""
        return {name: [float(value) for value in pair] for name, pair in self._sums.items()}

    def count(self, name: str) -> int:
        """How many examples went into a metric."""
        return int(self._sums[name][1]) if name in self._sums else 0
