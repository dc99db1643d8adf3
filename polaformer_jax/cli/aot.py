"""Compiles the real training step for TPUs that are not here, and says what it needs and how fast it could be.

    python -m polaformer_jax.aot --config configs/pola_swin.py:b --topology v5e:16x16
    python -m polaformer_jax.aot --config configs/pola_swin.py:b --topology v5e:2x4 --config.mesh.fsdp=8 --csv b.csv
    python -m polaformer_jax.aot --config configs/pola_pvt.py:s --topology v5e:2x4 --largest_batch

Needs libtpu (the extra `tpu`), but neither a TPU nor the data set. Times are estimates from published peaks.
"""

import jax
import tqdm
from absl import flags
from ml_collections import config_flags

from polaformer_jax.aot import collectives
from polaformer_jax.aot.compiling import OutOfMemoryError, Program, compile_step, topology_devices
from polaformer_jax.aot.largest import largest
from polaformer_jax.cli import command_line
from polaformer_jax.data.sources import IMAGENET_EXAMPLES
from polaformer_jax.errors import UserError
from polaformer_jax.files import tables
from polaformer_jax.hardware.chips import chip_of
from polaformer_jax.training import progress, sharding
from polaformer_jax.training.progress import log

GIB, MIB = 2**30, 2**20


def describe(program: Program) -> str:
    """What is printed of a program, for people."""
    data, fsdp = program.mesh
    lines = [
        f"{program.model}, batch {program.batch} on {data * fsdp} chips: mesh.data={data}, mesh.fsdp={fsdp}"
        + (", rematerialised" if program.remat else ""),
        f"compiled in {program.seconds:.0f} s",
        f"memory of a chip     {program.memory / GIB:.2f} GiB: state and batch {program.state / GIB:.2f},"
        f" temporary {program.temporary / GIB:.2f}"
        + (f" (a {program.chip.name} has {program.chip.memory / GIB:.0f})" if program.chip else ""),
        f"FLOPs of a step      {program.products:.4g} in matrix products, all chips, recomputation not counted",
        f"                     {program.xla_flops:.4g} on one chip as XLA counts them: with the elementwise ones, and"
        " without what its fusions hide from it",
        f"memory traffic       {program.xla_bytes / GIB:.2f} GiB a step and chip, as XLA counts it",
    ]
    found = collectives.totals(program.collectives)
    if not found:
        lines.append("collectives          none")
    for kind, (count, size) in sorted(found.items()):
        lines.append(f"{kind:20} {count} x, {size / MIB:.2f} MiB of results on a chip")
    if (estimate := program.estimate) is None:
        return "\n".join([*lines, "estimate             none: the peaks of this chip are not known"])
    return "\n".join(
        [
            *lines,
            f"ESTIMATE of a step   about {1e3 * estimate.step:.2f} ms, bound by {estimate.bound}"
            f" (compute {1e3 * estimate.compute:.2f} ms, memory {1e3 * estimate.memory:.2f} ms,"
            f" links {1e3 * estimate.links:.2f} ms)",
            f"ESTIMATE of the MFU  about {100 * estimate.mfu:.1f} %",
            f"ESTIMATE of the run  about {program.total_steps * estimate.step / 3600:.2f} h for"
            f" {program.total_steps:,} steps, without input, evaluation and checkpoints",
        ]
    )


def row(topology: str, program: Program) -> dict[str, object]:
    """The same as one row of a table."""
    estimate, found = program.estimate, collectives.totals(program.collectives)
    cells = {
        "model": program.model,
        "topology": topology,
        "batch": program.batch,
        "mesh_data": program.mesh[0],
        "mesh_fsdp": program.mesh[1],
        "remat": program.remat,
        "memory_gib": round(program.memory / GIB, 3),
        "state_gib": round(program.state / GIB, 3),
        "temporary_gib": round(program.temporary / GIB, 3),
        "product_flops": f"{program.products:.4g}",
        "xla_flops_per_chip": f"{program.xla_flops:.4g}",
        "xla_gib_per_chip": round(program.xla_bytes / GIB, 3),
        "compile_s": round(program.seconds, 1),
        "steps": program.total_steps,
        "estimated_step_ms": estimate and round(1e3 * estimate.step, 3),
        "estimated_mfu": estimate and round(estimate.mfu, 4),
        "bound": estimate and estimate.bound,
    }
    return cells | {f"{kind}_mib": round(found.get(kind, (0, 0))[1] / MIB, 3) for kind in collectives.KINDS}


def largest_batch(config, devices, *, num_examples: int) -> Program:
    """The program of the largest batch that fits, to a sixteenth, found by compiling.

    Raises:
      UserError: not even one example a chip fits.
    """
    programs: dict[int, Program] = {}
    parts = sharding.make_mesh(config.mesh, devices).size * config.train.accumulate

    def used(examples: int) -> tuple[bool, float | None]:
        bar.set_postfix_str(f"batch {examples * parts}")
        try:
            program = compile_step(config, devices, num_examples=num_examples, batch_size=examples * parts)
        except OutOfMemoryError as error:
            log.info("batch %d: does not fit", examples * parts)
            return False, error.used
        finally:
            bar.update()
        fits = program.chip is None or program.memory <= program.chip.memory
        log.info("batch %d: %.2f GiB, compiled in %.0f s", program.batch, program.memory / GIB, program.seconds)
        if fits:
            programs[examples] = program
        return fits, program.memory

    with tqdm.tqdm(desc="compile", unit="program", disable=None) as bar:
        start = max(1, config.train.batch_size // parts)
        best = largest(used, start=start, limit=_limit(devices), within=1 / 16)
    if best == 0:
        raise UserError(f"not even a batch of {parts} fits: try --config.model.remat=True, or more chips")
    return programs[best]


def _limit(devices) -> float:
    if (chip := chip_of(devices[0].device_kind)) is None:
        raise UserError(f"--largest_batch: the memory of a {devices[0].device_kind} is not known")
    return chip.memory


def _define_flags() -> None:
    # Not at import: a program that imports this file has flags of its own.
    config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/pola_swin.py:b.")
    flags.DEFINE_string("topology", None, "Chips and how they lie: v5e:16x16, v5p:2x2x2; or cpu:8 to try things.")
    flags.DEFINE_integer("num_examples", IMAGENET_EXAMPLES, "Size of the training set.", lower_bound=1)
    flags.DEFINE_bool("largest_batch", False, "Find the largest batch that fits, by compiling a few times.")
    flags.DEFINE_string("csv", None, "File for the same as a row of a table.")


def main(argv: list[str]) -> None:
    del argv
    given = flags.FLAGS
    if given.config is None or given.topology is None:
        raise UserError("--config and --topology are needed, e.g. --config configs/pola_swin.py:b --topology v5e:16x16")
    progress.set_up_logging()
    # Programs are compiled for the topology and run nowhere; a TPU that is here is left alone.
    jax.config.update("jax_platforms", "cpu")
    devices = topology_devices(given.topology)
    if given.largest_batch:
        program = largest_batch(given.config, devices, num_examples=given.num_examples)
    else:
        program = compile_step(given.config, devices, num_examples=given.num_examples)
    print(describe(program))
    if given.csv is not None:
        tables.write_csv(given.csv, [row(given.topology, program)])


if __name__ == "__main__":
    _define_flags()
    command_line.run(main)
