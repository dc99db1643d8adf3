"""Running statistics in training: of the whole batch on any mesh, micro-batch by micro-batch, never spoilt, resumed."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from flax import nnx

from polaformer_jax import weights
from polaformer_jax.training import evaluation, loop, sharding
from polaformer_jax.training.checkpoints import Checkpoints
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.state import TrainState
from polaformer_jax.training.step import make_eval_step, make_train_step
from tests.support import dense_model, small_models
from tests.support.quick import QUICK
from tests.support.recipes import batch_of, dense_digits, image_task
from tests.support.runs import final_arrays

TASK = image_task(10)
OPTIMIZER = optax.partition(
    {"train": optax.sgd(0.1), "freeze": optax.set_to_zero()},
    lambda params: jax.tree.map_with_path(
        lambda path, _: "freeze" if path[-1].key in ("mean", "var") else "train", params
    ),
)


@pytest.fixture(scope="module")
def model():
    return small_models.split(dense_model.Dense(num_classes=10, drop_path_rate=0.0, normed=True, rngs=nnx.Rngs(0)))


def step_of(model, **options):
    step = make_train_step(
        model[0], TASK, OPTIMIZER, rate=lambda step: jnp.asarray(0.1), seed=0, statistics=True, **options
    )
    return jax.jit(step, compiler_options=QUICK)


def state_of(params, ema=False):
    copy = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, OPTIMIZER.init(params), copy)


def running(params):
    return {name: np.asarray(params["norm"][name]) for name in ("mean", "var")}


def inside(model, batch):
    """What the normalisation sees of the valid examples of a batch: (n, C)."""
    found = nnx.merge(*model)
    images = TASK.inputs(batch)
    side = 32 // 4
    patches = images.reshape(-1, side, 4, side, 4, 3).mean(axis=(2, 4))
    return np.asarray(found.body(patches.reshape(len(images), -1)), np.float64)[np.asarray(batch["mask"])]


def taken_up(before, values):
    return {
        "mean": 0.9 * before["mean"] + 0.1 * values.mean(axis=0),
        "var": 0.9 * before["var"] + 0.1 * values.var(axis=0, ddof=1),
    }


def assert_close(found, expected):
    for name in ("mean", "var"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_a_step_takes_up_the_statistics_of_its_valid_examples(model):
    batch = batch_of()
    batch["mask"][11:] = False
    after, _ = step_of(model)(state_of(model[1]), batch)
    assert_close(running(after.params), taken_up(running(model[1]), inside(model, batch)))
    other = {**batch, "image": batch["image"].copy()}
    other["image"][11:] = 255  # what stands in padding rows does not matter
    again, _ = step_of(model)(state_of(model[1]), other)
    jax.tree.map(np.testing.assert_array_equal, after.params, again.params)


def test_micro_batches_are_taken_up_one_after_the_other(model):
    batch = batch_of()
    batch["mask"][3] = False
    after, _ = step_of(model, accumulate=4)(state_of(model[1]), batch)
    expected = running(model[1])
    for i in range(4):  # every fourth example
        expected = taken_up(expected, inside(model, {name: array[i::4] for name, array in batch.items()}))
    assert_close(running(after.params), expected)


def test_a_step_that_is_not_finite_leaves_them_as_they_are(model):
    params = jax.tree.map(jnp.copy, model[1])
    params["head"]["bias"] = params["head"]["bias"].at[0].set(jnp.inf)
    before = state_of(params, ema=True)
    after, sums = step_of(model, ema_decay=0.5)(before, batch_of())
    assert not np.isfinite(sums["loss"][0]) and after.step == 1
    jax.tree.map(np.testing.assert_array_equal, (before.params, before.ema), (after.params, after.ema))


def test_the_moving_average_has_them_too(model):
    before = state_of(model[1], ema=True)
    after, _ = step_of(model, ema_decay=0.75)(before, batch_of())
    for name in ("mean", "var"):
        mixed = 0.75 * np.asarray(before.ema["norm"][name]) + 0.25 * running(after.params)[name]
        np.testing.assert_allclose(after.ema["norm"][name], mixed, rtol=1e-6)
        assert np.any(running(after.params)[name] != running(model[1])[name])


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (2, 4)])
def test_they_are_those_of_the_whole_batch_on_any_mesh(model, data, fsdp):
    batch = batch_of()
    batch["mask"][5:9] = False
    one, sums = step_of(model)(state_of(model[1]), batch)
    mesh = sharding.make_mesh(ml_collections.ConfigDict({"data": data, "fsdp": fsdp}))
    state = state_of(model[1])
    state = jax.device_put(state, sharding.state_shardings(state, mesh))
    many, split_sums = step_of(model, mesh=mesh)(state, sharding.to_devices(batch, mesh))
    np.testing.assert_allclose(split_sums["loss"][0], sums["loss"][0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one.params, many.params)
    assert_close(running(many.params), taken_up(running(model[1]), inside(model, batch)))


def test_evaluation_uses_them(model):
    batch, params = batch_of(), jax.tree.map(jnp.copy, model[1])
    evaluate = jax.jit(make_eval_step(model[0], TASK), compiler_options=QUICK)
    before, _ = evaluate(params, batch)
    params["norm"]["mean"] = params["norm"]["mean"] + 1
    after, _ = evaluate(params, batch)
    assert before["loss"][0] != after["loss"][0]


def config_of(digits_dir, **changes):
    return dense_digits(digits_dir, **{"model.name": dense_model.NORMED, "log.pictures": False, **changes})


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_its_weights_have_them(digits_dir, tmp_path):
    config = config_of(digits_dir)
    whole = loop.train(config, tmp_path / "whole")
    arrays = final_arrays(tmp_path / "whole")
    names = [name for name in arrays if "norm" in name]
    assert any("'mean'" in name and "ema" in name for name in names)
    assert not any("'mean'" in name and "opt_state" in name for name in names)  # no moments
    # The same run, from the checkpoint of its sixth step.
    with Checkpoints(tmp_path / "whole/checkpoints", keep_last=9, best_metric="accuracy", read_only=True) as kept:
        step = [step for step in kept.steps() if step < 8][-1]
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for folder in (tmp_path / "part/checkpoints").iterdir():
        if folder.name.isdecimal() and int(folder.name) > step:
            shutil.rmtree(folder)
    loop.train(config, tmp_path / "part")
    again = final_arrays(tmp_path / "part")
    assert [name for name in arrays if arrays[name].tobytes() != again[name].tobytes()] == []
    path = tmp_path / "a.safetensors"
    result = evaluation.evaluate(None, tmp_path / "whole", weights_path=path)
    assert result["accuracy"] == whole.evaluation.metrics["accuracy"]
    file = weights.read_file(path)
    assert {"norm.mean", "norm.var"} <= set(file.tensors)
    config.init.weights = str(path)
    assert evaluation.evaluate(config, None)["accuracy"] == result["accuracy"]


def test_a_frozen_backbone_keeps_its_statistics(digits_dir):
    experiment = Experiment(config_of(digits_dir, **{"model.name": "pola_pp_nano", "init.freeze_backbone": True}))
    model = nnx.merge(experiment.graphdef, experiment.params.abstract)
    assert model.frozen_statistics and dataclasses.is_dataclass(experiment.states)
