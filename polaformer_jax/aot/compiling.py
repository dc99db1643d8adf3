"""Compiles the real training step for devices that are not present."""

import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections

from polaformer_jax.aot import hlo, traffic
from polaformer_jax.aot.attribution import Traffic, by_module
from polaformer_jax.aot.collectives import Collective, collectives
from polaformer_jax.aot.roofline import Estimate, estimate
from polaformer_jax.aot.topologies import compiler_options, no_default
from polaformer_jax.errors import UserError
from polaformer_jax.hardware.chips import Chip, chip_of
from polaformer_jax.hardware.costs import is_out_of_memory, memory_needed
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.programs import AnyBatch

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
    """A compiled training step. Memory, bytes, traffic and collectives are those of one chip.

    Attributes:
        memory: bytes in total: state, batch, temporary values and the program.
        state, temporary: bytes of the state and the batch, and of temporary values.
        products: operations of the matrix products of the whole batch, over all chips, without recomputation
            (`model.remat`).
        attention_impl: of the model, what computes attention and MLPs.
        options: of the compiler, see `topologies.compiler_options`.
        traffic: bytes between the chip and its memory, by part of the model and pass: see `aot.traffic`.
        xla_flops, xla_bytes: operations, and bytes moved to and from memory, as XLA counts them for one chip, with what
            stays on the chip; None: XLA counts none, as for GPUs that are not present.
        seconds: time of compiling.
        counting: seconds of counting the traffic.
    """

    model: str
    batch: int
    mesh: tuple[int, int]
    remat: bool
    attention_impl: str
    chip: Chip | None
    memory: float
    state: float
    temporary: float
    products: float
    options: Mapping[str, Any]
    traffic: tuple[Traffic, ...]
    xla_flops: float | None
    xla_bytes: float | None
    collectives: tuple[Collective, ...]
    seconds: float
    counting: float
    total_steps: int

    @property
    def moved(self) -> float:
        """Bytes between a chip and its memory in a step, with the padding of tiles."""
        return math.fsum(row.bytes for row in self.traffic)

    @property
    def padding(self) -> float:
        """How many of the moved bytes are padding."""
        return math.fsum(row.padding for row in self.traffic)

    @property
    def estimate(self) -> Estimate | None:
        """None for a chip with unknown peaks."""
        if self.chip is None:
            return None
        return estimate(
            self.chip,
            flops=self.products / (self.mesh[0] * self.mesh[1]),
            memory_bytes=self.moved,
            link_bytes=sum(item.moved for item in self.collectives),
        )


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
        compiled, options = compile_first(experiment, batch, compiler_options(devices))
    except jax.errors.JaxRuntimeError as error:
        if (explained := out_of_memory(error, config)) is None:
            raise
        raise explained from error
    seconds = time.monotonic() - began
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis() or {}, compiled.as_text()
    began = time.monotonic()
    program = hlo.Program(text)
    moved = by_module(program, traffic.moves(program, platform=devices[0].platform))
    counting = time.monotonic() - began
    return Program(
        model=config.model.name,
        batch=config.train.batch_size,
        mesh=(experiment.mesh.shape["data"], experiment.mesh.shape["fsdp"]),
        remat=config.model.remat,
        attention_impl=config.model.attention_impl,
        chip=chip_of(devices[0].device_kind),
        memory=memory_needed(compiled),
        state=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        products=experiment.step_flops(batch),
        options=options,
        traffic=tuple(moved),
        xla_flops=cost.get("flops"),
        xla_bytes=cost.get("bytes accessed"),
        collectives=tuple(collectives(text)),
        seconds=seconds,
        counting=counting,
        total_steps=experiment.length.total,
    )


def compile_first(
    experiment: Experiment, batch: AnyBatch, choices: Sequence[Mapping[str, Any]]
) -> tuple[jax.stages.Compiled, Mapping[str, Any]]:
    """The training step compiled with the first of these options that all products have a default for, and these."""
    for options in choices[:-1]:
        try:
            return experiment.train_step.program(batch, options), options
        except jax.errors.JaxRuntimeError as error:
            if not no_default(error):
                raise
    return experiment.train_step.program(batch, choices[-1]), choices[-1]


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
