"""Prepared tfds data sets: the digits, any other, ImageNet's own builder; reading never prepares or downloads."""

import hashlib
import io
import json
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.datasets
import tensorflow_datasets as tfds
from PIL import Image

from polaformer_jax.cli import prepare as prepare_command
from polaformer_jax.data import digits, prepare
from polaformer_jax.data.images.transforms import EvalImageTransform, decode
from polaformer_jax.data.pipeline import EvalBatches
from polaformer_jax.data.records import Source
from polaformer_jax.data.sources import open_source
from polaformer_jax.data.tfds_source import find_prepared
from polaformer_jax.errors import UserError
from tests.support.fake_imagenet import jpeg, write_tars


def open_split(data_dir, name="sklearn_digits", split="test"):
    return open_source(SimpleNamespace(source="tfds", name=name, data_dir=data_dir), split)


def fake(data_dir, directory, file_format="array_record"):
    """As much of a prepared data set as is looked at before its records are."""
    path = Path(data_dir) / directory
    path.mkdir(parents=True)
    (path / "dataset_info.json").write_text(json.dumps({"fileFormat": file_format}))
    return path


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Three classes of JPEG images of many sizes, in two configs, with more features than we need."""

    VERSION = tfds.core.Version("2.1.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="few"), tfds.core.BuilderConfig(name="many")]

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=["round", "square", "star"]),
            "outline": tfds.features.Image(shape=(None, None, 1)),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"learn": self._generate_examples(0, 9), "check": self._generate_examples(9, 5)}

    def _generate_examples(self, start, count):
        for i in range(start, start + count):
            outline = np.zeros((20 + i, 30, 1), np.uint8)
            image = io.BytesIO(jpeg(i, (20 + i, 30)))
            yield i, {"image": image, "label": i % 3, "outline": outline, "file_name": f"{i}.jpg"}


class Sentences(tfds.core.GeneratorBasedBuilder):
    """Not images."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=2)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"text": "no image", "label": 0}


class Fragile(tfds.core.GeneratorBasedBuilder):
    """Its preparation fails half-way as long as `broken` is set."""

    VERSION = tfds.core.Version("1.0.0")
    broken = True

    def _info(self):
        features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=2)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"image": io.BytesIO(jpeg(0)), "label": 0}
        if self.broken:
            raise OSError("the disk is gone")


# --- the digits


def test_the_digits_are_those_of_scikit_learn(digits_dir):
    expected = sklearn.datasets.load_digits()
    both = expected.images.astype(np.uint8), expected.target
    originals = {image.tobytes(): label for image, label in zip(*both, strict=True)}
    counts = {}
    for split in ("train", "test"):
        source = open_split(digits_dir, split=split)
        images = [Image.open(io.BytesIO(source[i]["image"])) for i in range(len(source))]
        assert {(image.format, image.mode, image.size) for image in images} == {("PNG", "L", (8, 8))}
        pixels = np.stack([np.asarray(image) for image in images])
        assert pixels.max() == 255
        intensities = np.rint(pixels / 255 * 16).astype(np.uint8)
        labels = np.array([source[i]["label"] for i in range(len(source))])
        assert all(originals.pop(image.tobytes()) == label for image, label in zip(intensities, labels, strict=True))
        counts[split] = np.bincount(labels, minlength=10)
        assert source.class_names == tuple("0123456789") and source.num_classes == 10
    assert not originals  # every image once, none in both splits
    assert (counts["train"].sum(), counts["test"].sum()) == (1437, 360)
    share = counts["test"] / (counts["train"] + counts["test"]) * 1797
    np.testing.assert_allclose(share, 360, atol=6)  # of each class, within one image of a fifth


def test_the_split_is_written_down():
    test = digits.test_indices(sklearn.datasets.load_digits().target)
    assert test[:12].tolist() == [8, 9, 39, 46, 47, 49, 50, 51, 53, 54, 55, 65]
    assert hashlib.sha256(test.astype("<i8").tobytes()).hexdigest()[:16] == "32bf649ea782d3a6"


def test_preparing_again_does_nothing(digits_dir, capsys):
    files = {path: path.stat().st_mtime_ns for path in Path(digits_dir).rglob("*")}
    assert prepare_command.main(["sklearn_digits", "--data-dir", digits_dir]) == 0
    assert "sklearn_digits is already prepared" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in Path(digits_dir).rglob("*")} == files


def test_preparing_elsewhere_gives_the_same_records(digits_dir, tmp_path, capsys):
    assert prepare_command.main(["sklearn_digits", "--data-dir", str(tmp_path)]) == 0
    assert "(train 1437, test 360)" in capsys.readouterr().out
    first, second = open_split(digits_dir), open_split(tmp_path)
    assert all(first[i] == second[i] for i in range(360))


def test_reading_and_finding_import_no_tensorflow(digits_dir):
    code = f"""
import sys
from types import SimpleNamespace
from polaformer_jax.cli import prepare
from polaformer_jax.data import pipeline, sources
from polaformer_jax.data.images import transforms
assert prepare.main(["sklearn_digits", "--data-dir", {digits_dir!r}]) == 0
assert "tensorflow_datasets" not in sys.modules
source = sources.open_source(SimpleNamespace(source="tfds", name="sklearn_digits", data_dir={digits_dir!r}), "test")
next(iter(pipeline.EvalBatches(source, transforms.EvalImageTransform(8, 8, num_classes=10), batch_size=4)))
print([name for name in ("tensorflow", "flax", "sklearn") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


# --- any prepared data set


@pytest.fixture(scope="module")
def shapes_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shapes")
    prepare.prepare("shapes/many", directory)
    return directory


@pytest.mark.parametrize("name", ["shapes/many", "shapes/many:2.1.0", "shapes"])
def test_any_image_classification_data_set_is_chosen_by_name(shapes_dir, name):
    source = open_split(shapes_dir, name, "check")
    assert isinstance(source, Source)
    assert (len(source), source.num_classes, source.class_names) == (5, 3, ("round", "square", "star"))
    assert source.describe(4) == f"{name}/check[4]"
    (batch,) = EvalBatches(source, EvalImageTransform(16, 16, num_classes=3), batch_size=8)
    assert sorted(batch["label"][batch["mask"]].tolist()) == [0, 0, 1, 1, 2]
    heights = {len(decode(source[i]["image"])) for i in range(5)}
    assert heights == {29, 30, 31, 32, 33}


@pytest.mark.parametrize(("split", "length"), [("train[:90%]", 1293), ("train[90%:]", 144), ("train+test", 1797)])
def test_splits_may_be_sliced(digits_dir, split, length):
    source = open_split(digits_dir, split=split)
    assert len(source) == length and source.describe(3) == f"sklearn_digits/{split}[3]"


@pytest.mark.parametrize("split", ["validation", "train[:x%]", "", "test[:0]"])
def test_an_unknown_split_lists_those_there_are(digits_dir, split):
    with pytest.raises(UserError, match="test, train|no examples"):
        open_split(digits_dir, split=split)


def test_the_newest_version_is_taken_and_half_written_ones_are_not(tmp_path):
    for version in ("2.0.0", "10.0.0", "9.9.9"):
        fake(tmp_path, f"cars/{version}")
    fake(tmp_path, "cars/incomplete.AB12CD_11.0.0")
    (tmp_path / "cars" / "12.0.0").mkdir()
    assert find_prepared("cars", tmp_path).directory.name == "10.0.0"
    assert find_prepared("cars:2.0.0", tmp_path).directory.name == "2.0.0"
    assert find_prepared("cars:3.0.0", tmp_path) is None


def test_several_configs_must_be_told_apart(tmp_path):
    fake(tmp_path, "cars/red/1.0.0"), fake(tmp_path, "cars/blue/1.0.0")
    assert find_prepared("cars/red", tmp_path).directory.parent.name == "red"
    with pytest.raises(UserError, match="choose one: cars/blue, cars/red"):
        find_prepared("cars", tmp_path)


@pytest.mark.parametrize("name", ["", "a/b/c", "../up", "cars:new", "name with space"])
def test_a_name_of_another_form_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="expected NAME"):
        find_prepared(name, tmp_path)


def test_a_data_set_that_is_not_prepared_names_the_command_and_downloads_nothing(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    with pytest.raises(UserError, match=rf"polaformer prepare mnist --data-dir {tmp_path}"):
        open_split(tmp_path, "mnist")
    assert not list(tmp_path.iterdir())


def test_tfrecord_files_are_refused_with_the_way_out(tmp_path, capsys):
    fake(tmp_path, "cars/1.0.0", "tfrecord")
    with pytest.raises(UserError, match="(?s)prepared as tfrecord.*prepare to-arrayrecord cars --data-dir") as caught:
        open_split(tmp_path, "cars")
    assert str(tmp_path / "cars/1.0.0") in str(caught.value)
    assert prepare_command.main(["cars", "--data-dir", str(tmp_path)]) == 1
    assert "prepared as tfrecord" in capsys.readouterr().err


def test_a_data_set_of_another_kind_is_refused(tmp_path, capsys):
    message = "not for image classification.*found label .ClassLabel., text .Text."
    assert prepare_command.main(["sentences", "--data-dir", str(tmp_path)]) == 1
    assert "not for image classification" in capsys.readouterr().err
    tfds.builder("sentences", data_dir=tmp_path, file_format="array_record").download_and_prepare()
    with pytest.raises(UserError, match=message):
        open_split(tmp_path, "sentences", "train")


def test_an_unknown_kind_of_source_lists_those_there_are(tmp_path):
    with pytest.raises(UserError, match="data.source is 'zip', expected one of: folder, tfds"):
        open_source(SimpleNamespace(source="zip", name="x", data_dir=tmp_path), "train")


def test_a_source_travels_by_pickle(digits_dir):
    source = open_split(digits_dir)
    again = pickle.loads(pickle.dumps(source))
    assert len(again) == 360 and again[17] == source[17] and again.class_names == source.class_names
    assert again.origin == source.origin == "tfds sklearn_digits/1.0.0"


# --- preparing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_data_set"], "tfds has no data set 'no_such_data_set'"),
        (["shapes/other"], "BuilderConfig other not found"),
        (["sklearn_digits:7.0.0"], "cannot be loaded at version 7.0.0"),
        (["imagenet2012"], "--manual-dir"),
        (["imagenet2012", "--manual-dir", "/no/such/directory"], "is not a directory"),
        (["a b"], "expected NAME"),
    ],
)
def test_what_cannot_be_prepared_is_told(tmp_path, capsys, arguments, message):
    assert prepare_command.main([*arguments, "--data-dir", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_a_preparation_that_failed_is_no_data_set_and_can_be_repeated(tmp_path, capsys, monkeypatch):
    assert prepare_command.main(["fragile", "--data-dir", str(tmp_path)]) == 1
    assert "OSError" in capsys.readouterr().err
    assert find_prepared("fragile", tmp_path) is None
    monkeypatch.setattr(Fragile, "broken", False)
    assert prepare_command.main(["fragile", "--data-dir", str(tmp_path)]) == 0
    assert len(open_split(tmp_path, "fragile", "train")) == 1


def test_what_a_killed_preparation_left_is_reported(tmp_path, capsys, monkeypatch):
    leftover = fake(tmp_path, "fragile/incomplete.AB12CD_1.0.0")
    monkeypatch.setattr(Fragile, "broken", False)
    assert prepare_command.main(["fragile", "--data-dir", str(tmp_path)]) == 0
    assert str(leftover) in capsys.readouterr().out


def test_imagenet_is_prepared_from_its_tars_by_its_own_builder(tmp_path, capsys):
    wnids = ["n15075141", "n01440764", "n01443537"]
    tars = write_tars(tmp_path / "tars", wnids, validation=2)
    assert prepare_command.main(["imagenet2012", "--data-dir", str(tmp_path / "data"), "--manual-dir", str(tars)]) == 0
    assert "(train 3, validation 2)" in capsys.readouterr().out
    source = open_split(tmp_path / "data", "imagenet2012", "train")
    assert source.num_classes == 1000
    assert list(source.class_names) == sorted(source.class_names)  # so a folder's sorted classes are the same labels
    stored = {source.class_names[source[i]["label"]]: source[i]["image"] for i in range(3)}
    assert stored == {wnid: jpeg(seed) for seed, wnid in enumerate(wnids)}  # the bytes themselves
