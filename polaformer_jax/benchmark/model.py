"""Speed of whole models: forward, with gradients, and the training step; optionally compared with the official code.

    polaformer benchmark model --models pola_pvt_t pola_swin_t --batch-sizes 8 32 --csv model.csv
    polaformer benchmark model --models pola_swin_t --modes forward               # like the official --throughput
    polaformer benchmark model --models pola_pvt_t --modes forward gradient --official ~/PolaFormer

Images are random and on the device. All measurements of one model, batch and dtype take turns, including those in the
official process; compiling is timed separately.
"""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
from tqdm import tqdm

from polaformer_jax.benchmark import official, options, ours
from polaformer_jax.benchmark.ours import MODES, Case, Subject, experiment, subject
from polaformer_jax.benchmark.programs import GIB
from polaformer_jax.benchmark.timing import Timing, take_turns
from polaformer_jax.errors import UserError
from polaformer_jax.files import tables
from polaformer_jax.hardware.chips import chip_of
from polaformer_jax.hardware.costs import is_out_of_memory
from polaformer_jax.training.experiment import Experiment

OURS = "ours"


class Row(NamedTuple):
    """One measurement.

    Attributes:
        case: the model and its images.
        mode: "forward", "gradient" or "step".
        code: `OURS`, or the name of the official code.
        devices: number of JAX devices over which the batch was split; the official code runs on one.
        device_kind: what JAX calls them.
        subject: what was timed.
        timing: seconds per batch.
    """

    case: Case
    mode: str
    code: str
    devices: int
    device_kind: str
    subject: Subject
    timing: Timing

    @property
    def images_per_s(self) -> float:
        return self.case.batch / self.timing.median

    @property
    def mfu(self) -> float | None:
        """Fraction of the published bfloat16 peak, whatever the dtype; None if the peak or the count is not known."""
        if (chip := chip_of(self.device_kind)) is None or self.subject.flops is None:
            return None
        return self.subject.flops / (self.timing.median * self.devices * chip.flops)

    def record(self) -> dict[str, object]:
        """The row of a CSV file; None for unknown values."""
        subject, timing = self.subject, self.timing
        return {
            "model": self.case.model,
            "img_size": self.case.img_size,
            "batch": self.case.batch,
            "dtype": self.case.dtype,
            "device": self.device_kind,
            "devices": self.devices,
            "code": self.code,
            "mode": self.mode,
            "images_per_s": f"{self.images_per_s:.5g}",
            "images_per_s_least": f"{self.case.batch / timing.greatest:.5g}",
            "images_per_s_greatest": f"{self.case.batch / timing.least:.5g}",
            "calls": timing.calls,
            "compile_s": subject.compile_s and f"{subject.compile_s:.2f}",
            "memory_gib": subject.memory and f"{subject.memory / GIB:.4f}",
            "memory_by": subject.memory_by,
            "gflops": subject.flops and f"{subject.flops / 1e9:.5g}",
            "mfu": self.mfu and f"{self.mfu:.4f}",
        }


def measure(
    case: Case,
    made: Experiment,
    *,
    modes: Sequence[str],
    calls: int,
    seconds: float,
    officials: Mapping[str, official.Opener],
    after_turn: Callable[[], object] = lambda: None,
) -> list[Row]:
    """All measurements of one case, taking turns.

    Args:
        made: the `experiment` of the case, on whose devices it is measured.
        modes: those of `MODES` to measure. The official code has only `official.MODES`.
        calls, seconds: see `take_turns`.
        officials: start the official code, one for each requested variant, see `official.openers`.

    Raises:
        UserError: the case does not fit into the memory, or the official code does not run.
    """
    devices = list(made.mesh.devices.flat)
    shared = [mode for mode in modes if mode in official.MODES]
    with contextlib.ExitStack() as stack:
        subjects: dict[tuple[str, str], Subject] = {}
        theirs = {
            code: stack.enter_context(opener(case, shared, devices[0].platform)).subjects
            for code, opener in officials.items()
            if shared
        }
        try:
            for mode in modes:
                subjects[mode, OURS] = subject(made, case, mode)
                subjects |= {(mode, code): found[mode] for code, found in theirs.items() if mode in found}
            runs = {name: each.run for name, each in subjects.items()}
            timings = take_turns(runs, calls=calls, seconds=seconds, after_turn=after_turn)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(f"{case} does not fit into the device's memory: take smaller --batch-sizes") from error
    return [
        Row(case, mode, who, len(devices) if who == OURS else 1, devices[0].device_kind, each, timings[mode, who])
        for (mode, who), each in subjects.items()
    ]


def table(rows: Sequence[Row]) -> str:
    """All measurements in columns, then our speed relative to that of the official code."""
    head = (
        *("model", "img", "batch", "dtype", "mode", "code", "images/s", "(least - greatest)"),
        *("calls", "compile s", "GiB", "by", "GFLOPs", "MFU"),
    )
    cells = []
    for row in rows:
        case, batch, timing, found = row.case, row.case.batch, row.timing, row.subject
        cells.append(
            (
                *(case.model, str(case.img_size), str(batch), case.dtype, row.mode, row.code),
                f"{row.images_per_s:,.1f}",
                f"({batch / timing.greatest:,.1f} - {batch / timing.least:,.1f})",
                str(timing.calls),
                tables.number(found.compile_s, ".1f"),
                tables.number(found.memory and found.memory / GIB, ".2f"),
                found.memory_by or "-",
                tables.number(found.flops and found.flops / 1e9, ",.4g"),
                tables.number(row.mfu, ".1%"),
            )
        )
    return "\n".join([tables.columns(head, cells), *_ratios(rows)])


def _ratios(rows: Sequence[Row]) -> Iterator[str]:
    ours = {(row.case, row.mode): row for row in rows if row.code == OURS}
    for row in rows:
        if row.code != OURS:
            mine = ours[row.case, row.mode]
            yield f"{row.case}, {row.mode}: {mine.images_per_s / row.images_per_s:.2f} x {row.code}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = f"{parser.description}. `--modes forward` measures what the official --throughput does."
    ours.add_arguments(parser, batch_size=32)
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=tuple(MODES),
        default=["forward", "step"],
        help="forward: evaluation; gradient: cross-entropy of a batch and all its gradients, without an optimizer; "
        "step: the training step, with augmentation on the device and AdamW [forward step]",
    )
    parser.add_argument("--devices", type=int, help="number of devices [all]")
    options.add_timing(parser)
    official.add_arguments(parser)


def main(args: argparse.Namespace) -> None:
    options.check_timing(args)
    options.check_positive("--threads", args.threads)
    wanted = ours.cases(args)
    if args.official is not None:
        # JAX would otherwise allocate three quarters of a GPU's memory at once, and leave PyTorch the rest.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    devices = _devices(args.devices)
    officials = official.openers(args)
    if officials and len(devices) > 1 and devices[0].platform != "cpu":  # CPU devices share the cores
        raise UserError(f"--official runs on one device, but there are {len(devices)}: add --devices 1")
    made = {case: experiment(case, devices) for case in wanted}  # invalid cases are found before anything is measured
    things = len(wanted) * (len(args.modes) + len(officials) * len([m for m in args.modes if m in official.MODES]))
    rows: list[Row] = []
    try:
        with tqdm(total=things * args.calls, desc="measuring", unit="turn", disable=None, leave=False) as bar:
            for case in wanted:
                bar.set_postfix_str(str(case))
                rows += measure(
                    case,
                    made[case],
                    modes=args.modes,
                    calls=args.calls,
                    seconds=args.seconds,
                    officials=officials,
                    after_turn=bar.update,
                )
                if args.csv:
                    tables.write_csv(args.csv, [row.record() for row in rows])
    finally:  # what was measured before an error is shown
        if rows:
            print(table(rows))


def _devices(count: int | None) -> list[jax.Device]:
    devices = jax.devices()
    if count is not None and not 1 <= count <= len(devices):
        raise UserError(f"--devices is {count}, but there are {len(devices)}: give 1 to {len(devices)}")
    return devices[:count]
