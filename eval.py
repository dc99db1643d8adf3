"""Evaluates a trained PolaFormer.

    python eval.py --workdir runs/digits                                 # the best checkpoint of a training
    python eval.py --workdir runs/digits --checkpoint latest --predictions predictions.csv
    python eval.py --workdir runs/digits --save_weights mine.safetensors
    python eval.py --config configs/digits.py --config.init.weights=mine.safetensors

Prints the result as JSON, and writes it to WORKDIR/eval.json or where --json says.
"""

import json

from absl import flags
from ml_collections import config_flags

from polaformer_jax.cli import command_line

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file; without it, the config of the run in --workdir.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of a training.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Which of its checkpoints: best, latest, or a step. [best]")
KIND = flags.DEFINE_enum("weights", None, ["raw", "ema"], "Which of its weights. [the config's eval.weights]")
SPLIT = flags.DEFINE_string("split", None, "Split to evaluate. [the config's data.test_split, or data.eval_split]")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where the data is now, if not where the config says.")
JSON = flags.DEFINE_string("json", None, "File for the result. [WORKDIR/eval.json]")
PREDICTIONS = flags.DEFINE_string("predictions", None, "File for a CSV table with one row an example.")
SAVE_WEIGHTS = flags.DEFINE_string("save_weights", None, "File (.safetensors) for the weights that are evaluated.")


def main(argv: list[str]) -> None:
    # Imported here, since processes that read data import this file again.
    import jax

    from polaformer_jax.config import defaults
    from polaformer_jax.hardware.host_memory import keep_freed_memory
    from polaformer_jax.training import evaluation, progress, runtime

    keep_freed_memory()
    progress.set_up_logging()
    # Without --config, the hosts are those that the environment names: those of the training may be others.
    with runtime.session((CONFIG.value or defaults()).distributed):
        result = evaluation.evaluate(
            CONFIG.value,
            WORKDIR.value,
            checkpoint=CHECKPOINT.value,
            kind=KIND.value,
            data_dir=DATA_DIR.value,
            split=SPLIT.value,
            json_path=JSON.value,
            predictions_path=PREDICTIONS.value,
            weights_path=SAVE_WEIGHTS.value,
        )
        if jax.process_index() == 0:
            print(json.dumps(result, indent=2))


if __name__ == "__main__":
    command_line.run(main)
