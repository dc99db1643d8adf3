"""What one process wishes, all processes do, at the same step."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from polaformer_jax.training import sharding


class Agreement:
    """The greatest of all processes' wishes.

    Called by all processes alike, at each step. Of several processes, the wishes go through the devices, behind the
    work that is under way there; so that nobody waits for them, the answer is that to the question before. One process
    agrees with itself at once.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._greatest = jax.jit(jnp.max, out_shardings=sharding.replicated(mesh))
        self._asked: list[jax.Array] = []

    def __call__(self, wish: int) -> int:
        """Asks; of several processes, gives the answer to the question before, 0 at first."""
        if jax.process_count() == 1:
            return wish
        self._asked.append(self._send(wish))
        return int(self._asked.pop(0)) if len(self._asked) > 1 else 0

    def now(self, wish: int) -> int:
        """The answer to this very question; all processes wait for each other."""
        return wish if jax.process_count() == 1 else int(self._send(wish))

    def _send(self, wish: int) -> jax.Array:
        local = np.full(len(self._mesh.local_devices), wish, np.int32)
        return self._greatest(jax.make_array_from_process_local_data(sharding.batch_sharding(self._mesh), local))
