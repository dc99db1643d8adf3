"""Weights out of a training's checkpoint, and files of any kind as the beginning of a training or for evaluation."""

import dataclasses
import json
import logging
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

import polaformer_jax as pf
from polaformer_jax import cli, weights
from polaformer_jax.cli import export as command
from polaformer_jax.training import evaluation
from polaformer_jax.training.checkpoints import Checkpoints
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.export import export
from polaformer_jax.training.workdir import claim
from tests.support.recipes import digits as get_config
from tests.support.torch_files import write_pth

pytestmark = pytest.mark.usefixtures("shallow")


def config_of(digits_dir, **changes):
    config = get_config()
    config.data.data_dir = str(digits_dir)
    config.data.workers = 0
    config.model.kernel_size = 1
    config.mesh.data = 1
    config.update_from_flattened_dict(changes)
    return config


def flat(params) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in weights.flatten(params).items()}


def of_file(path) -> dict[str, np.ndarray]:
    return flat(nnx.to_pure_dict(nnx.state(pf.create_model(weights=path))))


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def trained(digits_dir, tmp_path_factory):
    """A work directory with two checkpoints, of steps 1 (the better one) and 2, and the parameters of both."""
    workdir, config = tmp_path_factory.mktemp("run"), config_of(digits_dir)
    state, saved = Experiment(config).states.initial(), {}
    with claim(workdir, config), Checkpoints(workdir / "checkpoints", keep_last=2, best_metric="accuracy") as kept:
        for step, accuracy in ((1, 0.9), (2, 0.8)):
            raised = jax.tree.map(lambda leaf: np.asarray(leaf) + 1, (state.step, state.params))  # compiles nothing
            taken, params = jax.device_put(raised, state.step.sharding)
            state = dataclasses.replace(state, step=taken, params=params)
            kept.save(state, {"accuracy": accuracy, "loss": 1.0})
            saved[step] = flat(params)
    return workdir, saved


@pytest.mark.parametrize("checkpoint, step", [(None, 1), ("best", 1), ("latest", 2), ("2", 2)])
def test_the_weights_of_a_checkpoint(trained, checkpoint, step, tmp_path):
    workdir, saved = trained
    assert export(workdir, tmp_path / "a.safetensors", checkpoint=checkpoint) == step
    assert_same(of_file(tmp_path / "a.safetensors"), saved[step])


def test_the_file_says_what_it_holds(trained, tmp_path):
    export(trained[0], tmp_path / "a.safetensors")
    metadata = weights.read_file(tmp_path / "a.safetensors").metadata
    assert json.loads(metadata["classes"]) == [str(digit) for digit in range(10)]
    assert json.loads(metadata["preprocess"]) == {"resize": 32, "crop": 32}
    assert json.loads(metadata["facts"]) == {"data": "sklearn_digits", "step": 1, "kind": "raw"}


def test_the_training_may_be_running(trained, digits_dir, tmp_path):
    workdir, saved = trained
    with claim(workdir, config_of(digits_dir)):
        assert command.main([str(tmp_path / "a.safetensors"), "--workdir", str(workdir), "--layout", "torch"]) == 0
    assert weights.read_file(tmp_path / "a.safetensors").layout == "torch"
    assert_same(of_file(tmp_path / "a.safetensors"), saved[1])


def test_the_data_may_be_elsewhere(trained, tmp_path, caplog, monkeypatch):
    workdir, _ = trained
    copy = tmp_path / "copy"
    copy.mkdir()
    stored = json.loads((workdir / "config.json").read_text())
    stored["data"]["data_dir"] = str(tmp_path / "gone")
    (copy / "config.json").write_text(json.dumps(stored))
    (copy / "checkpoints").symlink_to(workdir / "checkpoints")
    monkeypatch.setattr(logging.getLogger("polaformer_jax"), "propagate", True)
    export(copy, tmp_path / "a.safetensors")
    assert "classes" not in weights.read_file(tmp_path / "a.safetensors").metadata
    assert "will have no class names" in caplog.text


@pytest.mark.parametrize(
    "out, options, status, message",
    [
        ("a.pth", [], 1, "a.pth': expected a name that ends in .safetensors, .stablehlo, .onnx"),
        ("a.safetensors", ["--preprocess"], 1, "--preprocess is an option of the formats stablehlo, onnx"),
        ("a.safetensors", ["--checkpoint", "7"], 1, "has no checkpoint 7; it has the steps [1, 2]"),
        ("a.safetensors", ["--checkpoint", "newest"], 1, "--checkpoint: 'newest': expected best, latest or a step"),
    ],
)
def test_what_cannot_be_exported(trained, out, options, status, message, tmp_path, capsys):
    assert command.main([str(tmp_path / out), "--workdir", str(trained[0]), *options]) == status
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_replaced_unasked(trained, tmp_path, capsys):
    target = tmp_path / "a.safetensors"
    target.write_text("precious")
    assert command.main([str(target), "--workdir", str(trained[0])]) == 1
    assert "exists: give another name, or --overwrite" in capsys.readouterr().err
    assert command.main([str(target), "--workdir", str(trained[0]), "--overwrite"]) == 0
    (tmp_path / "folder.safetensors").mkdir()
    assert command.main([str(tmp_path / "folder.safetensors"), "--workdir", str(trained[0]), "--overwrite"]) == 1
    assert "error: " in capsys.readouterr().err


def test_no_work_directory(tmp_path, capsys):
    assert command.main([str(tmp_path / "a.safetensors"), "--workdir", str(tmp_path)]) == 1
    assert "is not the work directory of a training" in capsys.readouterr().err


# --- beginning from a file


def official(tmp_path, digits_dir, **changes):
    """An official checkpoint of the config's model, and the model."""
    model = Experiment(config_of(digits_dir, **changes))
    model = model.model(model.params.initial())
    return write_pth(tmp_path / "official.pth", {"model": weights.to_torch(model)}), model


def test_a_training_starts_from_an_official_checkpoint(digits_dir, tmp_path):
    path, model = official(tmp_path, digits_dir, seed=3)
    begun = Experiment(config_of(digits_dir, **{"init.weights": str(path)})).params.initial()
    assert_same(flat(begun), flat(nnx.to_pure_dict(nnx.state(model))))


def test_fine_tuning_fits_image_size_and_classes(digits_dir, tmp_path, caplog, monkeypatch):
    saved = pf.create_model("pola_pvt_nano", num_classes=7, kernel_size=1, rngs=nnx.Rngs(0))
    path = write_pth(tmp_path / "a.pth", {"model": weights.to_torch(saved)})
    changes = {"init.weights": str(path), "model.img_size": 64, "eval.resize": 64, "eval.crop": 64}
    monkeypatch.setattr(logging.getLogger("polaformer_jax"), "propagate", True)
    begun = flat(Experiment(config_of(digits_dir, **changes)).params.initial())
    assert begun["head.kernel"].shape[1] == 10 and not begun["head.kernel"].any()
    assert begun["pos_embed1"].shape == (1, 256, 32)
    np.testing.assert_array_equal(begun["block1.0.attn.qg.kernel"], saved.block1[0].attn.qg.kernel[...])
    assert "pos_embed1: resized from 8x8 to 16x16 (bilinear)" in caplog.text
    assert "head: 7 classes: replaced by zeros for 10 classes" in caplog.text


def test_evaluation_invents_no_classifier(digits_dir, tmp_path):
    saved = pf.create_model("pola_pvt_nano", num_classes=7, kernel_size=1, rngs=nnx.Rngs(0))
    path = write_pth(tmp_path / "a.pth", {"model": weights.to_torch(saved)})
    config = config_of(digits_dir, **{"init.weights": str(path)})
    with pytest.raises(weights.WeightsError, match=r"head.bias \(7,\), expected \(10,\)"):
        evaluation.evaluate(config, None)


@pytest.mark.slow
def test_an_official_checkpoint_is_evaluated_directly(digits_dir, tmp_path):
    """And what `--save_weights` writes of it evaluates the same."""
    path, _ = official(tmp_path, digits_dir, seed=3)
    config = config_of(digits_dir, **{"init.weights": str(path)})
    first = evaluation.evaluate(config, None, weights_path=tmp_path / "b.safetensors")
    config.init.weights = str(tmp_path / "b.safetensors")
    second = evaluation.evaluate(config, None)
    assert first["images"] == second["images"] == 360
    assert first["accuracy"] == second["accuracy"] and first["loss"] == second["loss"]


def test_another_alpha_is_refused(digits_dir, tmp_path):
    saved = pf.create_model("pola_pvt_nano", num_classes=10, kernel_size=1, alpha=3, rngs=nnx.Rngs(0))
    weights.save_weights(saved, tmp_path / "a.safetensors")
    config = config_of(digits_dir, **{"init.weights": str(tmp_path / "a.safetensors")})
    with pytest.raises(weights.WeightsError, match="config.model.alpha"):
        Experiment(config).params.initial()


def test_a_training_is_pushed_with_the_accuracy_of_its_own_evaluation(trained, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained[0], workdir)
    words = ["push", "user/name", "--workdir", str(workdir), "--dry-run"]
    assert cli.main([*words, str(tmp_path / "unknown")]) == 0
    assert "the model card will have no accuracy: there is no" in capsys.readouterr().err
    evaluated = {"data": "sklearn_digits", "split": "test", "step": 1, "kind": "raw", "accuracy": 0.75, "images": 360}
    (workdir / "eval.json").write_text(json.dumps(evaluated))
    assert cli.main([*words, str(tmp_path / "known")]) == 0
    card = (tmp_path / "known/README.md").read_text()
    assert "| sklearn_digits | test | 360 | 75.00 % |" in card and "- Step: 1" in card
    assert_same(of_file(tmp_path / "known"), trained[1][1])
    assert cli.main([*words, str(tmp_path / "latest"), "--checkpoint=latest"]) == 1
    assert "is of other weights (step 1 kind raw) than those to push (step 2 kind raw)" in capsys.readouterr().err
    assert not (tmp_path / "latest").exists()
