"""Where arrays are placed: one mesh of devices with two axes, and one rule for each kind of array.

A batch is split over both axes, `data` and `fsdp`. Parameters, and arrays of their shapes (the optimizer's moments,
the moving average), are replicated along `data` and split along `fsdp` (Zhao et al., "PyTorch FSDP", arXiv 2304.11277):
a step gathers all parameters once, in the dtype of the products, and each device updates its own shard. Blocks whose
activations are recomputed in the backward pass (`model.remat`) gather their own, in both passes: no device holds those
of all blocks then.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
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
    chosen = given[: data * fsdp] if given is not None else _of_all_processes(jax.devices(), data * fsdp)
    # Auto: the compiler places intermediate results. (The default, Explicit, refuses gathers along a sharded axis.)
    return Mesh(arranged(chosen, data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def _of_all_processes(devices: Sequence[jax.Device], count: int) -> list[jax.Device]:
    """So many of the devices: all of them, or as many of each process."""
    if count == len(devices):
        return list(devices)
    owned = _grouped(devices, lambda device: device.process_index)
    share, rest = divmod(count, len(owned))
    if rest or share > min(map(len, owned)):
        raise UserError(
            f"mesh.data times mesh.fsdp is {count}, of {len(devices)} devices in {len(owned)} processes: give the"
            f" number of all devices, or a multiple of {len(owned)} for as many in each process"
        )
    return [device for own in owned for device in own[:share]]


def arranged(devices: Sequence[jax.Device], data: int, fsdp: int) -> np.ndarray:
    """The devices as a (data, fsdp) array in which neighbours have the fastest links.

    Devices whose `slice_index` is the same, a TPU slice or GPUs that share a network of their own (on most clusters
    those of one host), are arranged by JAX for their topology. Several slices follow each other along `data`, so that a
    row of `fsdp` devices stays inside a slice where its size is a multiple of `fsdp`; where it is not, rows go on from
    one slice to the next.
    """
    slices = _grouped(devices, lambda device: getattr(device, "slice_index", 0))
    inside = all(len(one) % fsdp == 0 for one in slices)
    shapes = [(len(one) // fsdp, fsdp) if inside else (len(one),) for one in slices]
    return np.concatenate([_of_slice(*pair) for pair in zip(slices, shapes, strict=True)]).reshape(data, fsdp)


def _of_slice(devices: Sequence[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
    # An axis of the torus is split between both axes of the mesh where none has the size that is asked for.
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _grouped(devices: Sequence[jax.Device], key: Callable[[jax.Device], int]) -> list[list[jax.Device]]:
    """The devices of each key, by ascending key, otherwise in the given order."""
    ordered = sorted(devices, key=key)
    return [list(group) for _, group in itertools.groupby(ordered, key=key)]


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


def local_rows(mesh: Mesh, batch_size: int, devices: Collection[jax.Device] | None = None) -> np.ndarray:
    """The rows of a batch that belong to a process, ascending: those of its devices.

    A batch has the same order on any mesh, and a process may have several stretches of it: JAX arranges the devices of
    a pod by its topology, not process by process.

    Args:
        devices: those of the process; None: of this process.

    Returns:
        (n,) int, where n is the process's share of `batch_size`, which the devices divide evenly.
    """
    own = set(mesh.local_devices if devices is None else devices)
    placed = batch_sharding(mesh).devices_indices_map((batch_size,))
    return np.sort(np.concatenate([np.arange(batch_size)[rows] for device, rows in placed.items() if device in own]))


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A batch as global arrays, split over the mesh, from this process's rows of it, `local_rows`."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def on_one_device(tree: Any) -> Any:
    """Copies of a pytree's arrays on one device of each process, whatever their sharding. All processes call it."""

    def gathered(leaf: jax.Array) -> jax.Array:
        if not leaf.is_fully_replicated:
            leaf = jax.jit(lambda x: x, out_shardings=replicated(leaf.sharding.mesh))(leaf)
        return leaf.addressable_data(0)

    return jax.tree.map(gathered, tree)


class Constraints:
    """Sharding constraints inside a step, without which the compiler might move activations rather than parameters.

    Without a mesh there are no constraints.
    """

    def __init__(self, mesh: Mesh | None):
        self._mesh = mesh

    def known(self) -> contextlib.AbstractContextManager:
        """Sets the mesh, for code that is not an XLA operation and has to split its work by itself."""
        return contextlib.nullcontext() if self._mesh is None else use_abstract_mesh(self._mesh.abstract_mesh)

    def whole(self, params: Any, besides: Collection[tuple] = ()) -> Any:
        """Parameters as the model uses them: replicated, but for those below these paths, which it gathers itself."""
        if self._mesh is None:
            return params
        return jax.tree.map_with_path(lambda path, param: self._gathered(path, param, besides), params)

    def _gathered(self, path: tuple, param: jax.Array, besides: Collection[tuple]) -> jax.Array:
        keys = tuple(entry.key for entry in path)
        if any(keys[: len(parent)] == parent for parent in besides):
            return param
        return jax.lax.with_sharding_constraint(param, replicated(self._mesh))

    def split(self, tree: Any) -> Any:
        """Gradients as they are applied: sharded like the parameters."""
        if self._mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, state_shardings(tree, self._mesh))

    def batch(self, tree: Any) -> Any:
        """Arrays of a batch: each device has its own examples."""
        return tree if self._mesh is None else jax.lax.with_sharding_constraint(tree, batch_sharding(self._mesh))
