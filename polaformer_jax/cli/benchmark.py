"""Measures speed and memory on this machine.

polaformer benchmark model --models pola_pvt_t pola_swin_t
polaformer benchmark model --help                               # and so for every subject
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from polaformer_jax.cli import command

# What can be measured: each is a module of `benchmark`, with _ for -, with `add_arguments(parser)` and `main(args)`.
SUBJECTS = {
    "input": "images/s per core of each stage of the training input, and of the whole",
    "ceilings": "the two ceilings of a device: matrix products, and reading and writing memory",
    "model": "images/s of whole models: forward, with gradients, and the training step",
    "recipes": "time and memory of the training step of recipes, which take turns",
    "onnx": "images/s of exported models in ONNX Runtime on a CPU, next to ours and the official code",
    "profile": "where the time of a model goes, operation by operation",
    "start": "seconds from the start of a process to the first logits, without and with a compilation cache",
    "attention": "ms of the attention core against the number of tokens, next to softmax attention",
    "all": "on a GPU or TPU: ceilings, cores and models in bfloat16, in one go",
    "length": "time and memory of the sequence model against the length, with polarity, relu and softmax",
    "image-size": "time and memory of a segmenter against the size of its images, with polarity and softmax",
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = command.Parser("benchmark", __doc__)
    subparsers = parser.add_subparsers(
        dest="subject", required=True, metavar="SUBJECT", parser_class=argparse.ArgumentParser
    )
    module = None
    for subject, summary in SUBJECTS.items():
        options = subparsers.add_parser(subject, help=summary, description=summary)
        if argv and argv[0] == subject:  # the others would import much for nothing
            module = importlib.import_module(f"polaformer_jax.benchmark.{subject.replace('-', '_')}")
            module.add_arguments(options)
    args = parser.parse_args(argv)
    return command.run(lambda: _main(module, args))


def _main(module, args: argparse.Namespace) -> None:
    from polaformer_jax.files import tables
    from polaformer_jax.hardware.host_memory import keep_freed_memory

    keep_freed_memory()  # as training and evaluation do
    tables.check_csv(getattr(args, "csv", None))
    module.main(args)
