"""Speed of exported models in ONNX Runtime on a CPU, next to our own forward pass, and optionally the official code.

    polaformer benchmark onnx --models pola_pvt_t pola_swin_t --batch-sizes 1 8 --csv onnx.csv
    polaformer benchmark onnx --onnx-python ~/onnx/bin/python --official ~/PolaFormer

Images are random. ONNX Runtime runs in a process of its own, where the file is written first, with its default options
except for the number of threads (`--threads`). All measurements of one model and batch take turns.
"""

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from tqdm import tqdm

from polaformer_jax.benchmark import model, official, options, ours
from polaformer_jax.benchmark.model import OURS, Row
from polaformer_jax.benchmark.ours import CLASSES, Case, experiment
from polaformer_jax.benchmark.workers import Worker
from polaformer_jax.errors import UserError
from polaformer_jax.files import tables

CODE = "ONNX Runtime"
_WORKER = Path(__file__).with_name("onnx_worker.py")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ours.add_arguments(parser, batch_size=8)
    options.add_timing(parser)
    parser.add_argument(
        "--onnx-python",
        metavar="PYTHON",
        default=sys.executable,
        help='a Python with "polaformer_jax[onnx]" [this one]',
    )
    official.add_arguments(parser)


def main(args: argparse.Namespace) -> None:
    options.check_timing(args)
    options.check_positive("--threads", args.threads)
    wanted = ours.cases(args)
    if args.dtypes != ["float32"]:
        raise UserError(f"--dtypes {' '.join(args.dtypes)}: ONNX files are written in float32")
    device = jax.devices()[0]
    if device.platform != "cpu":
        raise UserError(f"JAX is on a {device.platform}, and ONNX Runtime is measured on a CPU: set JAX_PLATFORMS=cpu")
    python = official.interpreter(args.onnx_python, "onnx_python", "polaformer_jax[onnx]")
    openers = {CODE: functools.partial(OnnxRuntime, python=python, threads=args.threads), **official.openers(args)}
    rows: list[Row] = []
    try:
        with tqdm(total=len(wanted) * (len(openers) + 1) * args.calls, unit="turn", disable=None, leave=False) as bar:
            for case in wanted:
                bar.set_postfix_str(str(case))
                rows += model.measure(
                    case,
                    experiment(case, [device]),
                    modes=["forward"],
                    calls=args.calls,
                    seconds=args.seconds,
                    officials=openers,
                    after_turn=bar.update,
                )
                if args.csv:
                    tables.write_csv(args.csv, [row.record() for row in rows])
    finally:  # what was measured before an error is shown
        if rows:
            print("\n".join([model.table(rows), "", *ratios(rows)]))


class OnnxRuntime(Worker):
    """One exported model, loaded and warm; see `Worker`.

    Args:
        modes: only "forward" exists.
        platform: of JAX's device, a CPU.
        python: a Python with this package and its extra `onnx`.
        threads: of ONNX Runtime.

    Raises:
        UserError: it cannot be exported or run.
    """

    def __init__(self, case: Case, modes: Sequence[str], platform: str, *, python: str, threads: int):
        assert platform == "cpu" and list(modes) == ["forward"]
        question = {
            "model": case.model,
            "arguments": {"img_size": case.img_size, "num_classes": CLASSES},
            "batch": case.batch,
            "modes": list(modes),
            "threads": threads,
        }
        failure = (
            f"{case} does not run in ONNX Runtime: {{error}}. It needs a Python with polaformer_jax[onnx]: give it as "
            "--onnx-python"
        )
        super().__init__([python, _WORKER], question, failure=failure)


def ratios(rows: Sequence[Row]) -> Iterator[str]:
    """For each case, how fast ONNX Runtime is relative to the others."""
    for row in rows:
        if row.code == CODE:
            others = [other for other in rows if other.case == row.case and other.code != CODE]
            speeds = (f"{row.images_per_s / other.images_per_s:.2f} x {_name(other)}" for other in others)
            yield f"{CODE}, {row.case}: {', '.join(speeds)}"


def _name(row: Row) -> str:
    return "JAX" if row.code == OURS else row.code
