"""Compiled programs to be measured: their compilation time, operations and memory."""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence

import jax

from polaformer_jax.hardware.costs import is_out_of_memory, memory_needed, product_flops
from polaformer_jax.hardware.host_memory import retire_fragments

GIB = 2**30
CPU_SHARE, DEVICE_SHARE = 0.5, 0.9  # fractions of the memory that programs may use by default


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        run: the program.
        seconds: time of tracing and compiling.
        flops: operations of its matrix products and convolutions (`product_flops`), on all devices together.
        memory: bytes on one device that it needs while it runs, as reported by the compiler (`memory_needed`).
        arguments: bytes of its arguments, which `memory` includes.
    """

    run: jax.stages.Compiled
    seconds: float
    flops: float
    memory: float
    arguments: float


def compiled(trace: Callable[[], jax.stages.Traced]) -> Program:
    """Traces, lowers and compiles."""
    began = time.perf_counter()
    traced = trace()
    program = traced.lower().compile()
    seconds = time.perf_counter() - began
    retire_fragments()  # as training does
    return Program(
        run=program,
        seconds=seconds,
        flops=product_flops(traced.jaxpr.jaxpr),
        memory=memory_needed(program),
        arguments=program.memory_analysis().argument_size_in_bytes,
    )


def compiled_within(trace: Callable[[], jax.stages.Traced], limit: float) -> Program | None:
    """The compiled program; None if it needs more than `limit` bytes, or more than the compiler allows."""
    try:
        program = compiled(trace)
    except jax.errors.JaxRuntimeError as error:
        if is_out_of_memory(error):
            return None
        raise
    return program if program.memory <= limit else None


def memory_limit(gib: float | None) -> float:
    """Bytes that a program may need: as given, or a fraction of the memory of the first device, or of the machine."""
    if gib is not None:
        return gib * GIB
    if stats := jax.devices()[0].memory_stats():
        return DEVICE_SHARE * stats["bytes_limit"]
    return CPU_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_peak(program: Program, call: Callable[[], object], devices: Sequence[jax.Device]) -> float | None:
    """Calls it once; the most bytes that this used on a device, arguments included, as reported by the devices.

    None if it is not known: on CPUs, which report nothing, and if the process used more memory earlier, because the
    devices only report the peak of the process.
    """
    before = [device.memory_stats() for device in devices]
    jax.block_until_ready(call())
    if not all(before):
        return None
    after = [device.memory_stats() for device in devices]
    took = [
        now["peak_bytes_in_use"] - then["bytes_in_use"] + program.arguments
        for then, now in zip(before, after, strict=True)
        if now["peak_bytes_in_use"] > then["peak_bytes_in_use"]
    ]
    return max(took, default=None)
