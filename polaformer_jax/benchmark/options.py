"""Options that the benchmarks share, and the errors for invalid values."""

import argparse

from polaformer_jax.errors import UserError

DTYPES = ("float32", "bfloat16")


def add_timing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--calls", type=int, default=10, help="least number of timed calls of each measurement [10]")
    parser.add_argument("--seconds", type=float, default=2.0, help="least time of the timed calls of each [2]")
    parser.add_argument("--csv", metavar="FILE", help="file for all measurements")


def check_timing(args: argparse.Namespace) -> None:
    """Raises a UserError for invalid values."""
    check_positive("--calls", args.calls)
    if not 0 <= args.seconds < float("inf"):
        raise UserError(f"--seconds is {args.seconds:g}: expected a number of at least 0")


def check_positive(flag: str, *values: float | None) -> None:
    """Raises a UserError unless all values except None are greater than zero."""
    if wrong := [value for value in values if value is not None and not value > 0]:
        raise UserError(f"{flag} has {wrong[0]:g}: expected more than 0")
