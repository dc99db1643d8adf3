"""Copying a data set from TFRecord to ArrayRecord: the same records, whole or not at all."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from polaformer_jax.cli import prepare as prepare_command
from polaformer_jax.data import to_arrayrecord
from polaformer_jax.data.sources import open_source
from polaformer_jax.data.tfds_source import find_prepared
from polaformer_jax.errors import UserError


class Tiles(tfds.core.GeneratorBasedBuilder):
    """Two splits of small images, in a config."""

    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="small")]

    def _info(self):
        features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["one", "two", "three"])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 23), "validation": self._generate_examples(23, 7)}

    def _generate_examples(self, start, count):
        for i in range(start, start + count):
            buffer = io.BytesIO()
            pixels = np.random.default_rng(i).integers(0, 256, (8 + i, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "png")
            yield i, {"image": io.BytesIO(buffer.getvalue()), "label": i % 3}


def build(data_dir, file_format):
    builder = tfds.builder("tiles/small", data_dir=data_dir, file_format=file_format)
    # Several shards in the training split.
    config = tfds.download.DownloadConfig(num_shards=3)
    builder.download_and_prepare(download_config=config)
    return data_dir


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return build(tmp_path_factory.mktemp("tfrecord"), "tfrecord")


@pytest.fixture(scope="module")
def arrayrecord_dir(tmp_path_factory):
    return build(tmp_path_factory.mktemp("arrayrecord"), "array_record")


@pytest.fixture
def tfrecord_dir(prepared, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(prepared, tmp_path / "old"))


def records(data_dir, split):
    data = SimpleNamespace(source="tfds", name="tiles/small", data_dir=data_dir)
    source = open_source(data, split)
    return [source[i] for i in range(len(source))]


def files(directory):
    return {path.relative_to(directory): path.read_bytes() for path in Path(directory).rglob("*") if path.is_file()}


def convert(*arguments):
    return prepare_command.main(["to-arrayrecord", "tiles/small", *map(str, arguments)])


def shard(data_dir):
    return sorted(data_dir.rglob("*-train.tfrecord-*"))[1]


def test_the_copy_is_what_tfds_would_have_prepared(tfrecord_dir, arrayrecord_dir, tmp_path, capsys):
    before = files(tfrecord_dir)
    assert len(list(tfrecord_dir.rglob("*-train.tfrecord-*"))) == 3
    assert convert("--data-dir", tfrecord_dir, "--out-dir", tmp_path / "new") == 0
    assert "(train 23, validation 7)" in capsys.readouterr().out
    for split, length in (("train", 23), ("validation", 7)):
        expected = records(arrayrecord_dir, split)
        assert len(expected) == length and records(tmp_path / "new", split) == expected
    version = Path("tiles", "small", "1.2.0")
    found, expected = files(tmp_path / "new" / version), files(arrayrecord_dir / version)
    assert sorted(found) == sorted(expected)
    info = Path("dataset_info.json")
    assert json.loads(found[info]) == json.loads(expected[info])
    assert files(tfrecord_dir) == before


def test_records_that_are_there_in_another_format_too_are_not_copied(tfrecord_dir, arrayrecord_dir, tmp_path):
    description = next(tfrecord_dir.rglob("dataset_info.json"))
    info = json.loads(description.read_text()) | {"alternativeFileFormats": ["parquet"]}
    description.write_text(json.dumps(info))
    for path in description.parent.glob("*.tfrecord-*"):
        path.with_name(path.name.replace(".tfrecord", ".parquet")).write_bytes(b"PAR1")
    assert convert("--data-dir", tfrecord_dir, "--out-dir", tmp_path / "new") == 0
    version = Path("tiles", "small", "1.2.0")
    assert sorted(files(tmp_path / "new" / version)) == sorted(files(arrayrecord_dir / version))
    assert "alternativeFileFormats" not in json.loads((tmp_path / "new" / version / description.name).read_text())


def test_the_error_about_tfrecord_names_the_command_that_helps(tfrecord_dir):
    with pytest.raises(UserError) as caught:
        records(tfrecord_dir, "train")
    message, command = str(caught.value).splitlines()
    assert "prepared as tfrecord" in message and f"data.data_dir={tfrecord_dir}-arrayrecord" in message
    program = "polaformer prepare "
    assert command.strip().startswith(program)
    assert prepare_command.main(command.strip().removeprefix(program).split()) == 0
    assert len(records(f"{tfrecord_dir}-arrayrecord", "train")) == 23


def test_without_out_dir_the_copy_lies_beside_the_original(tfrecord_dir):
    assert convert("--data-dir", tfrecord_dir) == 0
    assert find_prepared("tiles", f"{tfrecord_dir}-arrayrecord").splits == {"train": 23, "validation": 7}


@pytest.mark.parametrize("out", ["old", "new"])
def test_what_is_there_already_is_left_alone(tfrecord_dir, tmp_path, capsys, out):
    (tmp_path / "new" / "tiles" / "small" / "1.2.0").mkdir(parents=True)
    before = files(tmp_path)
    assert convert("--data-dir", tfrecord_dir, "--out-dir", tmp_path / out) == 1
    assert "exists already; name another directory" in capsys.readouterr().err
    assert files(tmp_path) == before


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "cannot be read: corrupted record"),
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), "cannot be read: truncated record"),
        (lambda path: path.write_bytes(b""), "has 0 records, but dataset_info.json says"),
        (lambda path: path.unlink(), "cannot be read"),
    ],
    ids=["flipped bit", "truncated", "empty", "missing"],
)
def test_a_damaged_file_is_named_and_leaves_nothing(tfrecord_dir, tmp_path, capsys, damage, message):
    path = shard(tfrecord_dir)
    damage(path)
    assert convert("--data-dir", tfrecord_dir, "--out-dir", tmp_path / "new") == 1
    error = capsys.readouterr().err
    assert f"error: {path} {message}" in error
    assert find_prepared("tiles/small", tmp_path / "new") is None and not files(tmp_path / "new")


def test_an_interruption_leaves_nothing_and_can_be_repeated(tfrecord_dir, tmp_path, monkeypatch):
    original, seen = to_arrayrecord._copy_shard, []

    def interrupted(*arguments):
        seen.append(arguments)
        if len(seen) == 2:
            raise KeyboardInterrupt
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(to_arrayrecord, "_copy_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert("--data-dir", tfrecord_dir, "--out-dir", tmp_path / "new")
    assert not files(tmp_path / "new")
    assert convert("--data-dir", tfrecord_dir, "--out-dir", tmp_path / "new") == 0


def test_what_a_kill_left_does_not_count(tfrecord_dir, tmp_path):
    left = tmp_path / "new" / "tiles" / "small" / "incomplete.0AB12C_1.2.0"
    left.mkdir(parents=True)
    (left / "dataset_info.json").write_text("{}")
    assert find_prepared("tiles/small", tmp_path / "new") is None
    assert convert("--data-dir", tfrecord_dir, "--out-dir", tmp_path / "new") == 0


def test_a_full_disk_is_told(tfrecord_dir, tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(to_arrayrecord, "_copy_shard", full)
    assert convert("--data-dir", tfrecord_dir, "--out-dir", tmp_path / "new") == 1
    assert "No space left on device" in capsys.readouterr().err and not files(tmp_path / "new")


def test_what_cannot_be_converted_is_told(arrayrecord_dir, tmp_path, capsys):
    assert convert("--data-dir", tmp_path) == 1
    assert "is not prepared below" in capsys.readouterr().err
    assert convert("--data-dir", arrayrecord_dir) == 1
    assert "is prepared as array_record: it needs no conversion" in capsys.readouterr().err
    other = tmp_path / "tiles" / "small" / "1.2.0"
    other.mkdir(parents=True)
    (other / "dataset_info.json").write_text(json.dumps({"fileFormat": "riegeli"}))
    assert convert("--data-dir", tmp_path) == 1
    assert "is prepared as riegeli, expected tfrecord" in capsys.readouterr().err
