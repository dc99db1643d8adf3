"""A function of a state and a batch, compiled ahead of time once for each shape of batch that is met."""

import math
import time
from collections.abc import Mapping
from typing import Any

import jax

from polaformer_jax.training.progress import log


def shapes(batch: Mapping[str, Any]) -> tuple:
    """What tells batches apart that need programs of their own."""
    return tuple((name, leaf.shape) for name, leaf in sorted(batch.items()))


def abstract(batch: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a batch, or of such a description."""
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in batch.items()}


class CompiledByShape:
    """Calls the program for the batch's shapes, which is compiled when such a batch is first met, and said so.

    Images have one shape; sequences come in a few lengths, most of them soon after the start.

    Args:
      function: what `jax.jit` returned, a function of (first, batch).
      abstract: shapes, dtypes and shardings of the first argument.
      name: for messages.
      options: for the compiler.
      compiled: whether the compiled program is what is called; if not, it is the function itself, which JAX can take
        apart to look for a NaN.
    """

    def __init__(
        self, function, abstract: Any, name: str, options: dict[str, Any] | None = None, *, compiled: bool = True
    ):
        self._function, self._abstract, self.name, self._options = function, abstract, name, options
        self._compiled = compiled
        self._programs: dict[tuple, jax.stages.Compiled] = {}

    def __call__(self, first: Any, batch: Mapping[str, jax.Array]) -> Any:
        return (self.program(batch) if self._compiled else self._function)(first, batch)

    def program(self, batch: Mapping[str, Any]) -> jax.stages.Compiled:
        """The program for batches like this one, or like this description of one (`jax.ShapeDtypeStruct`)."""
        key = shapes(batch)
        if key not in self._programs:
            began = time.monotonic()
            self._programs[key] = self._function.lower(self._abstract, abstract(batch)).compile(self._options)
            name, leaf = max(batch.items(), key=lambda item: math.prod(item[1].shape))
            log.info("compiled the %s for %s %s in %.1f s", self.name, name, leaf.shape, time.monotonic() - began)
        return self._programs[key]
