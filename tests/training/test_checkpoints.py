"""Which checkpoints are kept, which one is the best, and what comes back."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from polaformer_jax.errors import UserError
from polaformer_jax.training import sharding
from polaformer_jax.training.checkpoints import Checkpoints
from polaformer_jax.training.state import TrainState

OPTIMIZER = optax.adamw(1e-3)


def state_of(step):
    params = {"block": {0: {"kernel": jnp.full((4, 3), step, jnp.float32)}}, "bias": jnp.zeros(3)}
    return TrainState(step=jnp.asarray(step, jnp.int32), params=params, opt_state=OPTIMIZER.init(params))


def abstract():
    mesh = sharding.make_mesh(ml_collections.ConfigDict({"data": 8, "fsdp": 1}))
    return sharding.with_shardings(jax.eval_shape(lambda: state_of(0)), sharding.replicated(mesh))


def kept(directory, metric, values, keep_last=2):
    """Saves steps 1, 2, ... with these metrics (None: not evaluated); the steps that are left, and the best."""
    with Checkpoints(directory, keep_last=keep_last, best_metric=metric) as checkpoints:
        for step, value in enumerate(values, start=1):
            checkpoints.save(state_of(step), None if value is None else {metric: value})
        checkpoints.wait()
        return checkpoints.steps(), checkpoints.best()


@pytest.mark.parametrize(
    "metric, values, steps, best",
    [
        ("accuracy", [0.1, 0.9, 0.5, 0.6], [2, 3, 4], 2),
        ("accuracy", [0.9, None, None, None], [1, 3, 4], 1),
        ("accuracy", [0.9, 0.9, None, None, None], [2, 4, 5], 2),  # the later of equals
        ("loss", [2.0, 1.0, float("nan"), 1.5, 3.0], [2, 4, 5], 2),
        ("accuracy", [None, None, None], [2, 3], None),
    ],
)
def test_the_latest_and_the_best_are_kept(tmp_path, metric, values, steps, best):
    assert kept(tmp_path, metric, values) == (steps, best)


def test_what_was_saved_comes_back_on_every_device(tmp_path):
    kept(tmp_path, "accuracy", [None, 0.5])
    with Checkpoints(tmp_path, keep_last=1, best_metric="accuracy", read_only=True) as checkpoints:
        restored = checkpoints.restore(abstract()).state
        params, step = checkpoints.restore_params(abstract().params, 1)
    jax.tree.map(np.testing.assert_array_equal, restored, state_of(2))
    assert len(restored.params["bias"].sharding.device_set) == 8
    assert step == 1
    np.testing.assert_array_equal(params["block"][0]["kernel"], 1)


def test_a_moving_average_is_kept_beside_the_parameters(tmp_path):
    state = dataclasses.replace(state_of(3), ema=state_of(7).params)
    with Checkpoints(tmp_path, keep_last=1, best_metric="ema_accuracy") as checkpoints:
        checkpoints.save(state, {"accuracy": 0.1, "ema_accuracy": 0.2})
        checkpoints.wait()
        wanted = dataclasses.replace(abstract(), ema=abstract().params)
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(wanted).state, state)
        averaged, _ = checkpoints.restore_params(abstract().params, kind="ema")
    np.testing.assert_array_equal(averaged["block"][0]["kernel"], 7)


def test_a_checkpoint_without_a_moving_average_says_so(tmp_path):
    kept(tmp_path, "accuracy", [0.5])
    with Checkpoints(tmp_path, keep_last=1, best_metric="accuracy", read_only=True) as checkpoints:
        with pytest.raises(UserError, match="step 1 in .* has no moving average .ema.decay was None"):
            checkpoints.restore_params(abstract().params, kind="ema")


def test_a_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert kept("run/checkpoints", "accuracy", [0.5])[0] == [1]
    assert (tmp_path / "run/checkpoints/1").is_dir()


@pytest.mark.parametrize("name", ["run [1]", "a*b?[!c]", "r ü n"])
def test_a_folder_of_any_name(name, tmp_path):
    for _ in range(2):
        with Checkpoints(tmp_path / name, keep_last=1, best_metric="accuracy") as checkpoints:
            restored = checkpoints.restore(abstract())
            if restored is None:
                checkpoints.save(state_of(3), {"accuracy": 0.5})
    assert restored.state.step == 3 and restored.evaluated


def test_a_folder_that_was_moved_is_noticed(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    with Checkpoints(folder, keep_last=1, best_metric="accuracy") as checkpoints:
        checkpoints.save(state_of(3))
        checkpoints.wait()
        (tmp_path / "run").rename(tmp_path / "moved")
        folder.mkdir(parents=True)
        with pytest.raises(UserError, match="not the folder any more that the run began with"):
            checkpoints.save(state_of(4))


def test_saving_a_step_twice_is_an_error_not_silence(tmp_path):
    with Checkpoints(tmp_path, keep_last=2, best_metric="accuracy") as checkpoints:
        checkpoints.save(state_of(3))
        with pytest.raises(ValueError, match="already exists"):
            checkpoints.save(state_of(3))


def test_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path, keep_last=2, best_metric="accuracy") as checkpoints:
        assert checkpoints.restore(abstract()) is None
        with pytest.raises(UserError, match="has no checkpoint 'best'; it has the steps"):
            checkpoints.restore_params(abstract().params, "best")
