"""Compiles the real training step for TPUs that are not here, and says what it needs and how fast it could be.

    polaformer aot --config pola_swin:b --topology v5e:16x16
    polaformer aot --config pola_swin:b --topology v5e:2x4 --config.mesh.fsdp=8 --csv b.csv
    polaformer aot --config pola_pvt:s --topology v5e:2x4 --largest-batch

Needs libtpu (the extras `train` and `tpu`), but neither a TPU nor the data set. Times are
estimates from published peaks.
"""

import sys
from collections.abc import Sequence

from polaformer_jax.cli import command
from polaformer_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("aot", __doc__)
    parser.add_config_argument(help="recipe of the training")
    parser.add_argument("--topology", help="of the chips: v5e:16x16, v5p:2x2x2; or cpu:8 for a trial")
    parser.add_argument("--num-examples", type=command.positive_integer, help="size of the training set [ImageNet's]")
    parser.add_argument("--largest-batch", action="store_true", help="find the largest batch that fits, by compiling")
    parser.add_argument("--csv", metavar="FILE", help="file for the same as a row of a table")
    return command.run(lambda: _compile(parser, sys.argv[1:] if argv is None else argv))


def _compile(parser: command.Parser, argv: Sequence[str]) -> None:
    args, config = parser.parse_with_config(argv)
    if config is None or args.topology is None:
        raise UserError("--config and --topology are needed, e.g. --config pola_swin:b --topology v5e:16x16")
    import jax

    from polaformer_jax.aot.compiling import compile_step, topology_devices
    from polaformer_jax.aot.largest import largest_batch
    from polaformer_jax.aot.report import describe, row
    from polaformer_jax.data.sources import IMAGENET_EXAMPLES
    from polaformer_jax.files import tables
    from polaformer_jax.training import progress

    progress.set_up_logging()
    tables.check_csv(args.csv)
    # Programs are compiled for the topology and not run; a TPU of this machine is not used.
    jax.config.update("jax_platforms", "cpu")
    devices = topology_devices(args.topology)
    compiling = largest_batch if args.largest_batch else compile_step
    program = compiling(config, devices, num_examples=args.num_examples or IMAGENET_EXAMPLES)
    print(describe(program))
    if args.csv is not None:
        tables.write_csv(args.csv, [row(args.topology, program)])
