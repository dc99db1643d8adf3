"""Time from the start of a new process to the first logits, without and with a compilation cache.

    polaformer benchmark start --models pola_pvt_t pola_swin_t
    polaformer benchmark start --models pola_pvt_t --official ~/PolaFormer

Python starts, imports, creates a model with random weights, compiles and evaluates one batch of random images. All
measurements of one model take turns. This process does not use the devices, which may serve one process only.
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from polaformer_jax.benchmark import official, options, ours
from polaformer_jax.benchmark.ours import Case
from polaformer_jax.benchmark.timing import Timing, take_turns
from polaformer_jax.errors import UserError
from polaformer_jax.files import tables

_WORKER = "polaformer_jax.benchmark.start_worker"
COLD, WARM = "ours, nothing compiled", "ours, compilation cache"


class Row(NamedTuple):
    """One measurement.

    Attributes:
        case: the model and its images.
        code: `COLD`, `WARM`, or the name of the official code.
        platform: JAX's name for the kind of device.
        timing: seconds from the start of a process to the logits.
    """

    case: Case
    code: str
    platform: str
    timing: Timing

    def record(self) -> dict[str, object]:
        """Columns of a CSV file."""
        return {
            **self.case._asdict(),
            "code": self.code,
            "platform": self.platform,
            "start_s": self.timing.median,
            "start_s_least": self.timing.least,
            "start_s_greatest": self.timing.greatest,
            "calls": self.timing.calls,
        }


def measure(case: Case, *, calls: int, officials: Mapping[str, official.Opener], after_turn) -> list[Row]:
    """A row for each of: nothing compiled, everything compiled, each requested variant of the official code.

    Args:
        officials: see `official.openers`.

    Raises:
        UserError: a process fails.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark_start_") as cache:
        _, platform = start(case, cache)

        def cold() -> float:
            with tempfile.TemporaryDirectory(prefix="benchmark_start_") as empty:
                return start(case, empty)[0]

        def their(open_official: official.Opener) -> float:
            began = time.perf_counter()
            with open_official(case, (), platform) as process:
                process.run("forward")
                return time.perf_counter() - began

        runs = {COLD: cold, WARM: lambda: start(case, cache)[0]}
        runs |= {code: functools.partial(their, opener) for code, opener in officials.items()}
        timings = take_turns(runs, calls=calls, seconds=0, after_turn=after_turn)
    return [Row(case, name, platform, timing) for name, timing in timings.items()]


def start(case: Case, cache: str) -> tuple[float, str]:
    """Starts a process that evaluates a case once, and waits for its end.

    Args:
        cache: folder of the compilation cache.

    Returns:
        Seconds to the first logits, and the platform of the devices.

    Raises:
        UserError: the process fails.
    """
    began = time.perf_counter()
    with _process(json.dumps({**case._asdict(), "cache": cache})) as process:
        line = process.stdout.readline()
        seconds = time.perf_counter() - began
        if not line:
            raise UserError(f"{case} does not run in a new process: {_last_line(process)}")
    return seconds, line.strip()


@contextmanager
def _process(given: str):
    with tempfile.TemporaryFile("w+") as messages:
        root = Path(__file__).parents[2]
        process = subprocess.Popen(
            [sys.executable, "-m", _WORKER, given], stdout=subprocess.PIPE, stderr=messages, text=True, cwd=root
        )
        process.messages = messages
        try:
            yield process
        finally:
            process.stdout.close()
            process.wait()


def _last_line(process: subprocess.Popen) -> str:
    status = process.wait()
    process.messages.seek(0)
    lines = process.messages.read().strip().splitlines()
    return lines[-1] if lines else f"it ended with status {status}"


def table(rows: Sequence[Row]) -> str:
    """A line for each row."""
    head = ["model", "img", "batch", "dtype", "code", "start s", "(least - greatest)", "calls"]
    lines = [
        [
            row.case.model,
            str(row.case.img_size),
            str(row.case.batch),
            row.case.dtype,
            row.code,
            f"{row.timing.median:.2f}",
            f"({row.timing.least:.2f} - {row.timing.greatest:.2f})",
            str(row.timing.calls),
        ]
        for row in rows
    ]
    return tables.columns(head, lines, left=5)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ours.add_arguments(parser, batch_size=1)
    parser.add_argument("--calls", type=int, default=5, help="processes of each kind [5]")
    parser.add_argument("--csv", metavar="FILE", help="file for all measurements")
    official.add_arguments(parser)


def main(args: argparse.Namespace) -> None:
    options.check_positive("--calls", args.calls)
    options.check_positive("--threads", args.threads)
    cases = ours.cases(args)
    officials = official.openers(args)
    rows: list[Row] = []
    turns = len(cases) * (2 + len(officials)) * args.calls
    try:
        with tqdm(total=turns, desc="measuring", unit="process", disable=None, leave=False) as bar:
            for case in cases:
                bar.set_postfix_str(str(case))
                rows += measure(case, calls=args.calls, officials=officials, after_turn=bar.update)
                if args.csv:
                    tables.write_csv(args.csv, [row.record() for row in rows])
    finally:  # what was measured before an error is shown
        if rows:
            print(table(rows))
