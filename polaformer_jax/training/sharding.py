"""Where arrays are placed: one mesh of devices with two axes, and one rule for each kind of array.

A batch is split over both axes, `data` and `fsdp`. Parameters, and arrays of their shapes (the optimizer's moments,
the moving average), are replicated along `data` and split along `fsdp` (Zhao et al., "PyTorch FSDP", arXiv 2304.11277):
the step gathers the parameters that it uses, and each device updates its own shard.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from polaformer_jax.errors import UserError

# Smaller arrays are not worth a collective of their own: they are replicated.
LEAST_SPLIT = 2**14  # elements


def make_mesh(config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of the config's `mesh` part: `data` rows of `fsdp` devices.

    Args:
        devices: those to choose from; None: all devices.

    Raises:
        UserError: the mesh does not fit the number of devices.
    """
    given = None if devices is None else list(devices)
    available = jax.device_count() if given is None else len(given)
    fsdp, data = config.fsdp, config.data
    if not 1 <= fsdp <= available:
        raise UserError(f"mesh.fsdp={fsdp}, but there are {available} devices: give 1 to {available}")
    if data == -1:
        if available % fsdp:
            raise UserError(f"mesh.fsdp={fsdp} does not divide the {available} devices: set mesh.data, or another fsdp")
        data = available // fsdp
    if not 1 <= data * fsdp <= available:
        raise UserError(
            f"mesh.data={data}, mesh.fsdp={fsdp}, but there are {available} devices:"
            f" give mesh.data 1 to {available // fsdp}, or -1 for all"
        )
    chosen = (jax.devices() if given is None else given)[: data * fsdp]
    # Auto: the compiler places intermediate results. (The default, Explicit, refuses gathers along a sharded axis.)
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=chosen)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis of every array of a batch is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def state_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Sharding of an array of the training state: over `fsdp` along its largest divisible axis, unless it is small.

    The rule depends on the shape only, so that a parameter, its moments and its average have the same sharding.
    """
    parts = mesh.shape["fsdp"]
    divisible = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or math.prod(shape) < LEAST_SPLIT or not divisible:
        return replicated(mesh)
    largest = max(divisible, key=lambda axis: shape[axis])  # the first of equals
    return NamedSharding(mesh, PartitionSpec(*(None,) * largest, "fsdp"))


def state_shardings(tree: Any, mesh: Mesh) -> Any:
    """The shardings of a training state, or of a part of one."""
    return jax.tree.map(lambda leaf: state_sharding(leaf.shape, mesh), tree)


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Shapes and dtypes with shardings: `shardings` is a pytree like `abstract`, or one sharding for all leaves."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, abstract)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)


def sharded(abstract: Any, mesh: Mesh) -> Any:
    """The shapes and dtypes of a training state, or of a part of one, with their shardings."""
    return with_shardings(abstract, state_shardings(abstract, mesh))


def place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Places a host array, which every process has, on the devices; each device receives only its own shard."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def check_batch(batch_size: int, mesh: Mesh, name: str) -> None:
    """Raises a UserError unless the batch divides evenly over the devices of both axes."""
    if batch_size % mesh.size:
        nearest = batch_size // mesh.size * mesh.size
        choices = [str(b) for b in (nearest, nearest + mesh.size) if b]
        raise UserError(
            f"{name}={batch_size} cannot be split evenly over {mesh.size} devices:"
            f" take {' or '.join(choices)}, or another number of devices (mesh.data, mesh.fsdp)"
        )


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's part of a batch as global arrays, split over the mesh."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


class Constraints:
    """Sharding constraints inside a step, without which the compiler might move activations rather than parameters.

    Without a mesh there are no constraints.
    """

    def __init__(self, mesh: Mesh | None):
        self._mesh = mesh

    def known(self) -> contextlib.AbstractContextManager:
        """Sets the mesh, for code that is not an XLA operation and has to split its work by itself."""
        return contextlib.nullcontext() if self._mesh is None else use_abstract_mesh(self._mesh.abstract_mesh)

    def whole(self, tree: Any) -> Any:
        """Parameters as the model uses them: replicated."""
        return tree if self._mesh is None else jax.lax.with_sharding_constraint(tree, replicated(self._mesh))

    def split(self, tree: Any) -> Any:
        """Gradients as they are applied: sharded like the parameters."""
        if self._mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, state_shardings(tree, self._mesh))

    def batch(self, tree: Any) -> Any:
        """Arrays of a batch: each device has its own examples."""
        return tree if self._mesh is None else jax.lax.with_sharding_constraint(tree, batch_sharding(self._mesh))
