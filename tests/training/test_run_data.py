"""The data is part of a run: its classes and examples are remembered, compared, and refused where they differ."""

import json
import shutil

import numpy as np
import pytest
import safetensors
from PIL import Image

from polaformer_jax.errors import UserError
from polaformer_jax.training import evaluation, loop, run_data
from polaformer_jax.training.export import export
from tests.support.log_messages import logged
from tests.support.recipes import dense_digits

CLASSES = ("cat", "dog", "owl")
EPOCHS = {"train.steps": None, "train.epochs": 2.0, "schedule.warmup": 0.0, "eval.every": 1.0}


def add_images(root, split, name, count, *, label=0, start=0):
    folder = root / split / name
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        pixels = np.random.default_rng(100 * label + number).integers(0, 60, (8, 8, 3)) + 60 * label
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def animals_once(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "animals"
    for split, count in (("train", 8), ("val", 4)):
        for label, name in enumerate(CLASSES):
            add_images(root, split, name, count, label=label)
    return root


def config_of(root, **changes):
    fields = {"data.source": "folder", "data.name": "animals", "data.eval_split": "val", "model.num_classes": 3}
    sizes = {
        "train.batch_size": 4,
        "eval.batch_size": 12,
        "mesh.data": 1,
        "checkpoint.keep_last": 9,
        "log.pictures": False,
    }
    return dense_digits(root, **fields, **sizes, **changes)


@pytest.fixture(scope="module")
def begun_once(animals_once, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    loop.train(config_of(animals_once, **EPOCHS), workdir)
    for folder in (workdir / "checkpoints").iterdir():
        if int(folder.name) > 6:
            shutil.rmtree(folder)
    return workdir


@pytest.fixture
def begun(animals_once, begun_once, tmp_path):
    """Data, and a run of two epochs that was stopped after the first, with a checkpoint at step 6 of 12."""
    shutil.copytree(animals_once, tmp_path / "animals")
    shutil.copytree(begun_once, tmp_path / "run")
    return tmp_path / "animals", tmp_path / "run"


def test_what_is_kept(begun):
    _, workdir = begun
    data = run_data.read(workdir)
    assert data.class_names == CLASSES and data.epoch_examples == 24 and data.changes == ()
    assert {name: split["examples"] for name, split in data.splits.items()} == {"train": 24, "val": 12}


def test_other_names_are_refused_with_both_lists(begun, tmp_path):
    animals, workdir = begun
    export(workdir, tmp_path / "a.safetensors")
    for split in ("train", "val"):
        (animals / split / "cat").rename(animals / split / "zebra")  # now the last class, not the first
    lists = "3 classes: cat, dog, owl\n.*3 classes: dog, owl, zebra\n"
    with pytest.raises(UserError, match=lists):
        loop.train(config_of(animals, **EPOCHS, **{"data.on_change": "accept"}), workdir)
    with pytest.raises(UserError, match=lists):
        evaluation.evaluate(None, workdir, data_dir=str(animals))
    config = config_of(animals, **{"init.weights": str(tmp_path / "a.safetensors")})
    with pytest.raises(UserError, match=lists):
        evaluation.evaluate(config, None)


def test_exported_weights_have_the_names_without_the_data(begun, tmp_path):
    animals, workdir = begun
    shutil.rmtree(animals)
    export(workdir, tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["classes"]) == list(CLASSES)


def test_other_examples_are_refused_or_accepted_for_as_many_steps(begun):
    animals, workdir = begun
    add_images(animals, "train", "cat", 20, start=8)
    with pytest.raises(UserError, match=r"train: 24 examples, digest \w+ then, 44 examples, .*data.on_change=accept"):
        loop.train(config_of(animals, **EPOCHS), workdir)
    with logged() as messages:
        loop.train(config_of(animals, **EPOCHS, **{"data.on_change": "accept"}), workdir)
    assert any("the run goes on with it in as many steps as before: train: 24" in message for message in messages)
    assert max(int(folder.name) for folder in (workdir / "checkpoints").iterdir()) == 12
    data = run_data.read(workdir)
    (change,) = data.changes
    assert (change["split"], change["before"]["examples"], change["now"]["examples"]) == ("train", 24, 44)
    assert data.epoch_examples == 24
    loop.train(config_of(animals, **EPOCHS), workdir)  # it is the run's data now
    assert run_data.read(workdir) == data


def test_the_same_data_elsewhere_is_the_same(begun, tmp_path):
    animals, workdir = begun
    shutil.copytree(animals, tmp_path / "copy")
    loop.train(config_of(tmp_path / "copy", **EPOCHS), workdir)
    assert run_data.read(workdir).changes == ()


def test_a_run_of_an_earlier_version_goes_on(begun):
    animals, workdir = begun
    (workdir / "data.json").unlink()
    add_images(animals, "train", "cat", 4, start=8)
    loop.train(config_of(animals, **EPOCHS), workdir)
    assert run_data.read(workdir).epoch_examples == 28


def test_after_a_broken_image_the_run_goes_on_without_it(begun):
    animals, workdir = begun
    broken = animals / "train" / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(UserError, match=r"dog/3.png: corrupt image"):
        loop.train(config_of(animals, **EPOCHS), workdir)
    with logged() as messages:
        loop.train(config_of(animals, **EPOCHS, **{"data.on_error": "skip"}), workdir)
    assert "the run goes on with another answer to faults: data.on_error: 'stop' there, 'skip' now" in messages


def test_a_classifier_for_other_classes_is_warned_of(begun, tmp_path):
    animals, workdir = begun
    export(workdir, tmp_path / "a.safetensors")
    for split in ("train", "val"):
        (animals / split / "dog").rename(animals / split / "hound")
    with logged() as messages:
        loop.train(config_of(animals, **{"init.weights": str(tmp_path / "a.safetensors")}), tmp_path / "other")
    assert any("for other classes (label 1: dog there, hound in the data)" in message for message in messages)


def test_long_lists_are_shown_where_they_differ():
    there = tuple(f"class {number}" for number in range(100))
    here = (*there[:7], "another", *there[8:])
    with pytest.raises(UserError) as error:
        run_data.check_names(there, here, "the run", "the data")
    assert "the run: 100 classes, of which differ: 7: class 7\n" in str(error.value)
    assert "the data: 100 classes, of which differ: 7: another\n" in str(error.value)
    run_data.check_names(there, None, "the run", "the data")  # without names nothing is known


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "{}"),
        '{"class_names": "cat", "splits": {}, "epoch_examples": 1, "changes": []}',
        '{"class_names": null, "splits": {"train": {}}, "epoch_examples": 1, "changes": []}',
    ],
)
def test_a_damaged_file_is_named(content, tmp_path):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(UserError, match="data.json is damaged"):
        run_data.read(tmp_path)
