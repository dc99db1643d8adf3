"""Writes the weights of a training's checkpoint to a file, also while the training runs.

polaformer export --workdir runs/digits mine.safetensors --checkpoint best      # or latest, or a step
polaformer export --workdir runs/digits average.safetensors --weights ema       # the moving average
"""

from collections.abc import Sequence

from polaformer_jax.cli import command
from polaformer_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("export", __doc__)
    parser.add_argument("out", metavar="OUT", help="file to write, .safetensors")
    parser.add_argument("--workdir", metavar="DIR", required=True, help="work directory of the training")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--checkpoint", metavar="WHICH", help="best, latest or a step [best]")
    parser.add_argument("--weights", choices=("raw", "ema"), help="ema: the moving average [the run's eval.weights]")
    parser.add_argument(
        "--layout", choices=("ours", "torch"), default="ours", help="torch: official names and layouts [ours]"
    )
    args = parser.parse_intermixed_args(argv)
    return command.run(lambda: _export(args), options={"out": "OUT"})


def _export(args) -> None:
    import jax

    from polaformer_jax.files import paths
    from polaformer_jax.training import progress
    from polaformer_jax.training.export import export

    progress.set_up_logging()
    # Files only: a running training may hold the accelerator, and one host of a TPU pod would wait for the others.
    jax.config.update("jax_platforms", "cpu")
    if paths.given(args.out, "out").exists() and not args.overwrite:
        raise UserError(f"{args.out} exists: give another name, or --overwrite")
    step = export(args.workdir, args.out, checkpoint=args.checkpoint, kind=args.weights, layout=args.layout)
    print(f"{args.out}: the weights of step {step}")
