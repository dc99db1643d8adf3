"""Trains a model, or resumes a training.

    polaformer train --config digits --workdir runs/digits
    polaformer train --config pola_swin:t --config.data.data_dir=/data/tfds --workdir runs/pola_swin_t

The same command started again resumes where the run ended. SIGTERM or Ctrl-C saves a checkpoint and ends with status
75, on which a scheduler can queue the run again.
"""

import sys
from collections.abc import Sequence

from polaformer_jax.cli import command
from polaformer_jax.errors import UserError
from polaformer_jax.hardware.host_memory import keep_freed_memory
from polaformer_jax.training.signals import StopRequests


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("train", __doc__)
    parser.add_config_argument(help="recipe of the training")
    parser.add_argument("--workdir", metavar="DIR", help="directory for checkpoints, logs and pictures, or gs://...")
    parser.add_argument("--dry-run", action="store_true", help="print config, parameters, batches and memory, and end")
    parser.add_argument("--verbose", action="store_true", help="show messages of Orbax and other libraries too")
    return command.run(lambda: _main(parser, sys.argv[1:] if argv is None else argv))


def _main(parser: command.Parser, argv: Sequence[str]) -> None:
    args, config = parser.parse_with_config(argv)
    if config is None:
        raise UserError("--config is needed, e.g. --config digits")
    if args.workdir is None and not args.dry_run:
        raise UserError("--workdir is needed: the directory in which the run keeps what it writes")
    keep_freed_memory()  # before there is a second thread
    with StopRequests() as stop:
        _train(config, args, stop)


def _train(config, args, stop: StopRequests) -> None:
    # Imported here, since processes that read data import the main script again.
    import jax

    from polaformer_jax.training import loop, progress, reports, runtime
    from polaformer_jax.training.experiment import Experiment

    progress.set_up_logging(verbose=args.verbose)
    with runtime.session(config.distributed):
        if args.dry_run:
            print(reports.describe_dry(Experiment(config)))
            return
        result, problem = command.outcome(lambda: loop.train(config, args.workdir, stop=stop))
        if jax.process_index() == 0:
            print(reports.describe(result, args.workdir))
    if problem is not None:  # after all processes have ended their work
        raise problem
