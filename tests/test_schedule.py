"""The learning rate is the one that the official trainer takes each step with."""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from configs.defaults import defaults
from polaformer_jax.errors import UserError
from polaformer_jax.training.schedule import durations, learning_rate

GOLDEN = json.loads((Path(__file__).parent / "golden/lr_schedule.json").read_text())


def config_of(golden):
    config = defaults()
    config.train.epochs = float(golden["epochs"])
    config.train.batch_size = golden["batch_per_device"] * golden["devices"]
    config.optimizer.lr = golden["base_lr"]
    config.schedule.warmup = float(golden["warmup_epochs"])
    config.schedule.warmup_lr = golden["warmup_lr"]
    config.schedule.min_lr = golden["min_lr"]
    config.schedule.cooldown = float(golden["cooldown_epochs"])
    return config


@pytest.mark.parametrize("name", GOLDEN)
def test_rates_of_the_official_trainer(name, x64):
    golden = GOLDEN[name]
    config = config_of(golden)
    examples = golden["steps_per_epoch"] * config.train.batch_size + 7  # the last, partial batch is no step
    length = durations(config, num_examples=examples)
    assert length.unit == golden["steps_per_epoch"]
    assert length.total == (golden["epochs"] + golden["cooldown_epochs"]) * golden["steps_per_epoch"]
    steps, rates = zip(*golden["points"], strict=True)
    ours = learning_rate(config, length)(jnp.asarray(steps, jnp.int32))
    assert ours.tolist() == pytest.approx(rates, rel=1e-12)


def test_single_precision_is_close(golden=GOLDEN["pola_swin_t"]):
    config = config_of(golden)
    length = durations(config, num_examples=golden["steps_per_epoch"] * config.train.batch_size)
    steps, rates = zip(*golden["points"], strict=True)
    ours = learning_rate(config, length)(jnp.asarray(steps, jnp.int32))
    assert ours.dtype == jnp.float32
    assert ours.tolist() == pytest.approx(rates, rel=1e-4)


def test_a_run_can_be_counted_in_steps():
    config = defaults()
    config.train.steps = 100
    config.schedule.warmup = 10.0
    config.schedule.cooldown = 5.0
    length = durations(config, num_examples=3)
    assert (length.unit, length.warmup, length.main, length.total) == (1, 10, 100, 105)


def test_a_batch_larger_than_the_training_set_is_refused():
    config = defaults()
    config.train.epochs = 1.0
    with pytest.raises(UserError, match=r"train.batch_size=1024 is larger than the training set \(1000 examples\)"):
        durations(config, num_examples=1000)


def test_more_warmup_than_run_is_refused():
    config = defaults()
    config.train.steps = 3
    with pytest.raises(UserError, match="3 steps and 5 steps of warm-up"):
        durations(config, num_examples=1000)
