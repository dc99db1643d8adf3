"""Reports of a compiled training step: for people, and as a row of a table."""

from polaformer_jax.aot import collectives
from polaformer_jax.aot.compiling import Program

GIB, MIB = 2**30, 2**20


def describe(program: Program) -> str:
    """The printed report of a program, for people."""
    data, fsdp = program.mesh
    lines = [
        f"{program.model}, batch {program.batch} on {data * fsdp} chips: mesh.data={data}, mesh.fsdp={fsdp}"
        + (", rematerialised" if program.remat else ""),
        f"compiled in {program.seconds:.0f} s",
        f"memory of a chip     {program.memory / GIB:.2f} GiB: state and batch {program.state / GIB:.2f},"
        f" temporary {program.temporary / GIB:.2f}"
        + (f" (a {program.chip.name} has {program.chip.memory / GIB:.0f})" if program.chip else ""),
        f"FLOPs of a step      {program.products:.4g} in matrix products, all chips, recomputation not counted",
        f"                     {program.xla_flops:.4g} on one chip as XLA counts them: with elementwise operations,"
        " without those hidden by its fusions",
        f"memory traffic       {program.xla_bytes / GIB:.2f} GiB per step and chip, as XLA counts it",
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
