"""A training of two dense layers on the digits, through the real pipeline: its files, how it resumes, how it fails."""

import csv
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from polaformer_jax.data import sources
from polaformer_jax.errors import UserError
from polaformer_jax.training import evaluation, loop, reports
from polaformer_jax.training.checkpoints import Checkpoints
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.metrics import read_scalars
from tests.support import dense_model
from tests.support.log_messages import logged
from tests.support.recipes import digits as get_config


def config_of(digits_dir, **changes):
    """Eight steps of a batch of 16, evaluated every four."""
    config = get_config()
    config.data.data_dir = str(digits_dir)
    config.data.workers = 0
    config.model.name = dense_model.NAME  # the loop is tested, not the attention
    config.mesh.data = 2  # of eight fake devices, which take turns on few cores
    config.train.epochs = None
    config.train.steps = 8
    config.train.batch_size = 16
    config.schedule.warmup = 2.0
    config.eval.every = 4.0
    config.eval.batch_size = 100
    config.log.every = 2
    config.checkpoint.every_steps = 3
    config.ema.decay = 0.9
    config.update_from_flattened_dict(changes)
    return config


def checkpoints_of(workdir):
    return Checkpoints(workdir / "checkpoints", keep_last=1, best_metric="accuracy", read_only=True)


def final_params(config, workdir):
    experiment = Experiment(config)
    with checkpoints_of(workdir) as checkpoints:
        params, step = checkpoints.restore_params(experiment.params.abstract, "latest")
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


def test_evaluating_the_work_directory_gives_the_same_numbers(finished, tmp_path):
    _, workdir, result = finished
    rows = tmp_path / "out.csv"
    written = evaluation.evaluate(None, workdir, json_path=tmp_path / "e.json", predictions_path=rows)
    assert written["step"] == result.step
    assert written["accuracy"] == result.evaluation.metrics["accuracy"]
    assert json.loads((tmp_path / "e.json").read_text()) == written
    assert json.loads((workdir / "eval.json").read_text()).keys() == written.keys()
    table = list(csv.DictReader(rows.read_text().splitlines()))
    assert len(table) == 360
    assert np.mean([int(row["correct"]) for row in table]) == pytest.approx(written["accuracy"])
    assert len({row["record"] for row in table}) == 360


def test_saved_weights_evaluate_the_same(finished, tmp_path):
    config, workdir, result = finished
    file = tmp_path / "w.safetensors"
    evaluation.evaluate(None, workdir, json_path=tmp_path / "e.json", weights_path=file)
    config = config.copy_and_resolve_references()
    config.init.weights = str(file)
    assert evaluation.evaluate(config, None)["loss"] == result.evaluation.metrics["loss"]


def test_a_training_starts_from_weights(finished, tmp_path):
    config, workdir, _ = finished
    file = tmp_path / "w.safetensors"
    evaluation.evaluate(None, workdir, json_path=tmp_path / "e.json", weights_path=file)
    config = config.copy_and_resolve_references()
    config.init.weights = str(file)
    experiment = Experiment(config)
    trained, _ = checkpoints_of(workdir).restore_params(experiment.params.abstract, "best")
    jax.tree.map(np.testing.assert_array_equal, experiment.states.initial().params, trained)


def test_a_work_directory_is_evaluated_by_its_checkpoint_wherever_it_began(finished, tmp_path):
    config, workdir, result = finished
    config = config.copy_and_resolve_references()
    config.init.weights = "not/there.safetensors"
    written = evaluation.evaluate(config, workdir, checkpoint="latest", json_path=tmp_path / "e.json")
    assert written["step"] == 8
    assert "weights" not in written


def test_evaluation_does_not_need_the_devices_of_the_training(finished, tmp_path):
    config, workdir, result = finished
    stored = workdir / "config.json"
    text = stored.read_text()
    changed = json.loads(text)
    changed["mesh"]["data"] = 512
    changed["train"]["batch_size"] = 513
    stored.write_text(json.dumps(changed))
    try:
        written = evaluation.evaluate(None, workdir, json_path=tmp_path / "e.json")
    finally:
        stored.write_text(text)
    assert written["accuracy"] == result.evaluation.metrics["accuracy"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"checkpoint": "999"}, r"no checkpoint 999; it has the steps \[\d"),
        ({"checkpoint": "newest"}, "checkpoint: 'newest': expected best, latest or a step"),
        ({"json_path": "."}, "is a folder: name a file"),
        ({"predictions_path": "."}, "is a folder: name a file"),
        ({"weights_path": "w.pth"}, "written as .safetensors"),
        ({"data_dir": "nowhere"}, "is not prepared below nowhere"),
    ],
)
def test_requests_that_cannot_be_met(finished, arguments, message):
    with pytest.raises(UserError, match=message):
        evaluation.evaluate(None, finished[1], **arguments)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("model.alpha", 1.0, "model.alpha: None there, 1.0 now"),
        ("model.param_dtype", "float64", "model.param_dtype: 'float32' there, 'float64' now"),
        ("eval.resize", 40, "eval.resize: 32 there, 40 now"),
    ],
)
def test_another_function_than_the_one_trained_is_refused(finished, field, value, message):
    config, workdir, _ = finished
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({field: value})
    before = (workdir / "eval.json").read_bytes()
    with pytest.raises(UserError, match=f"another function:\\n  {message}\n.*init.weights without"):
        evaluation.evaluate(config, workdir)
    assert (workdir / "eval.json").read_bytes() == before


def test_the_function_that_was_trained_is_evaluated_with_other_memory_and_precision(finished, tmp_path):
    config, workdir, result = finished
    config = config.copy_and_resolve_references()
    config.model.dtype, config.model.attention_impl, config.model.drop_path = "bfloat16", "xla", 0.3
    with logged() as messages:
        written = evaluation.evaluate(config, workdir, json_path=tmp_path / "e.json")
    assert written["loss"] == pytest.approx(result.evaluation.metrics["loss"], rel=0.02)
    said = [message for message in messages if message.startswith("evaluated in another way than trained: ")]
    assert [message.split(": ")[1] for message in said] == ["model.attention_impl", "model.dtype"]


class Unreadable:
    """A source whose records at some indices are no images."""

    def __init__(self, source, bad):
        self._source, self._bad = source, bad
        self.name, self.origin = source.name, source.origin
        self.num_classes, self.class_names = source.num_classes, source.class_names

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        record = self._source[index]
        return {**record, "image": b"no image"} if index in self._bad else record

    def describe(self, index):
        return self._source.describe(index)


@pytest.mark.slow
def test_images_that_cannot_be_decoded_are_skipped_and_counted(digits_dir, tmp_path, monkeypatch):
    opened, bad = sources.open_source, range(0, 1437, 5)
    monkeypatch.setattr(sources, "open_source", lambda data, split: Unreadable(opened(data, split), bad))
    config = config_of(digits_dir, **{"data.on_error": "skip"})
    result = loop.train(config, tmp_path)
    assert (result.evaluation.counted, result.evaluation.skipped) == (288, 72)
    assert "skipped        72 images" in reports.describe(result, tmp_path)
    stream = Experiment(config).inputs.train_batches(0)
    expected = sum(int((~next(stream)["mask"]).sum()) for _ in range(8))
    stream.close()
    assert read_scalars(tmp_path)["skipped"][1].sum() == expected > 0
    evaluation.evaluate(None, tmp_path, predictions_path=tmp_path / "out.csv")
    row = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))[100]
    assert row["label"] and not row["prediction"] and not row["correct"]


def test_nothing_that_can_be_decoded(digits_dir, monkeypatch):
    opened = sources.open_source
    monkeypatch.setattr(sources, "open_source", lambda data, split: Unreadable(opened(data, split), range(2000)))
    experiment = Experiment(config_of(digits_dir, **{"data.on_error": "skip"}))
    with evaluation.Evaluator(experiment) as evaluator, pytest.raises(UserError, match="none of the 360 examples"):
        evaluator(experiment.params.initial())


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
        Experiment(config_of(digits_dir, **{"model.num_classes": 11}))


def test_a_model_that_cannot_be(digits_dir):
    with pytest.raises(UserError, match="config.model: .*pola_pvt_nona"):
        Experiment(config_of(digits_dir, **{"model.name": "pola_pvt_nona"}))


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
        loop.train(config_of(digits_dir, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nothing_to_evaluate(digits_dir, tmp_path):
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluation.evaluate(None, None)
    with pytest.raises(UserError, match="no weights"):
        evaluation.evaluate(config_of(digits_dir), None)
    with pytest.raises(UserError, match="checkpoint: 'best' needs the work directory"):
        evaluation.evaluate(config_of(digits_dir, **{"init.weights": "w"}), None, checkpoint="best")
    with pytest.raises(UserError, match="has no checkpoints"):
        evaluation.evaluate(None, tmp_path)


def test_a_dry_run_tells(digits_dir):
    text = reports.describe_dry(Experiment(config_of(digits_dir)))
    for part in ('"name": "dense"', "head/kernel", "Total: ", "uint8 (16, 32, 32, 3)", "temporary"):
        assert part in text
