"""Reports of a compiled training step: for people, and as rows of tables."""

from polaformer_jax.aot import collectives
from polaformer_jax.aot.attribution import WITHOUT_PASSES
from polaformer_jax.aot.compiling import Program
from polaformer_jax.files import tables

GIB, MIB = 2**30, 2**20


def describe(program: Program) -> str:
    """The printed report of a program, for people."""
    data, fsdp = program.mesh
    lines = [
        f"{program.model}, batch {program.batch} on {data * fsdp} chips: mesh.data={data}, mesh.fsdp={fsdp}"
        + (", rematerialised" if program.remat else ""),
        f"compiled in {program.seconds:.0f} s, memory traffic counted in {program.counting:.1f} s",
        f"memory of a chip     {program.memory / GIB:.2f} GiB: state and batch {program.state / GIB:.2f},"
        f" temporary {program.temporary / GIB:.2f}"
        + (f" (a {program.chip.name} has {program.chip.memory / GIB:.0f})" if program.chip else ""),
        f"FLOPs of a step      {program.products:.4g} in matrix products, all chips, recomputation not counted",
        f"                     {tables.number(program.xla_flops, '.4g')} on one chip as XLA counts them: with"
        " elementwise operations, without those hidden by its fusions",
        f"memory traffic       {program.moved / GIB:.3f} GiB per step and chip, of which {program.padding / GIB:.3f}"
        " are padding",
        f"                     {tables.number(_gib(program.xla_bytes), '.3f')} as XLA counts it: with what stays on the"
        " chip, without padding and repetitions of loops",
    ]
    if program.options:
        lines.append(f"compiler options     {_options(program)}")
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


def traffic_table(program: Program) -> str:
    """Memory traffic by part of the model, forward and backward, in MiB per step and chip."""
    rows, total = [], program.moved
    for module in dict.fromkeys(row.module for row in program.traffic):
        passes = {row.backward: row for row in program.traffic if row.module == module}
        bytes_moved = sum(row.bytes for row in passes.values())
        cells = (
            ["-", "-"] if module in WITHOUT_PASSES else [_mib(passes[b].bytes if b in passes else 0) for b in (0, 1)]
        )
        padding, copies = (sum(getattr(row, name) for row in passes.values()) for name in ("padding", "copies"))
        share = f"{100 * bytes_moved / max(total, 1):.1f} %"
        rows.append([module, *cells, _mib(bytes_moved), share, _mib(padding), _mib(copies)])
    sums = [sum(r.bytes for r in program.traffic if r.module not in WITHOUT_PASSES and r.backward == b) for b in (0, 1)]
    copies = sum(row.copies for row in program.traffic)
    rows.append(["all", *map(_mib, sums), _mib(total), "100.0 %", _mib(program.padding), _mib(copies)])
    if program.xla_bytes is not None:
        rows.append(["as XLA counts", "", "", _mib(program.xla_bytes), "", "", ""])
    head = ["memory traffic, MiB", "forward", "backward", "both", "share", "padding", "copies"]
    return tables.columns(head, rows)


def row(topology: str, program: Program) -> dict[str, object]:
    """The report as one row of a table."""
    estimate, found = program.estimate, collectives.totals(program.collectives)
    cells = {
        "model": program.model,
        "topology": topology,
        "batch": program.batch,
        "mesh_data": program.mesh[0],
        "mesh_fsdp": program.mesh[1],
        "remat": program.remat,
        "attention_impl": program.attention_impl,
        "compiler_options": _options(program),
        "memory_gib": round(program.memory / GIB, 3),
        "state_gib": round(program.state / GIB, 3),
        "temporary_gib": round(program.temporary / GIB, 3),
        "traffic_gib": round(program.moved / GIB, 3),
        "padding_gib": round(program.padding / GIB, 3),
        "product_flops": f"{program.products:.4g}",
        "xla_flops_per_chip": None if program.xla_flops is None else f"{program.xla_flops:.4g}",
        "xla_gib_per_chip": None if program.xla_bytes is None else round(program.xla_bytes / GIB, 3),
        "compile_s": round(program.seconds, 1),
        "steps": program.total_steps,
        "estimated_step_ms": estimate and round(1e3 * estimate.step, 3),
        "estimated_mfu": estimate and round(estimate.mfu, 4),
        "bound": estimate and estimate.bound,
    }
    return cells | {f"{kind}_mib": round(found.get(kind, (0, 0))[1] / MIB, 3) for kind in collectives.KINDS}


def traffic_rows(topology: str, program: Program) -> list[dict[str, object]]:
    """The memory traffic as rows of a table, one for each part of the model and pass."""
    return [
        {
            "model": program.model,
            "topology": topology,
            "batch": program.batch,
            "mesh_data": program.mesh[0],
            "mesh_fsdp": program.mesh[1],
            "remat": program.remat,
            "attention_impl": program.attention_impl,
            "compiler_options": _options(program),
            "module": part.module,
            "pass": "" if part.module in WITHOUT_PASSES else "backward" if part.backward else "forward",
            "read_mib": round(part.read / MIB, 3),
            "written_mib": round(part.written / MIB, 3),
            "padding_mib": round(part.padding / MIB, 3),
            "copies_mib": round(part.copies / MIB, 3),
        }
        for part in program.traffic
    ]


def _options(program: Program) -> str:
    return ", ".join(f"{name}={value}" for name, value in program.options.items())


def _gib(size: float | None) -> float | None:
    return None if size is None else size / GIB


def _mib(size: float) -> str:
    return f"{size / MIB:.1f}"
