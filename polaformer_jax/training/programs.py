"""Cache of compiled programs, one for each batch shape."""

import math
import time
from collections.abc import Mapping
from typing import Any

import jax

from polaformer_jax.hardware.host_memory import retire_fragments
from polaformer_jax.training.progress import log

AnyBatch = Mapping[str, jax.Array | jax.ShapeDtypeStruct]


def batch_shapes(batch: AnyBatch) -> tuple:
    """The key of a compiled program: names and shapes of a batch's arrays."""
    return tuple((name, leaf.shape) for name, leaf in sorted(batch.items()))


def abstract(batch: AnyBatch) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a batch, which may be abstract already."""
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in batch.items()}


class ProgramCache:
    """Cache of compiled programs by batch shape: compiles and logs on first use.

    Batches of images have one shape; those of sequences have a few lengths, most of which come soon after the start.

    Args:
        function: a jitted function of (first, batch).
        abstract: shapes, dtypes and shardings of the first argument.
        name: for messages.
        options: for the compiler.
        compiled: whether the compiled program is called; if not, the jitted function itself, which JAX can run
            operation by operation to look for a NaN.
    """

    def __init__(
        self, function, abstract: Any, name: str, options: dict[str, Any] | None = None, *, compiled: bool = True
    ):
        self._function, self._abstract, self.name, self._options = function, abstract, name, options
        self._compiled = compiled
        self._programs: dict[tuple, jax.stages.Compiled] = {}

    def __call__(self, first: Any, batch: Mapping[str, jax.Array]) -> Any:
        return (self.program(batch) if self._compiled else self._function)(first, batch)

    def program(self, batch: AnyBatch, options: Mapping[str, Any] | None = None) -> jax.stages.Compiled:
        """The program for batches like this one, which may be abstract (`jax.ShapeDtypeStruct`).

        `options` are for the compiler, besides the cache's own.
        """
        options = {**(self._options or {}), **(options or {})}
        key = (*batch_shapes(batch), *sorted(options.items()))
        if key not in self._programs:
            began = time.monotonic()
            self._programs[key] = self._function.lower(self._abstract, abstract(batch)).compile(options)
            retire_fragments()
            name, leaf = max(batch.items(), key=lambda item: math.prod(item[1].shape))
            log.info("compiled the %s for %s %s in %.1f s", self.name, name, leaf.shape, time.monotonic() - began)
        return self._programs[key]

    def trace(self, batch: AnyBatch) -> jax.stages.Traced:
        """The function traced for batches like this one, not compiled, for any devices."""
        return self._function.trace(self._abstract, abstract(batch))
