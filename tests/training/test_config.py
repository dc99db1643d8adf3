"""The recipes are the official ones, and configs that cannot work are refused."""

import ast
import functools

import pytest
from flax import nnx

from polaformer_jax import weights
from polaformer_jax.config import SEQUENCE_TASKS, defaults
from polaformer_jax.data.lra.facts import TASKS
from polaformer_jax.errors import UserError
from polaformer_jax.training import recipes
from polaformer_jax.training.checkpoints import GREATER_IS_BETTER
from polaformer_jax.training.config_checks import check
from polaformer_jax.training.experiment import create_abstract_model
from polaformer_jax.training.recipes import parse_arg

CONFIGS = {
    "digits": ("pvt", "swin", "pp"),
    "fashion_mnist": ("pvt", "swin"),
    "finetune": ("pola_swin_t", "pola_pvt_b"),
    "lra": ("listops", "text", "retrieval", "pathfinder", "image_lra", "listops_short"),
    "pola_pp": ("b2", "b0", "b1", "b3", "b4", "b5,recipe=finetune"),
    "pola_pvt": ("t", "s", "m", "b"),
    "pola_swin": ("t", "s", "b", "b_384"),
    "segmentation": ("digits", "ade20k", "ade20k,model=pola_pvt_s,head=semantic_fpn", "ade20k,model=pola_pp_b2"),
}
ALL = [(file, model) for file, models in CONFIGS.items() for model in models]


def resolve(file, arg):
    return recipes.load(file if arg is None else f"{file}:{arg}")


# Of the official configs on 8 devices (https://github.com/ZacharyMeng/PolaFormer, config.py and cfgs/).
IMAGENET = """
                 pola_pvt:t  pola_pvt:s  pola_pvt:m  pola_pvt:b  pola_swin:t  pola_swin:s  pola_swin:b  pola_swin:b_384
train.epochs            300         300         300         300          300          300          300               30
train.batch_size       1024         512         512         256         1024         1024          512              256
optimizer.lr           5e-4        5e-4        5e-4        5e-4         5e-4         5e-4         5e-4             2e-5
optimizer.weight_decay 0.05        0.05        0.05        0.05         0.05         0.05         0.05             1e-8
optimizer.clip_norm    None        None         1.0         1.0          5.0          5.0          5.0              5.0
schedule.warmup           5           5           5           5           20           20           20                5
schedule.warmup_lr     1e-6        1e-6        1e-6        1e-6         5e-7         5e-7         5e-7             2e-8
schedule.min_lr        1e-5        1e-5        1e-5        1e-5         5e-6         5e-6         5e-6             2e-7
schedule.cooldown        10          10          10          10            0            0            0                0
eval.resize             256         256         256         256          256          256          256              384
eval.crop               224         224         224         224          224          224          224              384
"""
# Of https://github.com/ZacharyMeng/PolaFormerPP, config.py and cfgs/; that of b5 is a fine-tuning.
PLUS_PLUS = """
                 pola_pp:b0  pola_pp:b1  pola_pp:b2  pola_pp:b3  pola_pp:b4  pola_pp:b5,recipe=finetune
train.epochs            300         300         300         300         300                         300
train.batch_size       2048        2048        2048        1024        1024                         512
optimizer.lr           5e-4        5e-4        5e-4        5e-4        5e-4                        2e-5
optimizer.weight_decay 0.05        0.05        0.05        0.05        0.05                        1e-8
optimizer.clip_norm     5.0         5.0         5.0         5.0         1.0                        None
schedule.warmup          20          20          20          20           5                           1
schedule.warmup_lr     5e-7        5e-7        5e-7        5e-7        1e-7                        5e-7
schedule.min_lr        1e-7        1e-7        1e-7        1e-7        1e-5                        5e-6
schedule.cooldown         0           0           0           0          10                           5
ema.decay           0.99982     0.99982     0.99982     0.99982     0.99982                     0.99982
"""
SHARED = {
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
    "optimizer.eps": 1e-8,
    "optimizer.lr_base_batch": 512,
    "train.label_smoothing": 0.1,
    "augment.rand_augment": "rand-m9-mstd0.5-inc1",
    "augment.erase_prob": 0.25,
    "augment.mixup": 0.8,
    "augment.cutmix": 1.0,
}
# Of the Long Range Arena (https://github.com/pkuzengqi/Skyformer, config.py).
ARENA = """
                     lra:listops  lra:text  lra:retrieval  lra:pathfinder  lra:image_lra
train.steps                50000     50000          50000           50000          50000
train.batch_size              32        32             16             128            256
optimizer.lr                1e-4      1e-4           2e-4            2e-4           1e-4
optimizer.lr_base_batch       32        32             16             128            256
schedule.warmup             1000        80            800             312            175
eval.every                   500       500           1000             500             50
"""


def columns(table):
    """Recipe -> {field: value} of a table with a column for each recipe."""
    names, *rows = (line.split() for line in table.strip().splitlines())
    return {name: {row[0]: ast.literal_eval(row[i]) for row in rows} for i, name in enumerate(names, start=1)}


OF_IMAGENET = columns(IMAGENET) | columns(PLUS_PLUS)
OFFICIAL = {name: values | SHARED for name, values in OF_IMAGENET.items()} | columns(ARENA)


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_recipe_is_the_official_one(name):
    config = recipes.load(name)
    found = {field: functools.reduce(getattr, field.split("."), config) for field in OFFICIAL[name]}
    assert found == OFFICIAL[name]
    assert (config.optimizer.clip_value == 1.0) == name.startswith("lra:")


def test_the_schema_knows_every_task_and_every_metric():
    assert tuple(SEQUENCE_TASKS) == tuple(TASKS)
    for metric in GREATER_IS_BETTER:
        config = recipes.load("segmentation" if metric == "miou" else "digits")
        config.checkpoint.best_metric = metric
        check(config)
    config = recipes.load("digits")
    config.checkpoint.best_metric = "miou"
    with pytest.raises(UserError, match="checkpoint.best_metric='miou': only segmentation has it"):
        check(config)
    config.checkpoint.best_metric = "f1"
    with pytest.raises(UserError, match=f"it is one of {', '.join(GREATER_IS_BETTER)}$"):
        check(config)


@pytest.mark.parametrize("file, model", ALL)
def test_config_can_work_and_names_a_model(file, model):
    config = resolve(file, model)
    check(config)
    assert config.is_locked
    model = create_abstract_model(config)
    assert config.model.num_classes in (None, model.config.num_classes)  # None: the data set's


def test_architecture_can_be_overridden():
    config = resolve("pola_swin", "t")
    config.model.alpha = 7.0
    config.model.attn_type = "LLLL"
    config.model.window_size = 28
    config.model.kernel_size = 3
    params = nnx.to_pure_dict(nnx.split(create_abstract_model(config))[1])
    names = weights.flatten(params)
    assert names["layers.0.blocks.0.attn.positional_encoding"].shape == (1, 28 * 28, 96)
    assert names["layers.3.blocks.0.attn.dwc.kernel"].shape[:2] == (3, 3)


def test_blocks_of_polaformer_plus_plus_can_be_mixed():
    config = resolve("digits", "pp")
    config.model.flags = "l,v,lv,l"
    model = create_abstract_model(config)
    assert model.config.flags == ("l", "v", "lv", "l")
    config.model.flags = "l,v,lvl,l"
    with pytest.raises(UserError, match=r"flags\[2\]='lvl': expected 2 letters of l, v"):
        create_abstract_model(config)
    config = resolve("digits", "pvt")
    config.model.flags = "l,l,l,l"
    with pytest.raises(UserError, match="PolaPVT has no argument flags"):
        create_abstract_model(config)


def test_a_training_that_is_not_published_is_not_made_up():
    with pytest.raises(UserError, match="how pola_pp_b5 is trained from scratch is not published"):
        resolve("pola_pp", "b5")
    with pytest.raises(UserError, match="recipe=finetune: only that of b5 is published"):
        resolve("pola_pp", "b2,recipe=finetune")


def test_all_packaged_recipes_are_tested():
    assert list(CONFIGS) == list(recipes.packaged())


@pytest.mark.parametrize("file", CONFIGS)
def test_the_first_model_is_the_default(file):
    assert str(resolve(file, None)) == str(resolve(file, CONFIGS[file][0]))


def test_options_follow_the_model():
    assert resolve("digits", "swin,epochs=3").train.epochs == 3.0
    assert resolve("pola_pvt", "s,img_size=448").eval.resize == 512
    assert resolve("digits", "pvt,recipe=full").augment.cutmix == 1.0
    with pytest.raises(UserError, match="recipe=rich: it is plain or full"):
        resolve("digits", "pvt,recipe=rich")


def test_options_of_the_long_range_arena():
    config = resolve("lra", "listops,alpha=5,seed=2,steps=5000,tokenisation=brackets")
    assert (config.model.alpha, config.seed, config.train.steps) == (5.0, 2, 5000)
    assert (config.task.tokenisation, config.model.attention) == ("brackets", "polarity")
    config = resolve("lra", "text,attention=softmax,steps=40")
    assert (config.model.attention, config.model.alpha, config.task.tokenisation) == ("softmax", None, None)
    assert config.schedule.warmup == 40.0  # no more warm-up than run
    with pytest.raises(UserError, match="alpha=3 goes with attention polarity, found relu"):
        resolve("lra", "listops,attention=relu,alpha=3")
    with pytest.raises(UserError, match="tokenisation=brackets goes with task listops or listops_short, found text"):
        resolve("lra", "text,tokenisation=brackets")


def test_options_of_fashion_mnist():
    models = [resolve("fashion_mnist", arg).model for arg in ("pvt", "pvt,gate=False", "swin", "swin,gate=False")]
    assert [model.mlp_ratio for model in models] == [4.0, 4.5, 2.0, 2.5]
    assert resolve("fashion_mnist", "swin,alpha=1").model.alpha == 1.0
    assert resolve("fashion_mnist", "swin,attention=softmax").model.alpha is None
    with pytest.raises(UserError, match="alpha=1 goes with attention polarity, found softmax"):
        resolve("fashion_mnist", "pvt,attention=softmax,alpha=1")


@pytest.mark.parametrize(
    "arg, message",
    [
        ("huge", "no model 'huge'; it has pvt, swin"),
        ("pvt,epoch=3", "unknown config option 'epoch=3'; the options are: epochs="),
        ("pvt,epochs", "unknown config option 'epochs'"),
        ("pvt,epochs=many", "epochs=many is not of type float"),
    ],
)
def test_bad_options_are_refused(arg, message):
    with pytest.raises(UserError, match=message):
        parse_arg(arg, models=("pvt", "swin"), epochs=30.0)


def test_unknown_fields_are_refused():
    with pytest.raises(AttributeError, match="drop_paths"):
        resolve("digits", None).model.drop_paths = 0.1


def test_all_problems_are_reported_at_once():
    config = defaults()
    config.train.steps = 10
    config.train.epochs = 1.0
    config.eval.crop = 225
    config.augment.crop_area = (0.5, 1.5)
    config.data.on_error = "shrug"
    config.train.batch_size = 0
    config.model.dtype = "float16"
    config.optimizer.clip_norm = 0.0
    config.optimizer.b1 = 1.5
    config.eval.every = float("inf")
    config.augment.erase_prob = 1.5
    config.augment.mixup = -1.0
    config.eval.weights = "ema"
    config.optimizer.layer_decay = 0.0
    config.train.accumulate = 0
    with pytest.raises(UserError) as error:
        check(config)
    text = str(error.value)
    for expected in (
        "train.epochs=1.0 and train.steps=10: exactly one",
        "eval.crop=225: it must equal model.img_size=224",
        "augment.crop_area=(0.5, 1.5): a crop is at most the whole image",
        "data.on_error='shrug': it is one of stop, skip",
        "train.batch_size=0: it must be positive",
        "model.dtype='float16': it is one of bfloat16, float32",
        "optimizer.clip_norm=0.0: it must be positive, or None",
        "optimizer.b1=1.5: it must be in [0, 1)",
        "eval.every=inf: it must be positive and finite",
        "augment.erase_prob=1.5: it is a probability",
        "augment.mixup=-1.0: it must not be negative",
        "eval.weights='ema': there is no moving average without ema.decay",
        "optimizer.layer_decay=0.0: it must be in (0, 1], or None",
        "train.accumulate=0: it must be positive",
    ):
        assert expected in text
