"""Small PolaFormers on Fashion-MNIST: to compare attentions, with a run that two CPU cores finish in minutes.

The 70,000 pictures of clothes of Xiao et al. (arXiv 1708.07747), 60,000 to train on and 10,000 to test with, 28x28
pixels, grey, resized to 32x32.

    polaformer prepare fashion_mnist --data-dir data                     # or from local files: prepare --help
    polaformer train --config fashion_mnist --workdir runs/fashion       # Pola-PVT
    polaformer train --config fashion_mnist:swin,attention=relu,seed=1 --workdir runs/fashion_swin_relu_1
    polaformer results add runs/fashion runs/fashion_swin_relu_1         # as rows of docs/results/

Models: pvt (`pola_pvt_nano`), and swin (`pola_swin_nano` with linear attention in all stages, and windows of the whole
map, as those of the official models are). Options: `attention=` polarity, or softmax or relu in all blocks in its
place; `alpha=` of polarity (4); `convolution=False`, `gate=False` leave out these parts; `seed=`, `steps=`. Without the
gate the MLPs are wider, so that all variants have the same number of parameters to 1 %. The accuracy is that of the
weights after the last step: no checkpoint is chosen. Ours: docs/comparison.md.
"""

from polaformer_jax import model_config
from polaformer_jax.config import defaults
from polaformer_jax.training.recipes import parse_arg

# A gate has C² weights for each block of C channels, and so have these hidden channels of an MLP.
MLP_RATIO_OF_GATE = 0.5
STEPS = 800


def get_config(arg=None):
    arg = parse_arg(
        arg,
        models=("pvt", "swin"),
        only={"alpha": ("attention", ("polarity",))},
        attention="polarity",
        alpha=4.0,
        convolution=True,
        gate=True,
        seed=0,
        steps=STEPS,
    )
    config = defaults()
    config.seed = arg.seed
    config.model.name = f"pola_{arg.model}_nano"
    config.model.img_size = 32
    config.model.num_classes = 10
    config.model.dtype = "float32"  # CPUs have no fast bfloat16
    config.model.attn_type = "LLLL"
    if arg.model == "swin":
        config.model.window_size = 8
    config.model.attention = arg.attention
    config.model.alpha = arg.alpha
    config.model.convolution, config.model.gate = arg.convolution, arg.gate
    model = model_config(config.model.name)
    mlp_ratio = model.mlp_ratio if arg.model == "swin" else model.mlp_ratios[0]  # the same in all stages
    config.model.mlp_ratio = mlp_ratio + (0.0 if arg.gate else MLP_RATIO_OF_GATE)

    config.data.name = "fashion_mnist"
    config.data.eval_split = "test"
    config.data.workers = 1

    config.augment.crop_area = (0.7, 1.0)

    config.train.steps = arg.steps
    config.train.batch_size = 128
    config.optimizer.lr = 2e-3
    config.optimizer.lr_base_batch = 128
    config.optimizer.clip_norm = 5.0
    config.schedule.warmup = float(min(100, arg.steps))

    config.eval.every = float(arg.steps)
    config.eval.batch_size = 500
    config.eval.resize = 32
    config.eval.crop = 32
    config.checkpoint.every_steps = 200
    config.log.every = 20
    config.lock()
    return config
