"""The learning rate is the one that the official trainer takes each step with."""

import json

import jax.numpy as jnp
import pytest

from polaformer_jax.config import defaults
from polaformer_jax.errors import UserError
from polaformer_jax.training.optimizer import durations, learning_rate, one_cycle
from tests.support import GOLDEN_FOLDER

GOLDEN = json.loads((GOLDEN_FOLDER / "lr_schedule.json").read_text())


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


def by_phases(peak, warmup, steps):
    """PyTorch's `OneCycleLR(max_lr=peak, pct_start=warmup / steps, total_steps=steps, anneal_strategy="linear")`: two
    phases, each with its first and last rate and the step at which it ends."""
    initial = peak / 25
    phases = [(0, warmup - 1, initial, peak), (warmup - 1, steps - 1, peak, initial / 1e4)]
    rates = []
    for step in range(steps):
        begin, end, first, last = next(phase for phase in phases if step <= phase[1])
        rates.append(first + (last - first) * (step - begin) / (end - begin))
    return rates


@pytest.mark.parametrize("warmup, steps", [(10, 50), (2, 3), (1000, 5000), (50, 50)])
def test_one_cycle_is_that_of_pytorch(warmup, steps, x64):
    rate = one_cycle(2e-4, warmup=warmup, steps=steps)
    assert rate(jnp.arange(steps)).tolist() == pytest.approx(by_phases(2e-4, warmup, steps), rel=1e-12)


def test_one_cycle_at_known_steps(x64):
    """With 1,000 of 5,000 steps of warm-up to 1e-4: 4e-6 at first, the peak at step 999, 4e-10 at the last."""
    rate = one_cycle(1e-4, warmup=1000, steps=5000)
    assert [float(rate(step)) for step in (0, 999, 4999)] == pytest.approx([4e-6, 1e-4, 4e-10], rel=1e-12)
    assert float(rate(10_000)) == pytest.approx(4e-10)  # and no less in a cooldown


@pytest.mark.parametrize("warmup", [0, 1])
def test_one_cycle_without_a_warm_up_begins_at_the_peak(warmup, x64):
    assert float(one_cycle(1e-4, warmup=warmup, steps=100)(0)) == pytest.approx(1e-4, rel=0.011)


def test_a_config_chooses_one_cycle():
    config = defaults()
    config.train.steps = 5
    config.train.batch_size = config.optimizer.lr_base_batch = 32
    config.optimizer.lr = 1e-4
    config.schedule.name = "one_cycle"
    config.schedule.warmup = 3.0
    rate = learning_rate(config, durations(config, num_examples=100))
    assert rate(jnp.arange(5)).tolist() == pytest.approx(by_phases(1e-4, 3, 5), rel=1e-5)


def poly_config(**changes):
    config = defaults()
    config.schedule.name = "poly"
    config.train.steps, config.train.batch_size = 160_000, 16
    config.optimizer.lr, config.optimizer.lr_base_batch = 6e-5, 16
    config.schedule.warmup, config.schedule.warmup_lr, config.schedule.min_lr = 1500.0, 6e-11, 0.0
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize("power", [1.0, 0.9])
def test_poly_is_that_of_mmcv(power, x64):
    config = poly_config(**{"schedule.power": power})
    length = durations(config, num_examples=1)
    steps = [0, 1, 750, 1499, 1500, 80_000, 159_999]
    # PolyLrUpdaterHook with warmup="linear", warmup_iters=1500, warmup_ratio=1e-6 of mmcv 1.7
    expected = []
    for t in steps:
        regular = 6e-5 * (1 - t / 160_000) ** power
        expected.append(regular * (1 - (1 - t / 1500) * (1 - 1e-6)) if t < 1500 else regular)
    ours = learning_rate(config, length)(jnp.asarray(steps, jnp.int32))
    assert ours.tolist() == pytest.approx(expected, rel=1e-12)


def test_poly_ends_at_its_least_rate_without_warm_up(x64):
    config = poly_config(**{"schedule.warmup": 0.0, "schedule.min_lr": 1e-6, "schedule.cooldown": 10.0})
    length = durations(config, num_examples=1)
    ours = learning_rate(config, length)(jnp.asarray([0, 160_000, 160_009], jnp.int32))
    assert ours.tolist() == pytest.approx([6e-5, 1e-6, 1e-6], rel=1e-12)
