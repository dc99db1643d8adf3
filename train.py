"""Trains a PolaFormer.

    python train.py --config configs/digits.py --workdir runs/digits
    python train.py --config configs/pola_swin.py:t --config.data.data_dir=/data/tfds --workdir runs/pola_swin_t

The same command started again goes on where the run ended. SIGTERM or Ctrl-C saves a checkpoint first, and then ends
with status 75, on which a scheduler can queue the run again.
"""

from absl import flags
from ml_collections import config_flags

from polaformer_jax.cli import command_line
from polaformer_jax.errors import UserError
from polaformer_jax.training.signals import StopRequests

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/digits.py:swin.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps checkpoints, logs and pictures.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print config, parameters, batch shapes and memory, and end.")


def main(argv: list[str]) -> None:
    if CONFIG.value is None:
        raise UserError("--config is needed, e.g. --config configs/digits.py")
    if WORKDIR.value is None and not DRY_RUN.value:
        raise UserError("--workdir is needed: the folder in which the run keeps what it writes")
    with StopRequests() as stop:
        _train(stop)


def _train(stop: StopRequests) -> None:
    # Imported here, since processes that read data import this file again.
    import jax

    from polaformer_jax.hardware.host_memory import keep_freed_memory
    from polaformer_jax.training import loop, progress, report, runtime
    from polaformer_jax.training.experiment import Experiment

    keep_freed_memory()
    progress.set_up_logging()
    with runtime.session(CONFIG.value.distributed):
        if DRY_RUN.value:
            print(report.describe_dry(Experiment(CONFIG.value)))
            return
        result = loop.train(CONFIG.value, WORKDIR.value, stop=stop)
        if jax.process_index() == 0:
            print(report.describe(result, WORKDIR.value))


if __name__ == "__main__":
    command_line.run(main)
