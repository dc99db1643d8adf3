"""Compiles the real training step for devices that are not present."""

import dataclasses
import importlib.util
import os
import re
import time
from collections.abc import Sequence

import jax
import ml_collections

from polaformer_jax.aot.collectives import Collective, collectives
from polaformer_jax.aot.roofline import Estimate, estimate
from polaformer_jax.errors import UserError
from polaformer_jax.hardware.chips import Chip, chip_of
from polaformer_jax.hardware.costs import is_out_of_memory, memory_needed
from polaformer_jax.training.experiment import Experiment

_USED = re.compile(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


class OutOfMemoryError(UserError):
    """The step does not fit into a chip's memory.

    Attributes:
        used: bytes that it would need, None if the compiler does not report them.
    """

    def __init__(self, message: str, used: float | None):
        super().__init__(message)
        self.used = used


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled training step. Memory, bytes and collectives are those of one chip.

    Attributes:
        memory: bytes in total: state, batch, temporary values and the program.
        state, temporary: bytes of the state and the batch, and of temporary values.
        products: operations of the matrix products of the whole batch, over all chips, without recomputation
            (`model.remat`).
        xla_flops, xla_bytes: operations, and bytes moved to and from memory, as XLA counts them for one chip.
        seconds: time of compiling.
    """

    model: str
    batch: int
    mesh: tuple[int, int]
    remat: bool
    chip: Chip | None
    memory: float
    state: float
    temporary: float
    products: float
    xla_flops: float
    xla_bytes: float
    collectives: tuple[Collective, ...]
    seconds: float
    total_steps: int

    @property
    def estimate(self) -> Estimate | None:
        """None for a chip with unknown peaks."""
        if self.chip is None:
            return None
        return estimate(
            self.chip,
            flops=self.products / (self.mesh[0] * self.mesh[1]),
            memory_bytes=self.xla_bytes,
            link_bytes=sum(item.moved for item in self.collectives),
        )


def topology_devices(topology: str) -> Sequence[jax.Device]:
    """Devices of a TPU topology such as "v5e:16x16"; "cpu:8" has eight fake ones, for trials.

    Raises:
        UserError: there is no such topology, or libtpu is not installed.
    """
    generation, _, shape = topology.partition(":")
    if generation == "cpu" and shape.isdecimal() and int(shape):
        try:
            jax.config.update("jax_num_cpu_devices", int(shape))
        except RuntimeError:  # too late: JAX is in use already
            pass
        if len(devices := jax.devices("cpu")) < int(shape):
            raise UserError(f"{topology}, but this process has {len(devices)} CPU devices already", argument="topology")
        return devices[: int(shape)]
    if not re.fullmatch(r"v\w+:\d+(x\d+){1,2}", topology):
        raise UserError(
            f"{topology}: expected a TPU topology, such as v5e:2x4, v5e:16x16 or v5p:2x2x2, or cpu:8",
            argument="topology",
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f'{topology} needs the TPU compiler, libtpu (but no TPU): pip install "polaformer_jax[tpu]" (or -e'
            ' ".[tpu]" in a checkout)',
            argument="topology",
        )
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # a machine without a TPU has no metadata server to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes may compile at once: no chip is in use
    try:
        # On a v4, JAX sees both cores of a chip as one device, which a topology has to be told.
        options = {"chip_config_name": "megacore"} if generation == "v4" else {}
        return topologies.get_topology_desc(topology, "tpu", **options).devices
    except Exception as error:  # of several types, by version
        raise UserError(f"{topology}: {str(error).splitlines()[0]}", argument="topology") from error


def compile_step(
    config: ml_collections.ConfigDict,
    devices: Sequence[jax.Device],
    *,
    num_examples: int,
    batch_size: int | None = None,
) -> Program:
    """Compiles the training step of a config for these devices, which need not be present.

    Args:
        num_examples: size of the training set, which is not opened.
        batch_size: replaces `train.batch_size`.

    Raises:
        UserError: the config is not valid.
        OutOfMemoryError: the step does not fit.
    """
    config = config.copy_and_resolve_references()
    if batch_size is not None:
        config.train.batch_size = batch_size
    experiment = Experiment(config, devices=devices, num_examples=num_examples)
    experiment.check_batch()
    batch = experiment.abstract_batch(config.train.batch_size)
    began = time.monotonic()
    try:
        compiled = experiment.train_step.program(batch)
    except jax.errors.JaxRuntimeError as error:
        if (explained := out_of_memory(error, config)) is None:
            raise
        raise explained from error
    seconds = time.monotonic() - began
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return Program(
        model=config.model.name,
        batch=config.train.batch_size,
        mesh=(experiment.mesh.shape["data"], experiment.mesh.shape["fsdp"]),
        remat=config.model.remat,
        chip=chip_of(devices[0].device_kind),
        memory=memory_needed(compiled),
        state=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        products=experiment.step_flops(batch),
        xla_flops=cost.get("flops", float("nan")),
        xla_bytes=cost.get("bytes accessed", float("nan")),
        collectives=tuple(collectives(compiled.as_text())),
        seconds=seconds,
        total_steps=experiment.length.total,
    )


def out_of_memory(error: Exception, config: ml_collections.ConfigDict) -> OutOfMemoryError | None:
    """Converts a compiler error about memory; None if it is about something else."""
    if not is_out_of_memory(error):
        return None
    used = _USED.search(str(error))
    size = float(used[1]) * _UNITS[used[2]] if used else None
    return OutOfMemoryError(
        f"a step of train.batch_size={config.train.batch_size} does not fit into a chip's memory"
        + (f" ({used[0]})" if used else "")
        + ": lower it, or try model.remat=True, train.accumulate or mesh.fsdp",
        size,
    )
