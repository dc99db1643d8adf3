"""Where a kernel runs: for which platform a program is traced, and each device on its own examples."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec


def for_tpu() -> bool:
    """Whether a program is being traced for a TPU: for the mesh that is set, otherwise for the default device."""
    return device_kind().startswith("TPU")


def for_gpu() -> bool:
    """Whether a program is being traced for a GPU that JAX calls "NVIDIA ...": see `for_tpu`."""
    return device_kind().startswith("NVIDIA")


def interprets() -> bool:
    """Whether a program is being traced for CPUs, which interpret kernels of other devices if told: to test them."""
    return device_kind() == "cpu"


def device_kind() -> str:
    """JAX's name of the devices that a program is being traced for: see `for_tpu`."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device
    if device is None:
        device = jax.devices()[0]
    elif isinstance(device, str):  # the name of a platform
        device = jax.devices(device)[0]
    return device.device_kind


def sharding_is_known() -> bool:
    """Whether it is known how a batch lies on the devices, which the compiler does not partition a kernel over.

    From the mesh that is set (`jax.set_mesh`, as training steps do), or because there is one device.
    """
    return not jax.sharding.get_abstract_mesh().empty or jax.device_count() == 1


def compiles(dtype: jax.typing.DTypeLike) -> bool:
    """Whether kernels for products of this dtype can be compiled: not of 64 bits, nor for a batch that lies unknown."""
    return sharding_is_known() and jnp.dtype(dtype).itemsize <= 4


class Placement(NamedTuple):
    """What says where the kernels of a program run; hashable, so that custom gradients can carry it.

    Attributes:
        only_tpu: whether only a TPU will run the program, which makes it faster to trace.
        mesh: the mesh that is set, over whose devices the batch is sharded.
    """

    only_tpu: bool
    mesh: AbstractMesh

    @classmethod
    def here(cls, only_tpu: bool) -> "Placement":
        """On the mesh that is set."""
        return cls(only_tpu, jax.sharding.get_abstract_mesh())

    @property
    def devices(self) -> int:
        """Over how many devices a batch is sharded: 1 without a mesh, or where the caller has sharded the batch."""
        return math.prod(self._axes.values())

    @property
    def _axes(self) -> dict[str, int]:
        """The sizes of the mesh's axes, without those over which the caller has sharded the batch."""
        axes = zip(self.mesh.axis_names, self.mesh.axis_sizes, self.mesh.axis_types, strict=True)
        return {name: size for name, size, kind in axes if kind == AxisType.Auto}

    def run(self, kernels: Mapping[str, Callable[[], Callable]], arrays: Mapping, *, replicated: frozenset[str]):
        """Runs a kernel on named arrays, each device on its own examples.

        Args:
            kernels: makes the kernel for a platform, "tpu", "cuda" or both, and "default", which is interpreted. A
                kernel takes the dictionary of arrays and returns a pair of pytrees: results with a batch axis, and
                sums over the examples that it was given.
            arrays: with the batch on the first axis, but for those named in `replicated`.

        Returns:
            The pair of pytrees, for the whole batch. Where a mesh is set, the batch is sharded over its devices if it
            divides evenly; otherwise each device computes all of it.
        """

        def on_one_device(arrays):
            if self.only_tpu:
                return kernels["tpu"]()(arrays)
            return jax.lax.platform_dependent(arrays, **{name: make() for name, make in kernels.items()})

        axes = self._axes
        if not axes:  # no mesh, or the caller has sharded the batch
            return on_one_device(arrays)
        batch = next(array.shape[0] for name, array in arrays.items() if name not in replicated)
        shared = batch % self.devices == 0
        by_example = PartitionSpec(tuple(axes)) if shared else PartitionSpec()

        def with_sums_by_device(arrays):
            results, sums = on_one_device(arrays)
            return results, jax.tree.map(lambda total: total[None], sums)

        results, sums = jax.shard_map(
            with_sums_by_device,
            mesh=self.mesh,
            in_specs=({name: PartitionSpec() if name in replicated else by_example for name in arrays},),
            out_specs=(by_example, by_example),
            axis_names=set(axes),
            check_vma=False,
        )(dict(arrays))
        return results, jax.tree.map(lambda totals: totals.sum(axis=0), sums)
