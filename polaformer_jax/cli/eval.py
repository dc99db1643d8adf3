"""Evaluates a training, or a file of weights.

    polaformer eval --workdir runs/digits                                 # the best checkpoint of a training
    polaformer eval --workdir runs/digits --checkpoint latest --predictions predictions.csv
    polaformer eval --workdir runs/digits --save-weights mine.safetensors
    polaformer eval --config digits --config.init.weights=mine.safetensors

Prints the result as JSON, and writes it to WORKDIR/eval.json or to the file that --json names.
"""

import json
import sys
from collections.abc import Sequence

from polaformer_jax.cli import command

# Options whose names are not those of the parameters of `evaluation.evaluate`.
OPTIONS = {"json_path": "--json", "predictions_path": "--predictions", "weights_path": "--save-weights"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("eval", __doc__)
    parser.add_config_argument(help="recipe to evaluate on [the config of the run in --workdir]")
    parser.add_argument("--workdir", metavar="DIR", help="work directory of a training")
    parser.add_argument("--checkpoint", metavar="WHICH", help="of the training: best, latest, or a step [best]")
    parser.add_argument("--weights", choices=("raw", "ema"), help="of the checkpoint [the config's eval.weights]")
    parser.add_argument("--split", help="split to evaluate [the config's data.test_split, or data.eval_split]")
    parser.add_argument("--data-dir", metavar="DIR", help="where the data is now [the config's data.data_dir]")
    parser.add_argument("--json", metavar="FILE", help="file for the result [WORKDIR/eval.json]")
    parser.add_argument("--predictions", metavar="FILE", help="CSV file with one row for each example")
    parser.add_argument("--save-weights", metavar="FILE", help=".safetensors file for the evaluated weights")
    parser.add_argument("--verbose", action="store_true", help="show messages of Orbax and other libraries too")
    return command.run(lambda: _main(parser, sys.argv[1:] if argv is None else argv), options=OPTIONS)


def _main(parser: command.Parser, argv: Sequence[str]) -> None:
    args, config = parser.parse_with_config(argv)
    # Imported here, since processes that read data import the main script again.
    import jax

    from polaformer_jax.config import defaults
    from polaformer_jax.hardware.host_memory import keep_freed_memory
    from polaformer_jax.training import progress, runtime

    keep_freed_memory()
    progress.set_up_logging(verbose=args.verbose)
    # Without --config, the hosts are those that the environment names: those of the training may be others.
    with runtime.session((config or defaults()).distributed):
        result, problem = command.outcome(lambda: _evaluate(config, args))
        if jax.process_index() == 0:
            print(json.dumps(result, indent=2))
    if problem is not None:  # after all processes have ended their work
        raise problem


def _evaluate(config, args) -> dict:
    from polaformer_jax.training import evaluation

    return evaluation.evaluate(
        config,
        args.workdir,
        checkpoint=args.checkpoint,
        kind=args.weights,
        data_dir=args.data_dir,
        split=args.split,
        json_path=args.json,
        predictions_path=args.predictions,
        weights_path=args.save_weights,
    )
