"""What is evaluated, and what is refused: work directories, files of weights, records that cannot be decoded."""

import csv
import json

import numpy as np
import pytest

from polaformer_jax.data import sources
from polaformer_jax.errors import NotWrittenError, UserError
from polaformer_jax.training import evaluation, loop, reports
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.metrics import read_scalars
from tests.support.log_messages import logged
from tests.support.recipes import dense_digits


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


def test_outputs_are_tried_before_the_work_and_no_result_is_lost(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "Experiment", None)  # nothing of the work begins
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="result .*a.json' cannot be written"):
        evaluation.evaluate(None, finished[1], json_path=tmp_path / "file" / "a.json")
    monkeypatch.undo()

    def full(path, content):
        raise UserError(f"result {path} cannot be written: No space left on device")

    monkeypatch.setattr(evaluation, "write_json", full)
    with pytest.raises(NotWrittenError, match="No space left") as error:
        table = tmp_path / "table.csv"
        evaluation.evaluate(None, finished[1], json_path=tmp_path / "a.json", predictions_path=table)
    assert error.value.result["accuracy"] == finished[2].evaluation.metrics["accuracy"]
    assert table.exists()  # the other output is there


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
        self.name, self.origin, self.digest = source.name, source.origin, source.digest
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
    config = dense_digits(digits_dir, **{"data.on_error": "skip"})
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
    experiment = Experiment(dense_digits(digits_dir, **{"data.on_error": "skip"}))
    with evaluation.Evaluator(experiment) as evaluator, pytest.raises(UserError, match="none of the 360 examples"):
        evaluator(experiment.params.initial())


def test_nothing_to_evaluate(digits_dir, tmp_path):
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluation.evaluate(None, None)
    with pytest.raises(UserError, match="no weights"):
        evaluation.evaluate(dense_digits(digits_dir), None)
    with pytest.raises(UserError, match="checkpoint: 'best' needs the work directory"):
        evaluation.evaluate(dense_digits(digits_dir, **{"init.weights": "w"}), None, checkpoint="best")
    with pytest.raises(UserError, match="has no checkpoints"):
        evaluation.evaluate(None, tmp_path)
