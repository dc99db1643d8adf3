"""Compiles the real training step for devices that are not here, and says what it needs and how fast it could be.

    polaformer aot --config pola_swin:b --topology v5e:16x16
    polaformer aot --config pola_swin:b --topology v5e:2x4 --config.mesh.fsdp=8 --csv b.csv
    polaformer aot --config pola_swin:t --topology v5e:2x4 --traffic --traffic-csv parts.csv --traffic-plot parts.svg
    polaformer aot --config pola_pvt:s --topology v5e:2x4 --largest-batch
    polaformer aot --config pola_pvt:t --topology h100 --config.train.batch_size=128

TPU topologies need libtpu (the extras `train` and `tpu`), but no TPU. GPUs, h100 or the eight of a host, h100:8, need
JAX's plugin for CUDA in the version of JAX (jax-cuda12-plugin, jax-cuda12-pjrt, nvidia-cuda-nvcc-cu12), but neither GPU
nor driver. Nothing can be timed there: XLA takes its default for each product, where on a GPU it takes the fastest.
The data set is not needed. Times are estimates from published peaks.
"""

import os
import sys
from collections.abc import Sequence

from polaformer_jax.cli import command
from polaformer_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("aot", __doc__)
    parser.add_config_argument(help="recipe of the training")
    parser.add_argument("--topology", help="of the chips: v5e:16x16, v5p:2x2x2; h100, h100:8; or cpu:8 for a trial")
    parser.add_argument("--num-examples", type=command.positive_integer, help="size of the training set [ImageNet's]")
    parser.add_argument("--largest-batch", action="store_true", help="find the largest batch that fits, by compiling")
    parser.add_argument("--traffic", action="store_true", help="print memory traffic by part of the model")
    parser.add_argument("--csv", metavar="FILE", help="file for the report as a row of a table")
    parser.add_argument("--traffic-csv", metavar="FILE", help="file for memory traffic by part of the model, as rows")
    parser.add_argument("--traffic-plot", metavar="FILE", help="picture of it, a .png or .svg file")
    return command.run(lambda: _compile(parser, sys.argv[1:] if argv is None else argv))


def _compile(parser: command.Parser, argv: Sequence[str]) -> None:
    args, config = parser.parse_with_config(argv)
    if config is None or args.topology is None:
        raise UserError("--config and --topology are needed, e.g. --config pola_swin:b --topology v5e:16x16")
    import jax

    from polaformer_jax.aot import pictures, report
    from polaformer_jax.aot.compiling import compile_step
    from polaformer_jax.aot.largest import largest_batch
    from polaformer_jax.aot.topologies import topology_devices
    from polaformer_jax.data.sources import IMAGENET_EXAMPLES
    from polaformer_jax.files import figures, tables
    from polaformer_jax.training import progress

    progress.set_up_logging()
    tables.check_csv(args.csv)
    tables.check_csv(args.traffic_csv, "traffic_csv")
    if args.traffic_plot is not None:
        figures.check_name(args.traffic_plot, "traffic_plot")
    files = [os.path.realpath(name) for name in (args.csv, args.traffic_csv, args.traffic_plot) if name is not None]
    if len(set(files)) < len(files):
        raise UserError("--csv, --traffic-csv and --traffic-plot name one file more than once; give each its own")
    # Programs are compiled for the topology and not run; a TPU or GPU of this machine is not used.
    jax.config.update("jax_platforms", "cpu")
    devices = topology_devices(args.topology)
    compiling = largest_batch if args.largest_batch else compile_step
    program = compiling(config, devices, num_examples=args.num_examples or IMAGENET_EXAMPLES)
    print(report.describe(program))
    if args.traffic:
        print("\n" + report.traffic_table(program))
    if args.csv is not None:
        tables.write_csv(args.csv, [report.row(args.topology, program)])
    if args.traffic_csv is not None:
        tables.write_csv(args.traffic_csv, report.traffic_rows(args.topology, program))
    if args.traffic_plot is not None:
        figures.save(pictures.traffic(program), args.traffic_plot)
