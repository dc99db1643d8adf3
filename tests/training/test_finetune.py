"""Fine-tuning on a folder of images: the classes come from the data, the rest of the model from the weights."""

import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import polaformer_jax as pf
from polaformer_jax.errors import UserError
from polaformer_jax.training import loop
from polaformer_jax.training.experiment import Experiment
from tests.support.recipes import recipe

CLASSES = ("rose", "iris", "tulip")


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    """A folder of three classes, one colour each."""
    folder = tmp_path_factory.mktemp("flowers")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 100, (40, 50, 3), dtype=np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(folder / split / name / f"{number}.jpeg")
    return folder


def config_of(folder, **changes):
    config = recipe("finetune", "pola_pvt_t,img_size=64")
    config.data.data_dir = str(folder)
    config.data.workers = 0
    config.update_from_flattened_dict(changes)
    return config


def test_the_number_of_classes_is_that_of_the_data(flowers):
    config = config_of(flowers)
    experiment = Experiment(config)
    assert experiment.config.model.num_classes == len(CLASSES) and config.model.num_classes is None
    assert experiment.params.abstract["head"]["kernel"].shape[-1] == len(CLASSES)
    assert experiment.inputs.eval_source.class_names == tuple(sorted(CLASSES))


def test_a_number_that_was_given_must_fit(flowers):
    with pytest.raises(UserError, match="model.num_classes=7, but folder has 3 classes"):
        Experiment(config_of(flowers, **{"model.num_classes": 7}))


def test_the_model_and_where_the_data_lie_are_options():
    config = recipe("finetune", "pola_swin_b_384,source=tfds")
    assert (config.model.img_size, config.eval.resize, config.data.source) == (384, 384, "tfds")
    assert recipe("finetune", "pola_pvt_s").eval.resize == 256
    with pytest.raises(UserError, match="source=disk: it is folder or tfds"):
        recipe("finetune", "pola_pvt_t,source=disk")


@pytest.mark.slow
@pytest.mark.usefixtures("shallow")
def test_a_few_steps_from_weights_of_other_classes(flowers, tmp_path, quickly_compiled):
    model = pf.create_model("pola_pvt_nano", img_size=32, rngs=nnx.Rngs(0))
    path = tmp_path / "weights.safetensors"
    pf.save_weights(model, path)
    config = config_of(
        flowers,
        **{
            "init.weights": str(path),
            "model.name": "pola_pvt_nano",
            "model.dtype": "float32",
            "mesh.data": 1,  # of eight fake devices, which take turns on few cores
            "train.epochs": None,
            "train.steps": 6,
            "train.batch_size": 8,
            "schedule.warmup": 0.0,
            "eval.every": 6.0,
            "eval.batch_size": 8,
            "log.pictures": False,
        },
    )
    result = loop.train(config, tmp_path / "run")
    assert result.evaluation.counted == 12
    assert json.loads((tmp_path / "run/config.json").read_text())["model"]["num_classes"] == len(CLASSES)
    assert loop.train(config, tmp_path / "run").evaluation.metrics == result.evaluation.metrics  # not another identity
