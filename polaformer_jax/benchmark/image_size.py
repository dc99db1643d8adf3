"""Time and memory of a segmenter against the size of its images, with polarity and with softmax attention.

    polaformer benchmark image-size --csv image_size.csv --plot image_size.png

The whole segmenter, backbone and head, takes one square image of random numbers. All blocks have the same attention:
"polarity"; "softmax", which sees all tokens too; or "softmax_reduced", whose keys and values are reduced as in PVT.
Gradients are those of the mean of the squared logits, in training.

Each case is compiled in one process and timed in others, one process at a time; those of one size and mode take turns.
What needs more memory than allowed is not run. This process does not use the devices.
"""

import argparse
import itertools
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from polaformer_jax.benchmark import image_size_plot, options
from polaformer_jax.benchmark.image_size_case import ATTENTIONS, CELLS, MODES, Case, Program, Row, measured
from polaformer_jax.benchmark.programs import CPU_SHARE, DEVICE_SHARE
from polaformer_jax.benchmark.timing import timing_of
from polaformer_jax.benchmark.workers import answer_of
from polaformer_jax.config import HEADS
from polaformer_jax.errors import UserError
from polaformer_jax.files import figures, tables
from polaformer_jax.models import registry

SIZES = (256, 512, 1024, 2048)
_WORKER = "polaformer_jax.benchmark.image_size_worker"


def measure(
    cases: Sequence[Case],
    *,
    memory_gib: float | None,
    rounds: int,
    calls: int,
    seconds: float,
    after_process: Callable[[], object] = lambda: None,
) -> list[Row]:
    """A row for each case. Their processes take turns, round after round, and load what was compiled at first.

    Args:
        memory_gib: what needs more is not run; None: see `programs.memory_limit`.
        rounds: number of processes that time each case.
        calls, seconds: least number of timed calls of each, and their least time, over all rounds.
        after_process: called after every process, and as often for those that are left out.

    Raises:
        UserError: a process fails.
    """
    programs: dict[Case, Program] = {}
    answers: dict[Case, list[dict]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory(prefix="benchmark_image_size_") as cache:
        for case in cases:
            programs[case] = Program(**_ask(case, cache, "compiled", memory_gib=memory_gib))
            after_process()
        for case in cases * rounds:
            if programs[case].fits:
                share = {"calls": math.ceil(calls / rounds), "seconds": seconds / rounds}
                answers[case].append(_ask(case, cache, "timed", **share))
            after_process()
    return [_row(case, programs[case], answers[case]) for case in cases]


def _ask(case: Case, cache: str, what: str, **given) -> dict:
    question = {"case": case._asdict(), "cache": cache, "what": what, "given": given}
    failure = f"{case}, failed: {{error}}. If it had too little memory, lower --max-memory-gib"
    root = str(Path(__file__).parents[2])
    return answer_of([sys.executable, "-m", _WORKER], question, failure=failure, folder=root)


def _row(case: Case, program: Program, answers: Sequence[dict]) -> Row:
    if not answers:
        return Row(case, program, None, None, None)
    peaks = [answer["peak"] for answer in answers if answer["peak"] is not None]
    times = list(itertools.chain.from_iterable(answer["seconds"] for answer in answers))
    return Row(case, program, timing_of(times), min(peaks, default=None), answers[0]["peak_by"])


def table(rows: Sequence[Row]) -> str:
    """A line for each mode and size; then how time grows with the pixels."""
    attentions = [name for name in ATTENTIONS if any(row.case.attention == name for row in rows)]
    head = ["mode", "pixels", "tokens", *(f"{name} {cell}" for name in attentions for cell in CELLS)]
    by_size: dict[tuple[str, int], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (MODES.index(row.case.mode), row.case.img_size)):
        by_size.setdefault((row.case.mode, row.case.img_size), []).append(row)
    lines = []
    for (mode, size), found in by_size.items():
        cells = {row.case.attention: row.cells() for row in found}
        texts = [text for name in attentions for text in cells[name]]
        lines.append([mode, f"{size:,}", f"{found[0].case.tokens:,}", *texts])
    return "\n".join([tables.columns(head, lines), *_growth(rows, attentions)])


def _growth(rows: Sequence[Row], attentions: Sequence[str]) -> Iterator[str]:
    for mode in MODES:
        found = [(name, exponent(measured(rows, mode, name))) for name in attentions]
        texts = [f"{name} {given[0]:.2f} ({given[1]:,} to {given[2]:,})" for name, given in found if given is not None]
        if texts:
            yield f"{mode}: time grows with the pixels to the power of: {', '.join(texts)}"


def exponent(rows: Sequence[Row]) -> tuple[float, int, int] | None:
    """The p of "time grows as pixels ** p" between the two largest sizes that were timed, and these; None: too few."""
    timed = [row for row in rows if row.timing is not None][-2:]
    if len(timed) < 2:
        return None
    small, large = (row.case.img_size for row in timed)
    growth = timed[1].timing.median / timed[0].timing.median
    return math.log(growth) / math.log((large / small) ** 2), small, large


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="pola_pvt_t", help="backbone, a Pola-PVT [pola_pvt_t]")
    parser.add_argument("--head", choices=HEADS, default="semantic_fpn", help="[semantic_fpn]")
    shown = " ".join(map(str, SIZES))
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), help=f"pixels, multiples of 32 [{shown}]")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="[all]")
    parser.add_argument("--attentions", nargs="+", choices=tuple(ATTENTIONS), default=list(ATTENTIONS), help="[all]")
    parser.add_argument("--dtype", choices=options.DTYPES, default="float32", help="of the computation [float32]")
    parser.add_argument(
        "--max-memory-gib",
        type=float,
        help="what needs more memory, as reported by the compiler, is compiled but not run "
        f"[{DEVICE_SHARE:g} of the device's; on a CPU {CPU_SHARE:g} of the machine's]",
    )
    parser.add_argument("--rounds", type=int, default=3, help="processes that time each case, in turns [3]")
    options.add_timing(parser)
    parser.add_argument("--plot", metavar="FILE", help="time and memory by size, both axes logarithmic: .png or .svg")


def main(args: argparse.Namespace) -> None:
    options.check_positive("--max-memory-gib", args.max_memory_gib)
    options.check_positive("--rounds", args.rounds)
    options.check_timing(args)
    if args.plot is not None:
        figures.check_name(args.plot, "plot")
    groups = _groups(args)
    rows: list[Row] = []
    processes = (1 + args.rounds) * sum(map(len, groups))
    try:
        with tqdm(total=processes, desc="measuring", unit="process", disable=None, leave=False) as bar:
            for cases in groups:
                bar.set_postfix_str(f"{cases[0].img_size:,} pixels, {cases[0].mode}")
                rows += measure(
                    cases,
                    memory_gib=args.max_memory_gib,
                    rounds=args.rounds,
                    calls=args.calls,
                    seconds=args.seconds,
                    after_process=bar.update,
                )
                if args.csv:
                    tables.write_csv(args.csv, [row.record() for row in rows])
    finally:  # what was measured before an error is shown
        if rows:
            print(table(rows))
    if args.plot is not None:
        figures.save(image_size_plot.draw(rows), args.plot)


def _groups(args: argparse.Namespace) -> list[list[Case]]:
    """The cases of each size and mode; all can be built."""
    family = registry.model_config(args.model).family
    if family != "PolaPVT":
        raise UserError(
            f"--model {args.model} is a {family}, expected a PolaPVT, in which either attention can see all tokens"
        )
    groups = [
        [Case(args.model, args.head, args.dtype, size, mode, attention) for attention in dict.fromkeys(args.attentions)]
        for size in sorted(set(args.sizes))
        for mode in dict.fromkeys(args.modes)
    ]
    for case in itertools.chain.from_iterable(groups):
        case.config()
    return groups
