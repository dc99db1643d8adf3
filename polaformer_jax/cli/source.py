"""Options that name the model of a subcommand: a checkpoint of a training, or a file of weights."""

import argparse

from polaformer_jax.cli import command
from polaformer_jax.errors import UserError


def add_arguments(parser: command.Parser) -> None:
    parser.add_argument("--workdir", metavar="DIR", help="work directory of the training that has the model")
    parser.add_argument("--checkpoint", metavar="WHICH", help="of the training: best, latest or a step [best]")
    parser.add_argument(
        "--weights", choices=("raw", "ema"), help="of the checkpoint; ema: the moving average [the run's eval.weights]"
    )
    parser.add_argument("--source", metavar="FILE", help="in place of a training: .safetensors, .pth, or hf://...")
    parser.add_argument("--model", help="name of the model, where the file does not tell")


def check(args: argparse.Namespace) -> None:
    """Raises a UserError if the options do not name one model."""
    if (args.workdir is None) == (args.source is None):
        raise UserError("which model? Give --workdir DIR for that of a training, or --source FILE for weights")
    if args.source is not None and (args.checkpoint is not None or args.weights is not None):
        raise UserError("--checkpoint and --weights say which weights of a training: give --workdir DIR")
    if args.workdir is not None and args.model is not None:
        raise UserError("--model names the model of --source FILE; a training knows its own")


def load(args: argparse.Namespace):
    """The model that the options name."""
    if args.source is not None:
        from polaformer_jax import create_model

        return create_model(args.model, weights=args.source)
    from polaformer_jax.training.export import load_trained

    return load_trained(args.workdir, checkpoint=args.checkpoint, kind=args.weights)
