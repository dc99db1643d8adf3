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
    "ceilings": "the two ceilings of a device: matrix products, and reading and writing memory",
    "model": "images/s of whole models: forward, with gradients, and the training step",
    "profile": "where the time of a model goes, operation by operation",
    "start": "seconds from the start of a process to the first logits, without and with a compilation cache",
    "attention": "ms of the attention core alone against the number of tokens, beside softmax attention",
    "all": "on a GPU or TPU: ceilings, cores and models in bfloat16, in one go",
    "length": "time and memory of the sequence model against the length, with polarity, relu and softmax",
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m polaformer_jax.benchmark", description=__doc__.split(":")[0] + ".")
    subparsers = parser.add_subparsers(dest="subject", required=True, metavar="WHAT")
    module = None
    for subject, summary in SUBJECTS.items():
        options = subparsers.add_parser(subject, help=summary, description=summary)
        if argv and argv[0] == subject:  # the others would import much for nothing
            module = importlib.import_module(f"polaformer_jax.benchmark.{subject}")
            module.add_arguments(options)
    args = parser.parse_args(argv)
    try:
        module.main(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
