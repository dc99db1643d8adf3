"""Time of a model by operation of the compiled program, as the profiler measures it.

    polaformer benchmark profile --model pola_pvt_t --mode gradient
    taskset -c 0 polaformer benchmark profile --model pola_swin_t --top 40      # on one core

Operations that come from the same line of the model and became the same kind of kernel are one row. With several
cores the times of all threads are added up to more than the elapsed time, so read the shares, or measure on one core.
"""

import argparse
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from polaformer_jax.benchmark import options, ours
from polaformer_jax.benchmark.timing import warm
from polaformer_jax.errors import UserError
from polaformer_jax.files import tables

# These contain other operations, which are counted by themselves.
_HOLDERS = ("while", "call", "conditional")
_OPERATION = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*?([\w-]+)\((?:.*op_name="([^"]*)")?', re.MULTILINE)
_KERNEL_METADATA = re.compile(r"kernel_metadata=\{\n[^}]*\}")  # the only line breaks inside an instruction


class Row(NamedTuple):
    """Operations of one kind and origin.

    Attributes:
        kernel: what they became in the compiled program, e.g. "multiply_exponential_fusion".
        origin: where they come from: transformations and functions, and the primitive last.
        count: number of operations per call.
        seconds: their total time per call.
    """

    kernel: str
    origin: str
    count: float
    seconds: float


def operations(program_text: str) -> dict[str, tuple[str, str]]:
    """Opcode and origin of each operation of a compiled program, by name."""
    found = {}
    for match in _OPERATION.finditer(_KERNEL_METADATA.sub("", program_text)):
        found.setdefault(match[1], (match[2], match[3] or ""))
    return found


def profile(call: Callable[[], object], program_text: str, *, calls: int) -> list[Row]:
    """Calls it `calls` times and returns its operations, the longest first.

    Raises:
        UserError: the profiler saw no operation on this device.
    """
    known = operations(program_text)
    seconds: dict[tuple[str, str], float] = {}
    count: dict[tuple[str, str], int] = {}
    for name, duration in _events(call, calls=calls):
        opcode, origin = known.get(name, ("", ""))
        if opcode in _HOLDERS:
            continue
        key = (re.sub(r"[.\d]+$", "", name), origin)
        seconds[key] = seconds.get(key, 0.0) + duration
        count[key] = count.get(key, 0) + 1
    if not seconds:
        raise UserError(f"the profiler saw no operation on a {jax.devices()[0].device_kind}")
    rows = [Row(*key, count=count[key] / calls, seconds=value / calls) for key, value in seconds.items()]
    return sorted(rows, key=lambda row: -row.seconds)


def _events(call: Callable[[], object], *, calls: int):
    """(name of the operation, seconds) of every operation that ran."""
    with tempfile.TemporaryDirectory(prefix="benchmark_profile_") as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(call())
        for path in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                for line in plane.lines:
                    for event in line.events:
                        name = _stats(event).get("hlo_op")
                        if name is not None:
                            yield name, event.duration_ns * 1e-9


def _stats(event: jax.profiler.ProfileEvent) -> Mapping[str, object]:
    return {name: value for name, value in event.stats if name is not None}


def table(rows: list[Row], *, top: int) -> str:
    """The rows that take longest, and the sum of the others."""
    total = sum(row.seconds for row in rows)
    shown, rest = rows[:top], rows[top:]
    if rest:
        shown = [*shown, Row("others", "", sum(row.count for row in rest), sum(row.seconds for row in rest))]
    shown = [*shown, Row("all", "", sum(row.count for row in rows), total)]
    lines = [
        [row.kernel, _short(row.origin), f"{row.count:g}", f"{1e3 * row.seconds:.1f}", f"{row.seconds / total:.1%}"]
        for row in shown
    ]
    return tables.columns(["kernel", "origin", "count", "ms", "share"], lines, left=2)


def _short(origin: str, length: int = 60) -> str:
    return origin if len(origin) <= length else "..." + origin[3 - length :]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="pola_pvt_t", help="[pola_pvt_t]")
    parser.add_argument(
        "--mode", choices=tuple(ours.MODES), default="forward", help="as in `benchmark model` [forward]"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="images [8]")
    parser.add_argument("--img-size", type=int, help="pixels, square [the model's own]")
    parser.add_argument("--dtype", choices=options.DTYPES, default="float32", help="[float32]")
    parser.add_argument("--calls", type=int, default=3, help="number of profiled calls [3]")
    parser.add_argument("--top", type=int, default=25, help="rows to show [25]")
    parser.add_argument("--csv", metavar="FILE", help="file to write all rows to")


def main(args: argparse.Namespace) -> None:
    options.check_positive("--calls", args.calls)
    options.check_positive("--top", args.top)
    (case,) = ours.cases(
        argparse.Namespace(
            models=[args.model], batch_sizes=[args.batch_size], dtypes=[args.dtype], img_size=args.img_size
        )
    )
    program, call = ours.MODES[args.mode](ours.experiment(case, jax.devices()[:1]), case)
    warm(call)
    rows = profile(call, program.run.as_text(), calls=args.calls)
    print(table(rows, top=args.top))
    if args.csv:
        tables.write_csv(args.csv, [row._asdict() for row in rows])
