"""The training step: the same on any number of devices, never spoilt, random as a function of the step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import polaformer_jax as pf
from polaformer_jax.training.state import TrainState
from polaformer_jax.training.step import make_eval_step, make_train_step, purpose_key
from tests.support import dense_model, small_models
from tests.support.quick import QUICK
from tests.support.recipes import batch_of, image_task

TASK = image_task(10, label_smoothing=0.1)
OPTIMIZER = optax.adamw(1e-3)


def rate(step):
    return jnp.asarray(1e-3)


@pytest.fixture(scope="module")
def model():
    return small_models.split(dense_model.Dense(num_classes=10, drop_path_rate=0.2, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def step(model):
    return jax.jit(make_train_step(model[0], TASK, OPTIMIZER, rate=rate, seed=0), compiler_options=QUICK)


def state_of(params, step=0):
    return TrainState(step=jnp.asarray(step, jnp.int32), params=params, opt_state=OPTIMIZER.init(params))


def test_a_step_that_is_not_finite_changes_nothing_but_its_number(model, step):
    params = jax.tree.map(jnp.copy, model[1])
    params["head"]["bias"] = params["head"]["bias"].at[0].set(jnp.inf)
    before = state_of(params, step=7)
    after, sums = step(before, batch_of())
    assert not np.isfinite(sums["loss"][0])
    assert after.step == 8
    jax.tree.map(np.testing.assert_array_equal, (before.params, before.opt_state), (after.params, after.opt_state))


class Weighted:
    """`TASK`, whose examples count as much as `weights` says."""

    def __init__(self, weights):
        self._weights = jnp.asarray(weights, jnp.float32)

    def __getattr__(self, name):
        return getattr(TASK, name)

    def augment(self, batch, key):
        return {**TASK.augment(batch, key), "weight": jnp.where(batch["mask"], self._weights, 0)}


@pytest.mark.parametrize("accumulate", [1, 4])
def test_weighted_examples_count_as_often(accumulate):
    """A batch of weights 2 and 1 is one in which the first examples are there twice, in micro-batches or not."""
    graphdef, params = small_models.split(dense_model.Dense(num_classes=10, drop_path_rate=0.0, rngs=nnx.Rngs(0)))
    half = batch_of(size=8)
    half["mask"][6:] = False
    twice = {name: np.concatenate([array, array[:4]]) for name, array in half.items()}
    losses, states = [], []
    for task, batch, parts in ((Weighted([2.0] * 4 + [1.0] * 4), half, accumulate), (TASK, twice, 1)):
        step = make_train_step(graphdef, task, optax.sgd(0.1), rate=rate, seed=0, accumulate=parts)
        state = TrainState(jnp.zeros((), jnp.int32), params, optax.sgd(0.1).init(params))
        state, sums = jax.jit(step, compiler_options=QUICK)(state, batch)
        assert sums["loss"][1] == 10
        losses.append(sums["loss"][0])
        states.append(state.params)
    np.testing.assert_allclose(*losses, rtol=1e-6)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, atol=1e-6), *states)


def test_masked_examples_have_no_influence(model, step):
    batch = batch_of()
    batch["mask"][5:] = False
    other = {name: array.copy() for name, array in batch.items()}
    other["image"][5:] = 0
    other["label"][5:] = 3
    (one, sums), (two, _) = step(state_of(model[1]), batch), step(state_of(model[1]), other)
    assert sums["loss"][1] == 5
    assert sums["skipped"][0] == 11
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)


def test_a_batch_without_any_usable_example_is_finite(model, step):
    batch = batch_of()
    batch["mask"][:] = False
    after, sums = step(state_of(model[1]), batch)
    assert float(sums["grad_norm"][0]) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.params))


def test_randomness_is_a_function_of_the_step(model, step):
    def loss(number):
        return float(step(state_of(model[1], step=number), batch_of())[1]["loss"][0])

    assert loss(3) == loss(3)
    assert loss(3) != loss(4)  # dropout draws other numbers


def test_keys_differ_by_seed_and_step():
    keys = [jax.random.key_data(purpose_key(seed, step, "dropout")).tolist() for seed in (0, 1) for step in (0, 1)]
    assert len({tuple(key) for key in keys}) == 4


@pytest.mark.slow
def test_bfloat16_keeps_parameters_loss_and_gradients_in_float32():
    graphdef, params = small_models.split(
        pf.create_model("pola_pvt_nano", num_classes=10, kernel_size=1, dtype="bfloat16", rngs=nnx.Rngs(0))
    )
    step = jax.jit(make_train_step(graphdef, TASK, OPTIMIZER, rate=rate, seed=0), compiler_options=QUICK)
    state, losses = state_of(params), []
    for _ in range(5):
        state, sums = step(state, batch_of())
        losses.append(float(sums["loss"][0] / sums["loss"][1]))
    assert sums["loss"][0].dtype == sums["grad_norm"][0].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert losses[-1] < losses[0]


def test_the_logged_rate_and_norm_are_those_of_the_step(model, step):
    _, sums = step(state_of(model[1]), batch_of())
    assert float(sums["learning_rate"][0]) == pytest.approx(1e-3)
    assert float(sums["grad_norm"][0]) > 0


def test_evaluation_is_not_random(model):
    evaluate = jax.jit(make_eval_step(model[0], TASK))
    sums, outputs = evaluate(model[1], batch_of())
    again, _ = evaluate(model[1], batch_of())
    assert sums == again
    assert set(outputs) == {"prediction", "probability", "label", "mask"}
    assert outputs["prediction"].shape == (16,)
