"""Takes weights out of a training: python -m polaformer_jax.cli.export --workdir RUN OUT.safetensors"""

import argparse
import sys
from collections.abc import Sequence

from etils import epath

from polaformer_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m polaformer_jax.cli.export",
        description="Writes the weights of a training's checkpoint to a file.",
    )
    parser.add_argument("out", metavar="OUT", help="file to write, .safetensors")
    parser.add_argument("--workdir", required=True, help="work directory of the training")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--checkpoint", help="best, latest or a step [best]")
    parser.add_argument("--weights", choices=("raw", "ema"), help="ema: the moving average [the run's eval.weights]")
    parser.add_argument(
        "--layout", choices=("ours", "torch"), default="ours", help="torch: official names and layouts [ours]"
    )
    args = parser.parse_args(argv)
    from polaformer_jax.training import progress
    from polaformer_jax.training.export import export

    progress.set_up_logging()
    try:
        if epath.Path(args.out).exists() and not args.overwrite:
            raise UserError(f"{args.out} exists: give another name, or --overwrite")
        step = export(args.workdir, args.out, checkpoint=args.checkpoint, kind=args.weights, layout=args.layout)
    except (UserError, OSError) as error:  # OSError: OUT cannot be written
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "status", 1)
    print(f"{args.out}: the weights of step {step}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
