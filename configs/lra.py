"""The Long Range Arena: long sequences, classified by two layers with polarity-aware or another attention.

    polaformer prepare lra_listops --data-dir data
    polaformer train --config lra:listops,alpha=3 --workdir runs/listops_alpha3
    polaformer results add runs/listops_alpha3      # as a row of docs/results/lra.csv

Tasks: listops, text, retrieval, pathfinder, image_lra; and listops_short, which is not part of the Long Range Arena:
ListOps of 51 to 255 symbols, for a CPU. Options: `alpha=` (3), `attention=` (polarity, softmax or relu),
`tokenisation=` of ListOps (no_brackets, on which the published figures were measured, or brackets), `seed=`, `steps=`.

Published accuracy of PolaFormer in % (the paper; alpha 3, 5, 7): listops 37.35, 38.76, 37.60; text 73.06, 72.33, 71.93;
retrieval 80.50, 80.37, 81.47; pathfinder 70.53, 68.98, 69.09; image 42.15, 41.91, 42.77.
Ours: docs/long_range_arena.md.

Batch, learning rate, warm-up, steps and evaluations are those of https://github.com/pkuzengqi/Skyformer; dev accuracy
after the first 20 % of the steps chooses the checkpoint, whose test accuracy is reported once.
"""

from typing import NamedTuple

from polaformer_jax.config import SEQUENCE_TASKS, defaults
from polaformer_jax.training.recipes import parse_arg


class Recipe(NamedTuple):
    """What differs between the tasks."""

    num_classes: int
    batch_size: int
    lr: float
    warmup: int  # steps
    eval_every: int  # steps


RECIPES = {
    "listops": Recipe(10, 32, 1e-4, 1000, 500),
    "text": Recipe(2, 32, 1e-4, 80, 500),
    "retrieval": Recipe(2, 16, 2e-4, 800, 1000),
    "pathfinder": Recipe(2, 128, 2e-4, 312, 500),
    "image_lra": Recipe(10, 256, 1e-4, 175, 50),
    "listops_short": Recipe(10, 32, 5e-4, 500, 500),
}
STEPS = 50_000


def get_config(arg=None):
    arg = parse_arg(
        arg,
        models=tuple(RECIPES),
        first="task",
        only={
            "alpha": ("attention", ("polarity",)),
            "tokenisation": ("task", tuple(task for task, known in SEQUENCE_TASKS.items() if known != (None,))),
        },
        attention="polarity",
        alpha=3.0,
        tokenisation="no_brackets",
        seed=0,
        steps=STEPS,
    )
    task, recipe = arg.task, RECIPES[arg.task]
    config = defaults()
    config.seed = arg.seed
    config.task.name = task
    config.model.attention = arg.attention
    config.task.tokenisation = arg.tokenisation
    config.model.name = "pola_sequence"
    config.model.num_classes = recipe.num_classes
    config.model.alpha = arg.alpha
    config.model.dtype = "float32"  # the model is too small for bfloat16 to gain much

    config.data.source = "lra"
    config.data.name = "lra_image" if task == "image_lra" else f"lra_{task}"
    config.data.eval_split = "dev"
    config.data.test_split = "test"
    config.data.workers = 1  # reading takes a millisecond per batch
    config.data.prefetch = 8

    config.train.steps = arg.steps
    config.train.batch_size = recipe.batch_size
    config.train.label_smoothing = 0.0
    config.optimizer.lr = recipe.lr
    config.optimizer.lr_base_batch = recipe.batch_size
    config.optimizer.eps = 1e-6
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_value = 1.0
    config.schedule.name = "one_cycle"
    config.schedule.warmup = float(min(recipe.warmup, arg.steps))

    config.eval.every = float(recipe.eval_every)
    config.eval.batch_size = 2 * recipe.batch_size
    config.checkpoint.every_steps = recipe.eval_every
    config.checkpoint.best_after = 0.2
    config.lock()
    return config
