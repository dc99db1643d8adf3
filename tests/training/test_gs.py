"""Work directories, data and weights on `gs://`: the real clients against a bucket in memory (`fake_bucket.py`)."""

import hashlib
import io
import json
import sys

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from polaformer_jax import weights
from polaformer_jax.data import archives, prepare, tfds_source
from polaformer_jax.data.lra import prepare as lra_prepare
from polaformer_jax.data.lra.source import SequenceSource
from polaformer_jax.errors import UserError
from polaformer_jax.files import atomic
from polaformer_jax.inference.images import evaluation_transform, read_image
from polaformer_jax.training import evaluation, loop, metrics
from polaformer_jax.training.checkpoints import Checkpoints
from polaformer_jax.training.export import export
from polaformer_jax.training.workdir import claim, read_config
from tests.support import tiny_lra, tiny_weights, two_files
from tests.support.fake_bucket import Bucket, serving
from tests.support.recipes import digits as get_config
from tests.support.runs import TIMES, written
from tests.training.test_checkpoints import abstract, state_of
from tests.training.test_interruption import (  # noqa: F401
    compiled_once,
    final_state,
    interrupted_until_done,
    settings,
)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    bucket = Bucket()
    with serving(bucket, tmp_path_factory.mktemp("tls")) as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield bucket


@pytest.fixture(autouse=True)
def nothing_local(tmp_path, monkeypatch):
    """A path of a bucket that is taken for a local one makes a folder `gs:` here."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "gs:").exists()


def test_a_file_is_there_whole_or_not_at_all(bucket):
    atomic.write("gs://bucket/files/a.txt", "one")
    atomic.write("gs://bucket/files/a.txt", "two")
    with pytest.raises(ZeroDivisionError), atomic.writing("gs://bucket/files/b.txt") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert bucket.names("files") == ["files/", "files/a.txt"]
    assert bucket.get("files/a.txt") == b"two"


def test_a_work_directory_belongs_to_one_run(bucket):
    config = get_config()
    with claim("gs://bucket/owned", config) as workdir:
        (workdir / "checkpoints/10").mkdir(parents=True)
    assert read_config("gs://bucket/owned").to_dict() == json.loads(json.dumps(config.to_dict()))
    config.seed = 1
    with pytest.raises(UserError, match="seed: 0 there, 1 now"), claim("gs://bucket/owned", config):
        pass


def test_what_cannot_be_written_is_named(bucket, monkeypatch):
    with pytest.raises(UserError, match="gs://nowhere/run cannot be written .there is no bucket gs://nowhere"):
        with claim("gs://nowhere/run", get_config()):
            pass
    monkeypatch.setattr(bucket, "read_only", True)
    with pytest.raises(UserError, match="work directory gs://bucket/new cannot be written"):
        with claim("gs://bucket/new", get_config()):
            pass


def save(directory, *steps):
    with Checkpoints(directory, keep_last=2, best_metric="accuracy") as checkpoints:
        for step in steps:
            checkpoints.save(state_of(step), {"accuracy": 1.0 if step == 1 else 0.5}, {"steps": step})


def restore(directory):
    with Checkpoints(directory, keep_last=2, best_metric="accuracy") as checkpoints:
        return checkpoints.restore(abstract()), checkpoints.steps()


def assert_state(restored, step):
    jax.tree.map(np.testing.assert_array_equal, restored.state, state_of(step))
    assert restored.counted == {"steps": step}


@pytest.mark.slow
def test_checkpoints_are_kept_in_the_bucket(bucket):
    save("gs://bucket/kept/checkpoints", 1, 2, 3, 4)
    restored, steps = restore("gs://bucket/kept/checkpoints")
    assert_state(restored, 4)
    assert steps == [1, 3, 4]  # the best, and the last two
    assert not bucket.names("kept/checkpoints/2/")


@pytest.mark.slow
def test_a_save_that_was_cut_off_does_not_count(bucket):
    """There is no renaming in a bucket: a checkpoint is whole when a last file says so."""
    save("gs://bucket/cut/checkpoints", 3, 5)
    for name in bucket.names("cut/checkpoints/5/commit_success.txt"):
        del bucket.objects[name]
    restored, steps = restore("gs://bucket/cut/checkpoints")
    assert_state(restored, 3)
    assert steps == [3]
    save("gs://bucket/cut/checkpoints", 5)
    assert_state(restore("gs://bucket/cut/checkpoints")[0], 5)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside(bucket):
    save("gs://bucket/damaged/checkpoints", 3, 5)
    name = max(bucket.names("damaged/checkpoints/5/params/"), key=lambda name: len(bucket.get(name)))
    bucket.put(name, bucket.get(name)[:-20])
    restored, steps = restore("gs://bucket/damaged/checkpoints")
    assert_state(restored, 3)
    assert steps == [3] and not bucket.names("damaged/checkpoints/5/")
    assert bucket.names("damaged/damaged_checkpoints/5_")


def test_a_checkpoint_that_cannot_be_written_is_named(bucket, monkeypatch):
    """The refusal is raised here: TensorFlow repeats a refused write while no other thread of Python may run."""
    import tensorflow as tf

    def refused(checkpoints):
        raise tf.errors.PermissionDeniedError(None, None, "HTTP response code 403")

    monkeypatch.setattr(Checkpoints, "_try_to_write", refused)
    with pytest.raises(UserError, match="not be written to gs://bucket/denied/checkpoints .*HTTP response code 403"):
        save("gs://bucket/denied/checkpoints", 1)


def test_the_client_that_orbax_needs_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    with pytest.raises(UserError, match=r'pip install "polaformer_jax\[gcs\]"'):
        Checkpoints("gs://bucket/run/checkpoints", keep_last=1, best_metric="accuracy")


def test_a_continued_run_writes_no_step_twice(bucket):
    for start, steps in ((0, (2, 4, 6)), (4, (6, 8))):
        writer = metrics.make_writer("gs://bucket/events", start)
        for step in steps:
            writer.write_scalars(step, {"loss": float(step + start)})
            writer.flush()
        writer.close()
    steps, values = metrics.read_scalars("gs://bucket/events")["loss"]
    assert steps.tolist() == [2, 4, 6, 8] and values.tolist() == [2, 4, 10, 12]


def test_image_records_are_read_from_the_bucket(bucket, digits_dir):
    bucket.upload(digits_dir, "data")
    local, far = (
        tfds_source.TfdsSource("sklearn_digits", data_dir=folder, split="test")
        for folder in (digits_dir, "gs://bucket/data")
    )
    assert len(local) == len(far) and local.class_names == far.class_names
    assert all(local[index] == far[index] for index in (0, 7, 359))


def test_sequences_are_read_from_the_bucket(bucket, tmp_path):
    bucket.upload(tiny_lra.write(tmp_path / "lra", train=9, dev=2, test=2), "lra")
    local, far = (
        SequenceSource("listops", data_dir=folder, tokenisation="brackets", split="train")
        for folder in (tmp_path / "lra", "gs://bucket/lra")
    )
    np.testing.assert_array_equal(local.lengths, far.lengths)
    for index in range(9):
        np.testing.assert_array_equal(local[index]["tokens"], far[index]["tokens"])


def test_data_sets_are_written_to_local_folders_only(bucket, tmp_path):
    for attempt in (
        lambda: prepare.prepare("sklearn_digits", "gs://bucket/unwritten"),
        lambda: lra_prepare.prepare("lra_listops", "gs://bucket/unwritten"),
    ):
        with pytest.raises(UserError, match=r"gcloud storage cp -r 'LOCAL_FOLDER/\*' gs://bucket/unwritten/"):
            attempt()
    assert not bucket.names("unwritten")


def test_a_data_set_is_prepared_from_archives_in_the_bucket(bucket, tmp_path, monkeypatch):
    folder = two_files.write(tmp_path / "given", monkeypatch)
    original = (folder / "left.gz").read_bytes()
    monkeypatch.setitem(archives.ORIGINAL_TIMES, hashlib.sha256(original).hexdigest(), two_files.TIME)
    (folder / "left.gz").write_bytes(two_files.without_name(original, "left"))  # to be restored, in a local copy
    bucket.upload(folder, "archives")
    prepared = prepare.prepare("two_files", tmp_path / "data", manual_dir="gs://bucket/archives")
    assert prepared.splits == {"train": 2}
    assert bucket.names("archives") == ["archives/left.gz", "archives/right.gz"]


def test_weights_come_back(bucket):
    model, other = tiny_weights.tiny(0), tiny_weights.tiny(1)
    weights.save_weights(model, "gs://bucket/weights/ours.safetensors")
    weights.load_weights(other, "gs://bucket/weights/ours.safetensors")
    tiny_weights.assert_same(tiny_weights.pure(other), tiny_weights.pure(model))


def test_images_to_predict_are_read_from_the_bucket(bucket):
    picture = io.BytesIO()
    Image.new("RGB", (40, 40), (200, 10, 60)).save(picture, "png")
    bucket.put("images/red.png", picture.getvalue())
    transform = evaluation_transform(tiny_weights.tiny())
    assert (read_image("gs://bucket/images/red.png", transform) == (200, 10, 60)).all()
    with pytest.raises(UserError, match="gs://bucket/images/none.png"):
        read_image("gs://bucket/images/none.png", transform)


def content(path):
    return json.loads(epath.Path(path).read_text())


@pytest.mark.slow
def test_an_interrupted_training_in_a_bucket_ends_as_a_local_one(
    bucket,
    digits_dir,
    compiled_once,  # noqa: F811
    tmp_path,
):
    """Data and work directory in the bucket: state, metrics, pictures; then evaluation and weights from there."""
    bucket.upload(digits_dir, "data")
    local, far = (settings(folder) for folder in (digits_dir, "gs://bucket/data"))
    for config in (local, far):
        config.log.pictures = True
    here, there = epath.Path(tmp_path / "run"), epath.Path("gs://bucket/run")
    result = loop.train(local, here)
    assert interrupted_until_done(far, there, [4]) == 1

    (straight, best), (continued, best_there) = final_state(local, here), final_state(far, there)
    jax.tree.map(np.testing.assert_array_equal, straight.state, continued.state)
    assert best == best_there and straight.counted == continued.counted
    numbers, again = written(here), written(there)
    assert numbers.keys() == again.keys()
    assert all(numbers[name] == again[name] for name in numbers.keys() - TIMES)
    assert again["loss"] and [step for step, _ in again["seconds"]] == [2, 4, 6, 8]
    for path in result.pictures:
        assert (there / "pictures" / path.name).read_bytes() == path.read_bytes()
    assert content(there / "training.json")["steps"] == 8
    assert content(there / "config.json")["data"]["data_dir"] == "gs://bucket/data"
    same = ("accuracy", "loss", "images", "step")
    assert [content(there / "eval.json")[name] for name in same] == [content(here / "eval.json")[name] for name in same]

    far.data.workers = 1  # a process that opens the bucket anew
    evaluated = evaluation.evaluate(
        far, there, json_path=there / "e.json", predictions_path=there / "p.csv", weights_path=there / "w.safetensors"
    )
    assert [evaluated[name] for name in same] == [content(here / "eval.json")[name] for name in same]
    assert content(there / "e.json") == evaluated
    assert len((there / "p.csv").read_text().splitlines()) == 361
    assert export(there, there / "x.safetensors") == best
    saved, exported = (weights.read_file(there / f"{name}.safetensors").tensors for name in "wx")
    assert saved.keys() == exported.keys()
    for name in saved:
        np.testing.assert_array_equal(saved[name], exported[name])
