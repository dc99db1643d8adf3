"""A whole training on the digits, through the real pipeline: what it writes, how it goes on, how it ends badly."""

import csv
import json

import jax
import numpy as np
import pytest
from PIL import Image

from configs.digits import get_config
from polaformer_jax import weights
from polaformer_jax.errors import UserError
from polaformer_jax.training import evaluation, loop, report
from polaformer_jax.training.checkpoints import Checkpoints
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.scalars import read_scalars


def config_of(digits_dir, **changes):
    """Eight steps of a batch of 16, evaluated every four."""
    config = get_config()
    config.data.data_dir = str(digits_dir)
    config.data.workers = 0
    config.train.epochs = None
    config.train.steps = 8
    config.train.batch_size = 16
    config.schedule.warmup = 2.0
    config.eval.every = 4.0
    config.eval.batch_size = 100
    config.log.every = 2
    config.checkpoint.every_steps = 3
    config.update_from_flattened_dict(changes)
    return config


def final_params(config, workdir):
    experiment = Experiment(config)
    with Checkpoints(workdir / "checkpoints", keep_last=1, best_metric="accuracy", read_only=True) as checkpoints:
        params, step = checkpoints.restore_params(experiment.abstract_params, "latest")
    assert step == experiment.length.total
    return params


@pytest.fixture(scope="module")
def finished(digits_dir, tmp_path_factory):
    config, workdir = config_of(digits_dir), tmp_path_factory.mktemp("run")
    return config, workdir, loop.train(config, workdir)


def test_every_test_image_is_counted_once(finished):
    _, workdir, result = finished
    assert result.evaluation.counted == 360
    assert result.evaluation.skipped == 0
    assert json.loads((workdir / "eval.json").read_text())["images"] == 360


def test_scalars_are_written_for_tensorboard(finished):
    scalars = read_scalars(finished[1])
    for name in ("loss", "accuracy", "learning_rate", "grad_norm", "images_per_second", "input_wait_share"):
        assert scalars[name][0].tolist() == [2, 4, 6, 8], name
    assert scalars["eval_accuracy"][0].tolist() == [4, 8]
    assert scalars["loss"][1][0] == pytest.approx(np.log(10), rel=0.3)  # untrained
    assert (0 <= scalars["input_wait_share"][1]).all() and (scalars["input_wait_share"][1] <= 1).all()


def test_the_latest_and_the_best_checkpoints_are_kept(finished):
    config, workdir, result = finished
    with Checkpoints(workdir / "checkpoints", keep_last=1, best_metric="accuracy", read_only=True) as checkpoints:
        assert set(checkpoints.steps()) == {6, 8, result.step}
        assert checkpoints.best() == result.step


def test_pictures_are_drawn(finished):
    for path in finished[2].pictures:
        with Image.open(path) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("L").getcolors()) > 20  # not blank
    assert [path.name for path in finished[2].pictures] == ["curves.png", "confusion.png", "predictions.png"]


def test_the_last_words_name_what_was_made(finished):
    _, workdir, result = finished
    text = report.describe(result, workdir)
    for part in ("test accuracy", "360", str(result.checkpoint), f"--logdir {workdir}", "predictions.png"):
        assert part in text


def test_evaluating_the_work_directory_gives_the_same_numbers(finished, tmp_path):
    _, workdir, result = finished
    rows = tmp_path / "out.csv"
    written = evaluation.evaluate(None, workdir, json_path=tmp_path / "e.json", predictions_path=rows)
    assert written["step"] == result.step
    assert written["accuracy"] == result.evaluation.metrics["accuracy"]
    assert json.loads((tmp_path / "e.json").read_text()) == written
    table = list(csv.DictReader(rows.read_text().splitlines()))
    assert len(table) == 360
    assert np.mean([int(row["correct"]) for row in table]) == pytest.approx(written["accuracy"])
    assert len({row["record"] for row in table}) == 360


def test_weights_written_to_a_file_evaluate_the_same(finished, tmp_path):
    config, workdir, result = finished
    experiment = Experiment(config)
    with Checkpoints(workdir / "checkpoints", keep_last=1, best_metric="accuracy", read_only=True) as checkpoints:
        params, _ = checkpoints.restore_params(experiment.abstract_params, "best")
    weights.save_weights(params, tmp_path / "w.safetensors")
    config = config.copy_and_resolve_references()
    config.init.weights = str(tmp_path / "w.safetensors")
    written = evaluation.evaluate(config, None)
    assert written["loss"] == result.evaluation.metrics["loss"]


def test_a_finished_run_evaluates_again_and_trains_no_more(finished):
    config, workdir, result = finished
    again = loop.train(config, workdir)
    assert again.evaluation.metrics == result.evaluation.metrics
    assert read_scalars(workdir)["loss"][0].tolist() == [2, 4, 6, 8]


def test_a_stopped_run_goes_on_to_the_same_end(finished, digits_dir, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    config, straight, _ = finished
    with monkeypatch.context() as patch:
        taken = []

        def until_five(progress):
            taken.append(1)
            if len(taken) == 5:
                raise Stopped

        patch.setattr(loop.Progress, "step", until_five)
        with pytest.raises(Stopped):
            loop.train(config, tmp_path)
    loop.train(config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, final_params(config, straight), final_params(config, tmp_path))


def test_another_seed_is_another_run(finished):
    config, workdir, _ = finished
    other = config.copy_and_resolve_references()
    other.seed = 1
    with pytest.raises(UserError, match="seed: 0 there, 1 now"):
        loop.train(other, workdir)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoints(digits_dir, tmp_path):
    config = config_of(digits_dir, **{"optimizer.lr": 1e30, "optimizer.clip_norm": None, "schedule.warmup": 0.0})
    config.checkpoint.every_steps = 1
    with pytest.raises(loop.NonFiniteError, match=r"step \d: loss (nan|inf|-inf)"):
        loop.train(config, tmp_path)
    with Checkpoints(tmp_path / "checkpoints", keep_last=1, best_metric="accuracy", read_only=True) as checkpoints:
        assert checkpoints.steps()
        restored = checkpoints.restore(Experiment(config).abstract_state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored.params))


def test_wrong_number_of_classes(digits_dir):
    with pytest.raises(UserError, match="model.num_classes=11, but sklearn_digits has 10 classes"):
        Experiment(config_of(digits_dir, **{"model.num_classes": 11}))


def test_a_model_that_cannot_be(digits_dir):
    with pytest.raises(UserError, match="config.model: .*pola_pvt_nona"):
        Experiment(config_of(digits_dir, **{"model.name": "pola_pvt_nona"}))


def test_a_batch_that_does_not_divide_over_the_devices(digits_dir):
    with pytest.raises(UserError, match="train.batch_size=12 cannot be split evenly over 8 devices"):
        Experiment(config_of(digits_dir, **{"train.batch_size": 12}))


def test_nothing_to_evaluate(digits_dir, tmp_path):
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluation.evaluate(None, None)
    with pytest.raises(UserError, match="no weights"):
        evaluation.evaluate(config_of(digits_dir), None)
    with pytest.raises(UserError, match="not the work directory of a training"):
        evaluation.evaluate(None, tmp_path)


def test_a_dry_run_tells_and_writes_nothing(digits_dir, tmp_path):
    text = report.describe_dry(Experiment(config_of(digits_dir)))
    for part in ('"name": "pola_pvt_nano"', "head/kernel", "Total: ", "uint8 (16, 32, 32, 3)", "temporary"):
        assert part in text
