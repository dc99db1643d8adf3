"""A training of two dense layers on the digits, through the real pipeline: its files, how it resumes, how it fails."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from polaformer_jax.errors import UserError
from polaformer_jax.training import evaluation, loop, reports
from polaformer_jax.training.checkpoints import Checkpoints
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.metrics import read_scalars
from polaformer_jax.training.tasks import classification_pictures
from tests.support.log_messages import logged
from tests.support.recipes import dense_digits


def checkpoints_of(workdir):
    return Checkpoints(workdir / "checkpoints", keep_last=1, best_metric="accuracy", read_only=True)


def final_params(config, workdir):
    experiment = Experiment(config)
    with checkpoints_of(workdir) as checkpoints:
        params, step = checkpoints.restore_params(experiment.params.abstract, "latest")
    assert step == experiment.length.total
    return params


def test_every_test_image_is_counted_once(finished):
    _, workdir, result = finished
    assert result.evaluation.counted == 360
    assert result.evaluation.skipped == 0
    written = json.loads((workdir / "eval.json").read_text())
    assert written["images"] == 360
    assert written["origin"] == "tfds sklearn_digits/1.0.0"


def test_scalars_are_written_for_tensorboard(finished):
    scalars = read_scalars(finished[1])
    for name in ("loss", "accuracy", "learning_rate", "grad_norm", "images_per_second", "input_wait_share"):
        assert scalars[name][0].tolist() == [2, 4, 6, 8], name
    assert scalars["eval_accuracy"][0].tolist() == [4, 8]
    assert scalars["loss"][1][0] == pytest.approx(np.log(10), rel=0.3)  # untrained
    assert (0 <= scalars["input_wait_share"][1]).all() and (scalars["input_wait_share"][1] <= 1).all()


def test_the_moving_average_is_evaluated_beside_the_raw_weights(finished):
    config, workdir, _ = finished
    scalars = read_scalars(workdir)
    assert scalars["eval_ema_accuracy"][0].tolist() == [4, 8]
    last = evaluation.evaluate(None, workdir, checkpoint="latest", kind="ema", json_path=workdir / "ema.json")
    assert last["kind"] == "ema" and last["images"] == 360
    assert last["loss"] == pytest.approx(scalars["eval_ema_loss"][1][-1], rel=1e-5)
    assert last["loss"] != scalars["eval_loss"][1][-1]


def test_the_latest_and_the_best_checkpoints_are_kept(finished):
    config, workdir, result = finished
    with checkpoints_of(workdir) as checkpoints:
        assert set(checkpoints.steps()) == {6, 8, result.step}
        assert checkpoints.best() == result.step


def test_the_parameters_are_listed_in_tensorboard(finished):
    events = EventAccumulator(str(finished[1])).Reload()
    name = next(tag for tag in events.Tags()["tensors"] if tag.startswith("parameters"))
    assert b"head/kernel" in events.Tensors(name)[0].tensor_proto.string_val[0]


def test_no_picture_costs_a_run_its_result(finished, tmp_path, monkeypatch):
    config, workdir, result = finished
    monkeypatch.setattr(classification_pictures, "confusion", lambda *_: 1 / 0)
    experiment = Experiment(config)
    with logged() as messages:
        drawn = reports.draw_all(tmp_path, result.evaluation, experiment, experiment.model(experiment.params.abstract))
    assert [path.name for path in drawn] == ["curves.png", "predictions.png"]
    assert messages == [
        f"the picture {tmp_path}/pictures/confusion.png was not drawn: ZeroDivisionError: division by zero"
    ]


def test_pictures_are_drawn(finished):
    for path in finished[2].pictures:
        with Image.open(path) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("L").getcolors()) > 20  # not blank
    assert [path.name for path in finished[2].pictures] == ["curves.png", "confusion.png", "predictions.png"]


def test_the_last_words_name_what_was_made(finished):
    _, workdir, result = finished
    text = reports.describe(result, workdir)
    for part in ("test accuracy", "360", str(result.checkpoint), f"--logdir {workdir}", "predictions.png"):
        assert part in text


def test_a_training_starts_from_weights(finished, tmp_path):
    config, workdir, _ = finished
    file = tmp_path / "w.safetensors"
    evaluation.evaluate(None, workdir, json_path=tmp_path / "e.json", weights_path=file)
    config = config.copy_and_resolve_references()
    config.init.weights = str(file)
    experiment = Experiment(config)
    trained, _ = checkpoints_of(workdir).restore_params(experiment.params.abstract, "best")
    jax.tree.map(np.testing.assert_array_equal, experiment.states.initial().params, trained)


def test_without_event_files_a_run_does_not_know_how_long_it_took(finished, tmp_path):
    config, workdir, result = finished
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    for path in (*tmp_path.glob("events.*"), tmp_path / "training.json"):
        path.unlink()
    assert loop.train(config, tmp_path).evaluation.metrics == result.evaluation.metrics
    assert json.loads((tmp_path / "training.json").read_text())["seconds"] is None


def test_a_finished_run_evaluates_again_and_trains_no_more(finished):
    config, workdir, result = finished
    again = loop.train(config, workdir)
    assert again.evaluation.metrics == result.evaluation.metrics
    assert read_scalars(workdir)["loss"][0].tolist() == [2, 4, 6, 8]


@pytest.fixture(scope="module")
def stopped(finished, tmp_path_factory):
    """A work directory whose training was cut off after five of its eight steps."""

    class Stopped(Exception):
        pass

    def step(progress, taken=[]):  # noqa: B006  counts its calls
        taken.append(1)
        if len(taken) == 5:
            raise Stopped

    workdir = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(loop.Progress, "step", step)
        loop.train(finished[0], workdir)
    with checkpoints_of(workdir) as checkpoints:
        assert checkpoints.steps() == [3, 4]
    return workdir


def test_a_stopped_run_goes_on_to_the_same_end(finished, stopped, tmp_path):
    config, straight, _ = finished
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    loop.train(config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, final_params(config, straight), final_params(config, tmp_path))


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoints(finished, stopped, tmp_path, monkeypatch):
    config, _, _ = finished
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    restore = Checkpoints.restore

    def poisoned(checkpoints, abstract):
        restored = restore(checkpoints, abstract)
        restored.state.params["head"]["bias"] = restored.state.params["head"]["bias"] * np.nan
        return restored

    monkeypatch.setattr(Checkpoints, "restore", poisoned)
    with pytest.raises(loop.NonFiniteError, match=r"step 4: loss nan, gradient norm nan"):
        loop.train(config, tmp_path)
    monkeypatch.undo()
    with checkpoints_of(tmp_path) as checkpoints:
        assert checkpoints.steps() == [3, 4]
        restored = checkpoints.restore(Experiment(config).states.abstract)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored.state.params))


def test_another_seed_is_another_run(finished):
    config, workdir, _ = finished
    other = config.copy_and_resolve_references()
    other.seed = 1
    with pytest.raises(UserError, match="seed: 0 there, 1 now"):
        loop.train(other, workdir)


def test_wrong_number_of_classes(digits_dir):
    with pytest.raises(UserError, match="model.num_classes=11, but sklearn_digits has 10 classes"):
        Experiment(dense_digits(digits_dir, **{"model.num_classes": 11}))


def test_a_model_that_cannot_be(digits_dir):
    with pytest.raises(UserError, match="config.model: .*pola_pvt_nona"):
        Experiment(dense_digits(digits_dir, **{"model.name": "pola_pvt_nona"}))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train.batch_size": 13}, "train.batch_size=13 cannot be split evenly over 2 devices"),
        ({"data.train_split": "trian"}, "trian"),
        ({"schedule.warmup": 50.0}, "8 steps and 50 steps of warm-up"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(digits_dir, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        loop.train(dense_digits(digits_dir, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_tells(digits_dir):
    text = reports.describe_dry(Experiment(dense_digits(digits_dir)))
    for part in ('"name": "dense"', "head/kernel", "Total: ", "uint8 (16, 32, 32, 3)", "temporary"):
        assert part in text
