"""The ImageNet config itself on a fake ImageNet of 1,000 classes: real builder, real recipe, real steps."""

from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from polaformer_jax.data import prepare
from polaformer_jax.training import loop
from polaformer_jax.training.metrics import read_scalars
from tests.support.fake_imagenet import write_tars
from tests.support.recipes import recipe


@pytest.mark.slow
def test_a_few_steps_of_the_official_recipe(tmp_path, compiled_as_by_users):
    wnids = (Path(tfds.__file__).parent / "datasets/imagenet2012/labels.txt").read_text().split()
    tars = write_tars(tmp_path / "tars", wnids, validation=10)
    prepare.prepare("imagenet2012", tmp_path / "data", manual_dir=tars)

    config = recipe("pola_pvt", "t")
    config.data.data_dir = str(tmp_path / "data")
    config.data.train_split = "train[:16]"  # so few that they are soon known
    config.data.workers = 1
    config.model.dtype = "float32"  # CPUs have no fast bfloat16
    config.mesh.data = 1  # of eight fake devices, which take turns on few cores
    config.train.epochs, config.train.steps, config.train.batch_size = None, 10, 8
    config.optimizer.lr = 0.064  # scaled by 8 / 512
    config.schedule.warmup, config.schedule.cooldown = 1.0, 0.0
    config.eval.every, config.eval.batch_size = 10.0, 8
    config.log.every, config.log.pictures = 1, False
    config.ema.decay = 0.9
    result = loop.train(config, tmp_path / "run")
    assert result.evaluation.counted == 10
    losses = read_scalars(tmp_path / "run")["loss"][1]
    assert len(losses) == 10
    assert losses[-3:].mean() < losses[:3].mean() - 0.5, losses
