"""Compares attentions over growing lengths, each as long as its program fits into the memory."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
from tqdm import tqdm

from polaformer_jax.benchmark import options, programs
from polaformer_jax.benchmark.programs import GIB, Program
from polaformer_jax.benchmark.timing import Timing, seconds_of, take_turns, warm
from polaformer_jax.errors import UserError
from polaformer_jax.files import tables
from polaformer_jax.hardware.costs import is_out_of_memory


class Job(NamedTuple):
    """Something to compile and to call.

    Attributes:
        trace: traces it from shapes only, so that no array that might not fit exists yet.
        start: creates the arrays, and returns a function that calls the program once.
    """

    trace: Callable[[], jax.stages.Traced]
    start: Callable[[jax.stages.Compiled], Callable[[], object]]


class Point(NamedTuple):
    """One attention at one length.

    Attributes:
        tokens: tokens in each example.
        attention: its name.
        mode: what was measured, such as "forward".
        program: the program; None if it was skipped because of its memory, and then so is the timing.
        timing: seconds per call.
    """

    tokens: int
    attention: str
    mode: str
    program: Program | None
    timing: Timing | None


def sweep(
    lengths: Sequence[int],
    job: Callable[[int, str, str], Job],
    *,
    attentions: Sequence[str],
    modes: Sequence[str],
    calls: int,
    seconds: float,
    limit: float,
    after_turn: Callable[[], object] = lambda: None,
) -> Iterator[list[Point]]:
    """The points of each length, the shortest first; at one length all take turns.

    Args:
        lengths: numbers of tokens.
        job: returns the job of a length, an attention and a mode.
        calls, seconds: see `take_turns`.
        limit: bytes of memory. What needs more is skipped, and not even compiled at longer lengths.
        after_turn: called after every turn, and as often for what is skipped.

    Raises:
        UserError: something does not fit into the memory, although it does according to the compiler.
    """
    skipped: set[tuple[str, str]] = set()
    for tokens in sorted(set(lengths)):
        found: dict[tuple[str, str], Program] = {}
        runs: dict[tuple[str, str], Callable[[], float]] = {}
        names = [(attention, mode) for mode in modes for attention in attentions]
        for name in names:
            given = job(tokens, *name)
            program = None if name in skipped else programs.compiled_within(given.trace, limit)
            if program is None:
                skipped.add(name)
                for _ in range(calls):
                    after_turn()
                continue
            found[name], runs[name] = program, _warm(given.start, program, f"{tokens:,} tokens, {' '.join(name)}")
        timings = take_turns(runs, calls=calls, seconds=seconds, after_turn=after_turn)
        yield [Point(tokens, *name, found.get(name), timings.get(name)) for name in names]


def _warm(start: Callable[[jax.stages.Compiled], Callable[[], object]], program: Program, what: str):
    try:
        call = start(program.run)
        warm(call)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"{what}: {program.memory / GIB:.2f} GiB as reported by the compiler do not fit: lower --max-memory-gib"
        ) from error
    return lambda: seconds_of(call)


def run(
    args: argparse.Namespace,
    lengths: Sequence[int],
    job: Callable[[int, str, str], Job],
    *,
    attentions: Sequence[str],
    modes: Sequence[str],
    sizes: Mapping[str, object],
    table: Callable[[list[Point]], str],
) -> list[Point]:
    """Runs the sweep that the options request, with a progress bar, and prints what was measured, after an error too.

    The CSV file grows with each length.

    Args:
        args: contains the options of `add_arguments`.
        sizes: further columns of the CSV file.
        table: points as text.

    Raises:
        UserError: see `sweep`; or the CSV file cannot be written.
    """
    kind = jax.devices()[0].device_kind
    points: list[Point] = []
    turns = len(set(lengths)) * len(attentions) * len(modes) * args.calls
    try:
        with tqdm(total=turns, desc="measuring", unit="turn", disable=None, leave=False) as bar:
            for found in sweep(
                lengths,
                job,
                attentions=attentions,
                modes=modes,
                calls=args.calls,
                seconds=args.seconds,
                limit=programs.memory_limit(args.max_memory_gib),
                after_turn=bar.update,
            ):
                points += found
                bar.set_postfix_str(f"{found[0].tokens:,} tokens are done")
                if args.csv:
                    tables.write_csv(args.csv, [{**record(point), **sizes, "device": kind} for point in points])
    finally:
        if points:
            print(table(points))
    return points


def record(point: Point) -> dict[str, object]:
    """Columns of a CSV file; None if the point was skipped."""
    program, timing = point.program, point.timing
    return {
        "attention": point.attention,
        "mode": point.mode,
        "tokens": point.tokens,
        "ms": timing and f"{1e3 * timing.median:.4f}",
        "ms_least": timing and f"{1e3 * timing.least:.4f}",
        "ms_greatest": timing and f"{1e3 * timing.greatest:.4f}",
        "calls": timing and timing.calls,
        "compile_s": program and f"{program.seconds:.2f}",
        "compiler_memory_gib": program and f"{program.memory / GIB:.4f}",
        "gflops": program and f"{program.flops / 1e9:.5g}",
    }


def cells(point: Point) -> tuple[str, str, str]:
    """Milliseconds, their range, and the memory in GiB, for people; dashes if the point was skipped."""
    timing, program = point.timing, point.program
    return (
        tables.number(timing and 1e3 * timing.median, ",.3f"),
        f"({1e3 * timing.least:,.3f} - {1e3 * timing.greatest:,.3f})" if timing else "",
        tables.number(program and program.memory / GIB, ".3f"),
    )


CELLS = ("ms", "(least - greatest)", "GiB")  # the head of `cells`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-memory-gib",
        type=float,
        help="what needs more memory, as reported by the compiler, is skipped and shown as a dash, as are all "
        "greater lengths [0.9 of the device's; on a CPU half of the machine's]",
    )
    options.add_timing(parser)


def check(args: argparse.Namespace) -> None:
    """Raises a UserError for invalid values."""
    options.check_positive("--max-memory-gib", args.max_memory_gib)
    options.check_timing(args)
