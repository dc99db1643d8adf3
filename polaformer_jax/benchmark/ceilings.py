"""The two ceilings of a device, measured: how fast it multiplies matrices, and how fast it reads and writes memory.

    polaformer benchmark ceilings --csv ceilings.csv

The product is of two square matrices; the pass reads an array and writes one of the same size. No program of the same
dtype is much faster, and none reaches the published peaks.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from tqdm import tqdm

from polaformer_jax.benchmark import options
from polaformer_jax.benchmark.timing import Timing, seconds_of, take_turns, warm
from polaformer_jax.files import tables
from polaformer_jax.hardware.chips import chip_of

SIDE = {"cpu": 2048}  # of the matrices
SIDE_OF_ACCELERATORS = 8192
MIB = 2**20


class Ceiling(NamedTuple):
    """One ceiling.

    Attributes:
        name: "product" or "memory".
        dtype: of the arrays.
        unit: of the rates: "TFLOP/s" or "GB/s".
        work: TFLOP or GB per call.
        peak: the published rate; None if it is not known.
        timing: seconds per call.
    """

    name: str
    dtype: str
    unit: str
    work: float
    peak: float | None
    timing: Timing

    @property
    def rate(self) -> float:
        return self.work / self.timing.median

    def record(self) -> dict[str, object]:
        """The row of a CSV file; None for unknown values."""
        return {
            "ceiling": self.name,
            "dtype": self.dtype,
            "unit": self.unit,
            "rate": f"{self.rate:.5g}",
            "rate_least": f"{self.work / self.timing.greatest:.5g}",
            "rate_greatest": f"{self.work / self.timing.least:.5g}",
            "calls": self.timing.calls,
            "published": self.peak and f"{self.peak:.5g}",
        }


def measure(
    dtypes: Sequence[str],
    *,
    side: int,
    mib: float,
    calls: int,
    seconds: float,
    after_turn: Callable[[], object] = lambda: None,
) -> list[Ceiling]:
    """Both ceilings on the first device, taking turns.

    Args:
        dtypes: dtypes of the matrices; the array that is read and written has the first of them.
        side: rows and columns of the matrices.
        mib: size of the array that is read.
        calls, seconds, after_turn: see `take_turns`.
    """
    chip = chip_of(jax.devices()[0].device_kind)
    runs, known = {}, {}
    for dtype in dtypes:
        matrix = jnp.ones((side, side), dtype)
        runs["product", dtype] = _warm(jax.jit(jnp.matmul), matrix, matrix)
        # The published peak is for bfloat16.
        peak = chip.flops / 1e12 if chip is not None and dtype == "bfloat16" else None
        known["product", dtype] = ("TFLOP/s", 2 * side**3 / 1e12, peak)
    dtype = dtypes[0]
    array = jnp.ones(int(mib * MIB) // jnp.dtype(dtype).itemsize, dtype)
    runs["memory", dtype] = _warm(jax.jit(jnp.negative), array)
    known["memory", dtype] = ("GB/s", 2 * array.nbytes / 1e9, chip and chip.memory_bandwidth / 1e9)
    timings = take_turns(runs, calls=calls, seconds=seconds, after_turn=after_turn)
    return [Ceiling(*name, *known[name], timing) for name, timing in timings.items()]


def _warm(program: Callable, *arrays: jax.Array) -> Callable[[], float]:
    warm(lambda: program(*arrays))
    return lambda: seconds_of(lambda: program(*arrays))


def table(ceilings: Sequence[Ceiling]) -> str:
    """A line for each ceiling."""
    lines = []
    for found in ceilings:
        least, greatest = found.work / found.timing.greatest, found.work / found.timing.least
        lines.append(
            (
                *(found.name, found.dtype, f"{found.rate:,.4g}", f"({least:,.4g} - {greatest:,.4g})", found.unit),
                tables.number(found.peak, ",.4g"),
                tables.number(found.peak and found.rate / found.peak, ".0%"),
            )
        )
    return tables.columns(("ceiling", "dtype", "rate", "(least - greatest)", "unit", "published", "share"), lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtypes", nargs="+", choices=options.DTYPES, default=["bfloat16", "float32"], help="[both]")
    parser.add_argument(
        "--side",
        type=int,
        help=f"rows and columns of the matrices [{SIDE['cpu']} on CPUs, otherwise {SIDE_OF_ACCELERATORS}]",
    )
    parser.add_argument("--mib", type=float, default=512, help="size of the array that is read [512]")
    options.add_timing(parser)


def main(args: argparse.Namespace) -> None:
    options.check_timing(args)
    options.check_positive("--side", args.side)
    options.check_positive("--mib", args.mib)
    dtypes = list(dict.fromkeys(args.dtypes))
    side = args.side or SIDE.get(jax.default_backend(), SIDE_OF_ACCELERATORS)
    total = (len(dtypes) + 1) * args.calls
    with tqdm(total=total, desc="measuring", unit="turn", disable=None, leave=False) as bar:
        found = measure(dtypes, side=side, mib=args.mib, calls=args.calls, seconds=args.seconds, after_turn=bar.update)
    print(table(found))
    if args.csv:
        kind = jax.devices()[0].device_kind
        tables.write_csv(args.csv, [{**ceiling.record(), "device": kind} for ceiling in found])
