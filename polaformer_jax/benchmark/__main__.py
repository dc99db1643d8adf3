"""How fast things are, on this machine: python -m polaformer_jax.benchmark WHAT (see --help).

Imports nothing heavy: processes that read data import this file again.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from polaformer_jax.errors import UserError

# What can be measured: each is a module here with `add_arguments(parser)` and `main(args)`.
SUBJECTS = {
    "input": "images/s per core of each stage of the training input, and of the whole",
    "model": "images/s of whole models: forward, with gradients, and the training step",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m polaformer_jax.benchmark", description=__doc__.split(":")[0] + ".")
    subparsers = parser.add_subparsers(dest="subject", required=True, metavar="WHAT")
    modules = {}
    for subject, summary in SUBJECTS.items():
        modules[subject] = importlib.import_module(f"polaformer_jax.benchmark.{subject}")
        modules[subject].add_arguments(subparsers.add_parser(subject, help=summary, description=summary))
    args = parser.parse_args(argv)
    try:
        modules[args.subject].main(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
