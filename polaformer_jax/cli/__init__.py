"""The console command `polaformer`, with one module for each subcommand.

Imports nothing heavy: the processes that read data import the main script, and so this file, again.
"""

import importlib
import sys
from collections.abc import Sequence

import polaformer_jax

# Subcommands, and the modules that hold them: each has `main(argv) -> exit status`.
COMMANDS = {
    "train": ("train", "train a model, or resume a training"),
    "eval": ("eval", "evaluate a training, or a file of weights"),
    "predict": ("predict", "classify image files, and show where the model looks"),
    "convert": ("convert", "convert official PyTorch checkpoints to .safetensors, and back"),
    "export": ("export", "write a model to a file: weights, StableHLO or ONNX"),
    "push": ("push", "upload a model to the Hugging Face Hub"),
    "prepare": ("prepare", "prepare a data set"),
    "preview": ("preview", "draw a training batch before and after each augmentation"),
    "benchmark": ("benchmark", "measure speed and memory on this machine"),
    "aot": ("aot", "compile the training step for devices that are not here"),
    "results": ("results", "collect results of trainings, and make the tables of the documentation"),
    "entropy": ("entropy", "measure how concentrated attention is in trained models"),
    "lra-baseline": ("lra_baseline", "answer ListOps by the first operator of each expression"),
    "lra-sheet": ("lra_sheet", "draw Pathfinder examples with their labels"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns its exit status.

    Args:
        argv: the words of the command line, without the program's name; None: those of this process.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"polaformer_jax {polaformer_jax.__version__}")
        return 0
    if argv[0] not in COMMANDS:
        import difflib

        similar = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f" Did you mean {similar[0]}?" if similar else ""
        print(f"error: there is no command {argv[0]!r}.{hint}\n\n{_help()}", file=sys.stderr)
        return 2
    module, _ = COMMANDS[argv[0]]
    from polaformer_jax.cli import command

    return command.run(lambda: importlib.import_module(f"{__name__}.{module}").main(argv[1:]))


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: polaformer COMMAND ...   (polaformer COMMAND --help says more, polaformer --version the version)",
            "",
            "PolaFormer in JAX: train, evaluate and use vision transformers with polarity-aware linear attention.",
            "",
            "commands:",
            *lines,
        ]
    )
