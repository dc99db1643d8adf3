"""PolaFormer++ on ImageNet-1k, 224 pixels: the published recipes.

    polaformer train --config pola_pp:b2 --workdir runs/pola_pp_b2 --config.data.data_dir=/data/tfds

Models: b0 to b5. The family is not purely linear: in all of them stages 1 and 2 have linear attention, stages 3 and 4
softmax attention. Published top-1 (the authors', not measured here): b0 76.9 %, b1 79.1 %, b2 82.8 %, b3 84.3 %, b4
85.4 %, b5 85.6 %; a plot of theirs shows 76.4 % for b0 and 86.0 % for b5.

The batches are those of the official launch on 8 devices. Evaluated, and used to choose the best checkpoint, is the
moving average of parameters and running statistics. How b5 is trained from scratch is not published: for it there is
only `recipe=finetune`, the published fine-tuning of trained weights (`--config.init.weights`).

Options: `recipe=` scratch, or finetune (b5 only).
"""

from polaformer_jax.config import defaults, use_official_augmentation
from polaformer_jax.errors import UserError
from polaformer_jax.training.recipes import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, models=("b2", "b0", "b1", "b3", "b4", "b5"), recipe="scratch")
    if arg.recipe not in ("scratch", "finetune"):
        raise UserError(f"config option recipe={arg.recipe}: it is scratch or finetune")
    if arg.model == "b5" and arg.recipe == "scratch":
        raise UserError(
            "how pola_pp_b5 is trained from scratch is not published. Fine-tune trained weights by the published recipe"
            " (pola_pp:b5,recipe=finetune with --config.init.weights), or set another model's recipe to it"
            " (pola_pp:b4 --config.model.name=pola_pp_b5)"
        )
    if arg.model != "b5" and arg.recipe == "finetune":
        raise UserError(
            f"recipe=finetune: only that of b5 is published, not that of {arg.model}; see the recipe finetune"
        )
    config = defaults()
    config.model.name = f"pola_pp_{arg.model}"

    use_official_augmentation(config)
    config.train.epochs = 300.0
    config.train.batch_size = {"b0": 2048, "b1": 2048, "b2": 2048, "b3": 1024, "b4": 1024, "b5": 512}[arg.model]
    config.optimizer.lr = 5e-4
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 5.0
    config.schedule.warmup = 20.0
    config.schedule.warmup_lr = 5e-7
    config.schedule.min_lr = 1e-7
    if arg.model == "b4":
        config.optimizer.clip_norm = 1.0
        config.schedule.warmup = 5.0
        config.schedule.warmup_lr = 1e-7
        config.schedule.min_lr = 1e-5
        config.schedule.cooldown = 10.0
    if arg.model == "b5":
        config.optimizer.lr = 2e-5
        config.optimizer.weight_decay = 1e-8
        config.optimizer.clip_norm = None
        config.schedule.warmup = 1.0
        config.schedule.min_lr = 5e-6
        config.schedule.cooldown = 5.0

    config.ema.decay = 0.99982
    config.eval.weights = "ema"
    config.lock()
    return config
