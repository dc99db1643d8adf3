"""A whole training on sequences: through buckets of several lengths to a test accuracy, and a row of the results."""

import csv
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import polaformer_jax as pf
from polaformer_jax import weights
from polaformer_jax.analysis.results import lra
from polaformer_jax.cli import entropy, results
from polaformer_jax.errors import UserError
from polaformer_jax.training import evaluation, loop, reports
from polaformer_jax.training.checkpoints import Checkpoints
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.export import export
from polaformer_jax.training.metrics import read_scalars
from tests.support import tiny_lra
from tests.support.recipes import recipe

pytestmark = pytest.mark.usefixtures("shallow")


def config_of(data_dir, arg="listops,steps=6", **changes):
    config = recipe("lra", arg)
    config.data.data_dir = str(data_dir)
    config.data.workers = 0
    config.data.buckets = 8  # of which the data fill two, which are compiled
    config.mesh.data = 1
    config.model.kernel_size = 1  # compiles sooner
    config.train.batch_size = 8
    config.eval.batch_size = 8
    config.eval.every = 2.0
    config.log.every = 2
    config.checkpoint.every_steps = 5
    config.checkpoint.best_after = 0.5
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tiny_lra.write(tmp_path_factory.mktemp("lra"))


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    config, workdir = config_of(data_dir), tmp_path_factory.mktemp("run")
    return config, workdir, loop.train(config, workdir)


def test_the_test_split_is_reported_from_the_checkpoint_that_dev_chose(finished):
    _, workdir, result = finished
    written = json.loads((workdir / "eval.json").read_text())
    assert (written["split"], written["sequences"]) == ("test", 20)
    scalars = read_scalars(workdir)
    steps, accuracies = scalars["eval_accuracy"]
    assert steps.tolist() == [2, 4, 6]
    late = {int(step): accuracy for step, accuracy in zip(steps, accuracies, strict=True) if step > 3}
    assert result.step in late and late[result.step] == max(late.values())


def test_evaluations_before_the_given_share_do_not_count(finished):
    with Checkpoints(finished[1] / "checkpoints", keep_last=1, best_metric="accuracy", read_only=True) as checkpoints:
        assert min(checkpoints.steps()) > 3


def test_speed_is_told_in_sequences(finished):
    scalars = read_scalars(finished[1])
    assert (scalars["sequences_per_second"][1] > 0).all()
    assert "images_per_second" not in scalars


def test_the_last_words_are_of_sequences(finished):
    _, workdir, result = finished
    text = reports.describe(result, workdir)
    assert "sequences      20" in text and "top-5" not in text
    assert [path.name for path in result.pictures] == ["curves.png", "confusion.png"]


def test_the_training_says_what_it_took(finished):
    written = json.loads((finished[1] / "training.json").read_text())
    assert written["steps"] == 6 and written["seconds"] > 0 and "CPU" in written["hardware"]


def test_the_result_becomes_a_row(finished, tmp_path, capsys):
    _, workdir, result = finished
    file = tmp_path / "docs/lra.csv"
    for state in ("added to", "is already in"):
        assert results.main(["--dir", str(file.parent), "add", str(workdir)]) == 0
        assert state in capsys.readouterr().out
    (row,) = csv.DictReader(file.read_text().splitlines())
    assert [row[name] for name in ("task", "tokenisation", "attention", "alpha", "seed", "steps")] == [
        "listops", "no_brackets", "polarity", "3.0", "0", "6",
    ]  # fmt: skip
    assert row["data"] == "made up" and "train.batch_size=8" in row["changes"].split()
    assert "lr" not in row["changes"] and "data_dir" not in row["changes"]
    assert float(row["accuracy"]) == pytest.approx(100 * result.evaluation.metrics["accuracy"], abs=0.01)


def test_a_result_whose_time_is_not_known_is_no_row(finished, tmp_path):
    for name in ("config.json", "eval.json", "training.json"):
        shutil.copy(finished[1] / name, tmp_path)
    training = json.loads((tmp_path / "training.json").read_text())
    (tmp_path / "training.json").write_text(json.dumps({**training, "seconds": None}))
    with pytest.raises(UserError, match="training.json has no seconds"):
        lra.row_of(tmp_path)


def test_evaluating_the_work_directory_gives_the_same_numbers(finished, tmp_path):
    _, workdir, result = finished
    rows = tmp_path / "out.csv"
    written = evaluation.evaluate(None, workdir, json_path=tmp_path / "e.json", predictions_path=rows)
    assert written["split"] == "test"
    assert written["accuracy"] == result.evaluation.metrics["accuracy"]
    source = Experiment(finished[0]).inputs.source("test")
    table = list(csv.DictReader(rows.read_text().splitlines()))
    assert [int(row["label"]) for row in table] == [source[i]["label"] for i in range(20)]  # in the split's order
    assert [row["record"] for row in table] == [source.describe(i) for i in range(20)]


@pytest.mark.parametrize(
    "changes", [{"model.attention": "relu", "model.alpha": None}, {"task.tokenisation": "brackets"}]
)
def test_another_attention_or_tokenisation_than_was_trained_is_refused(finished, changes):
    config, workdir, _ = finished
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    before = (workdir / "eval.json").read_bytes()
    field = next(iter(changes))
    with pytest.raises(UserError, match=f"(?s)another function:.*{field}: '.*' there, '{changes[field]}' now"):
        evaluation.evaluate(config, workdir)
    assert (workdir / "eval.json").read_bytes() == before


def test_another_split_can_be_evaluated(finished, tmp_path):
    config, workdir, result = finished
    written = evaluation.evaluate(None, workdir, split="dev", json_path=workdir.parent / "dev.json")
    scalars = read_scalars(workdir)
    assert written["split"] == "dev"
    assert written["loss"] == pytest.approx(scalars["eval_loss"][1][result.step // 2 - 1], rel=1e-5)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "training.json"):
        shutil.copy(workdir / name, copy)
    shutil.copy(workdir.parent / "dev.json", copy / "eval.json")
    with pytest.raises(UserError, match="raw weights on the split 'dev' from made up, expected raw on 'test'"):
        lra.row_of(copy)
    result = json.loads((workdir / "eval.json").read_text())
    del result["origin"]
    (copy / "eval.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match="on the split 'test' from None, expected .* where its data came from"):
        lra.row_of(copy)


def test_padding_to_the_longest_gives_each_example_the_same_result(finished, tmp_path):
    _, workdir, result = finished
    config = finished[0].copy_and_resolve_references()
    config.data.buckets = 1
    experiment = Experiment(config)
    with Checkpoints(workdir / "checkpoints", keep_last=1, best_metric="accuracy", read_only=True) as checkpoints:
        params, _ = checkpoints.restore_params(experiment.params.abstract, "best")
    with evaluation.Evaluator(experiment, "test") as evaluator:
        padded = evaluator(params)
    assert padded.metrics["loss"] == pytest.approx(result.evaluation.metrics["loss"], rel=1e-5)
    for name in ("label", "prediction"):
        np.testing.assert_array_equal(padded.outputs[name], result.evaluation.outputs[name])
    np.testing.assert_allclose(padded.outputs["probability"], result.evaluation.outputs["probability"], rtol=1e-4)


def test_weights_are_exported_and_evaluate_the_same(finished, tmp_path):
    config, workdir, result = finished
    path = tmp_path / "a.safetensors"
    assert export(workdir, path) == result.step
    metadata = weights.read_file(path).metadata
    assert json.loads(metadata["task"]) == {"name": "listops", "tokenisation": "no_brackets"}
    assert "preprocess" not in metadata
    assert pf.create_model(weights=path).config.max_length == 2048
    config = config.copy_and_resolve_references()
    config.init.weights = str(path)
    assert evaluation.evaluate(config, None)["loss"] == result.evaluation.metrics["loss"]


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_end(finished, tmp_path):
    config, straight, result = finished
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints/6")
    loop.train(config, tmp_path)
    experiment = Experiment(config)
    ends = []
    for workdir in (straight, tmp_path):
        with Checkpoints(workdir / "checkpoints", keep_last=1, best_metric="accuracy", read_only=True) as checkpoints:
            ends.append(checkpoints.restore_params(experiment.params.abstract, 6)[0])
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_a_dry_run_tells_the_largest_batch(data_dir):
    text = reports.describe_dry(Experiment(config_of(data_dir)))
    for part in ("batch['tokens']: int32 (8, 2048)", "batch['length']: int32 (8,)", "head/fc2/kernel", "temporary"):
        assert part in text


def test_pairs_are_evaluated(data_dir, tmp_path):
    config = config_of(data_dir, "retrieval,attention=relu,steps=1")
    experiment = Experiment(config)
    with evaluation.Evaluator(experiment) as evaluator:
        assert evaluator(experiment.params.initial()).counted == 20


def test_missing_data_is_said_at_the_start(tmp_path):
    with pytest.raises(UserError, match="prepare lra_listops --data-dir"):
        loop.train(config_of(tmp_path / "nothing"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"task.tokenisation": "words"}, "task.tokenisation='words': with task.name='listops' it is brackets, no_br"),
        ({"model.attention": "linear"}, "model.attention='linear': it is one of polarity, softmax, relu"),
        ({"data.source": "tfds"}, "data.source='tfds': with task.name='listops' it is 'lra'"),
        ({"model.name": "pola_pvt_t"}, "model.name='pola_pvt_t': with task.name='listops' it is 'pola_sequence'"),
        ({"optimizer.layer_decay": 0.5}, "optimizer.layer_decay=0.5: it is for image models"),
        ({"task.name": "image"}, "sequence models and data belong to sequence tasks"),
        ({"checkpoint.best_after": 1.0}, r"checkpoint.best_after=1.0: it must be in \[0, 1\)"),
        ({"optimizer.clip_value": 0.0}, "optimizer.clip_value=0.0: it must be positive, or None"),
        ({"data.buckets": 0}, "data.buckets=0: it must be positive"),
        ({"model.num_classes": 11}, "model.num_classes=11, but lra_listops has 10 classes"),
        ({"model.kernel_size": 4}, r"config.model: PolaSequence cannot be built:\s+- kernel_size=4"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(data_dir, change, message):
    with pytest.raises(UserError, match=message):
        Experiment(config_of(data_dir, **change))


def test_the_entropies_of_a_run_become_a_table_and_a_picture(finished, tmp_path, capsys):
    _, workdir, _ = finished
    arguments = [str(workdir), "--examples", "3", "--plot", str(tmp_path / "e.png"), "--csv", str(tmp_path / "e.csv")]
    assert entropy.main(arguments) == 0
    rows = list(csv.DictReader((tmp_path / "e.csv").read_text().splitlines()))
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[-1] for line in printed[1:]] == [f"{float(row['deviation']):.4f}" for row in rows]
    assert {row["model"] for row in rows} == {"pola_sequence"} and len({row["accuracy"] for row in rows}) == 1
    assert len(rows) == 4 * 2 and {row["run"] for row in rows} == {workdir.name}  # attentions, heads
    assert all(0 < float(row["entropy"]) <= 1 and row["examples"] == "3" for row in rows)
    with Image.open(tmp_path / "e.png") as picture:
        assert len(picture.convert("L").getcolors()) > 20  # not blank
