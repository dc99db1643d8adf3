"""Where arrays live: one mesh over all devices, the batch split along it, the state copied to each."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from polaformer_jax.errors import UserError


def make_mesh(config) -> Mesh:
    """The mesh of the config's `mesh` part, with the one axis `data`.

    Raises:
      UserError: more devices are asked for than there are.
    """
    available = jax.device_count()
    size = available if config.data == -1 else config.data
    if not 1 <= size <= available:
        raise UserError(f"mesh.data={config.data}, but there are {available} devices: give 1 to that, or -1 for all")
    # Auto: the compiler places intermediate results. (The default, Explicit, refuses gathers along a sharded axis.)
    return jax.make_mesh((size,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:size])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis of every array of a batch is split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch(batch_size: int, mesh: Mesh, name: str) -> None:
    """Raises a UserError unless the batch divides evenly over the devices."""
    if batch_size % mesh.size:
        nearest = batch_size // mesh.size * mesh.size
        choices = [str(b) for b in (nearest, nearest + mesh.size) if b]
        raise UserError(
            f"{name}={batch_size} cannot be split evenly over {mesh.size} devices:"
            f" take {' or '.join(choices)}, or another number of devices (mesh.data)"
        )


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's part of a batch as global arrays, split over the mesh."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def with_shardings(abstract: Any, sharding: jax.sharding.Sharding) -> Any:
    """The tree of shapes and dtypes, every leaf to be placed by `sharding`."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract)
