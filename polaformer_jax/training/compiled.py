"""A function of a state and a batch, compiled ahead of time once for each shape of batch that is met."""

import math
import time
from typing import Any

import jax

from polaformer_jax.training.progress import log


class CompiledByShape:
    """Calls the program for the batch's shapes, which is compiled when such a batch is first met, and said so.

    Images have one shape; sequences come in a few lengths, most of them soon after the start.

    Args:
      function: what `jax.jit` returned, a function of (first, batch).
      abstract: shapes, dtypes and shardings of the first argument.
      name: for messages.
      options: for the compiler.
    """

    def __init__(self, function, abstract: Any, name: str, options: dict[str, Any] | None = None):
        self._function, self._abstract, self.name, self._options = function, abstract, name, options
        self._programs: dict[tuple, jax.stages.Compiled] = {}

    def __call__(self, first: Any, batch: dict[str, jax.Array]) -> Any:
        return self.program(batch)(first, batch)

    def program(self, batch: dict[str, Any]) -> jax.stages.Compiled:
        """The program for batches like this one, or like this description of one (`jax.ShapeDtypeStruct`)."""
        key = tuple((name, leaf.shape) for name, leaf in sorted(batch.items()))
        if key not in self._programs:
            began = time.monotonic()
            like = {
                name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
                for name, leaf in batch.items()
            }
            self._programs[key] = self._function.lower(self._abstract, like).compile(self._options)
            name, leaf = max(batch.items(), key=lambda item: math.prod(item[1].shape))
            log.info("compiled the %s for %s %s in %.1f s", self.name, name, leaf.shape, time.monotonic() - began)
        return self._programs[key]
