"""Folders of images: classes and labels, the index on disk, every kind of file, and every mistake in the layout."""

import io
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polaformer_jax.data.folder_source import FolderSource
from polaformer_jax.data.images.transforms import EvalImageTransform, TrainImageTransform
from polaformer_jax.data.pipeline import EvalBatches, train_batches
from polaformer_jax.data.records import Source
from polaformer_jax.data.sources import open_source
from polaformer_jax.errors import UserError
from tests.support.image_folders import CLASSES, config, digest, encode, paths, pictures, write


@pytest.fixture(autouse=True)
def cache_dir(tmp_path_factory, monkeypatch):
    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory))
    return directory


@pytest.fixture
def root(tmp_path):
    return pictures(tmp_path)


# --- classes, labels, records


def test_a_folder_is_a_source(root):
    source = open_source(config(root), "train")
    assert isinstance(source, Source)
    assert source.name == "pictures/train" and source.origin == str(root)
    assert source.class_names == CLASSES and source.num_classes == 3
    assert len(source) == 12
    assert paths(source) == [f"train/{name}/{name}_{number}.JPEG" for name in CLASSES for number in range(4)]
    for i in (0, 5, 11):
        assert source[i] == {"image": encode(100 * (i // 4) + i % 4), "label": i // 4}


@pytest.mark.parametrize("index", [-1, 12])
def test_there_is_nothing_past_the_ends(root, index):
    with pytest.raises(IndexError, match=f"pictures/train has no record {index}, expected 0 to 11"):
        FolderSource(root, "train")[index]


def test_val_and_validation_stand_for_each_other(root):
    assert len(FolderSource(root, "validation")) == 6
    (root / "val").rename(root / "validation")
    assert len(FolderSource(root, "val")) == 6 and FolderSource(root, "val").name == "pictures/val"


def test_classes_are_those_of_the_training_split(root):
    for path in (root / "val" / CLASSES[0]).iterdir():
        path.unlink()
    (root / "val" / CLASSES[0]).rmdir()
    source = FolderSource(root, "val")
    assert source.class_names == CLASSES
    assert [source[i]["label"] for i in range(len(source))] == [1, 1, 2, 2]


def test_a_class_without_images_may_stand_in_another_split(root):
    for path in (root / "val" / CLASSES[1]).iterdir():
        path.unlink()
    source = FolderSource(root, "val")
    assert [source[i]["label"] for i in range(len(source))] == [0, 0, 2, 2]


def test_a_training_split_of_another_name(root):
    (root / "train").rename(root / "learn")
    (root / "val" / CLASSES[0]).rename(root / "gone")
    assert open_source(config(root, train_split="learn"), "learn").num_classes == 3
    assert open_source(config(root, train_split="learn"), "val").class_names == CLASSES


def test_evaluation_alone_needs_no_training_split(root):
    (root / "train").rename(root / "elsewhere")
    assert FolderSource(root, "val").class_names == CLASSES


def test_names_end_in_any_case_and_other_files_do_not_count(tmp_path):
    taken = ["a.jpg", "b.JPG", "c.jpeg", "d.JPEG", "e.Png", "two words.png", "ä.jpeg"]
    ignored = ["._a.jpg", ".hidden.png", "list.txt", "f.jpeg.part", "g.gif", "jpeg", "inner/h.jpg", "folder.jpg/i.txt"]
    write(tmp_path, {f"train/one/{name}": encode() for name in taken + ignored} | {"train/.cache/x/y.jpg": b""})
    source = FolderSource(tmp_path, "train")
    assert paths(source) == [f"train/one/{name}" for name in taken] and source.class_names == ("one",)


def test_a_file_name_may_be_any_bytes(tmp_path):
    write(tmp_path, {"train/one/a.jpg": encode()})
    os.rename(os.fsencode(tmp_path) + b"/train/one/a.jpg", os.fsencode(tmp_path) + b"/train/one/\xff.jpg")
    source = FolderSource(tmp_path, "train")
    assert source[0]["image"] == encode() and source.describe(0).endswith(r"one/\xff.jpg")


@pytest.mark.parametrize("location", ["~/pictures", "pictures", "pictures/", "../{}/pictures"])
def test_the_root_may_be_written_in_any_way(root, monkeypatch, location):
    monkeypatch.setenv("HOME", str(root.parent))
    monkeypatch.chdir(root.parent)
    source = FolderSource(location.format(root.parent.name), "train")
    monkeypatch.chdir("/")
    assert source.name == "pictures/train" and source[0]["image"] == encode(0)


# --- every image that ImageNet contains


def test_all_kinds_of_images_are_decoded_whatever_their_names_say(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    files = {
        "cmyk.JPEG": encode(0, "CMYK"),
        "grey.JPEG": encode(0, "L"),
        "png.JPEG": encode(0, "RGB", "png"),
        "rgba.png": encode(0, "RGBA", "png"),
        "palette.png": encode(0, "P", "png"),
        "turned.JPEG": encode(0, exif=exif),
        "upright.JPEG": encode(0),
    }
    source = FolderSource(write(tmp_path, {f"train/one/{name}": data for name, data in files.items()}), "train")
    images = {}
    for i in range(len(source)):
        example = EvalImageTransform(24, 24, num_classes=1)(source[i])
        images[Path(source.describe(i)).name] = example["image"]
        assert example["image"].shape == (24, 24, 3) and example["image"].dtype == np.uint8
    assert sorted(images) == sorted(files)
    np.testing.assert_array_equal(images["turned.JPEG"], images["upright.JPEG"])
    np.testing.assert_array_equal(images["rgba.png"], images["png.JPEG"])
    expected = Image.open(io.BytesIO(files["cmyk.JPEG"])).convert("RGB").resize((24, 24), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(images["cmyk.JPEG"], expected)


# --- in the pipeline


@pytest.mark.slow
def test_batches_are_the_same_for_any_number_of_workers(root):
    source = FolderSource(root, "train")
    transform = TrainImageTransform(32, num_classes=3, rand_augment="rand-m9-mstd0.5-inc1")
    found = {}
    for workers in (0, 2):
        batches = train_batches(source, transform, batch_size=6, seed=1, start=1, workers=workers)
        found[workers] = [digest(next(batches)) for _ in range(4)]
        batches.close()
    assert found[0] == found[2] and len(set(found[0])) == 4


def broken(root, kind):
    """Makes the second record of `val` unusable; returns its path."""
    path = root / "val" / CLASSES[0] / f"{CLASSES[0]}_1.JPEG"
    data = path.read_bytes()
    path.unlink()
    if kind == "dangling link":
        path.symlink_to(root / "nowhere.jpg")
    elif kind == "link to a folder":
        path.symlink_to(root / "val")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes({"zero bytes": b"", "truncated": data[: len(data) // 2], "corrupt": b"no image"}[kind])
    return str(path)


@pytest.mark.parametrize(
    "kind", ["zero bytes", "truncated", "corrupt", "dangling link", "link to a folder", "loop", "pipe"]
)
def test_an_image_that_cannot_be_read_stops_or_is_skipped_with_its_name(root, kind, caplog):
    path = broken(root, kind)
    source = FolderSource(root, "val")

    def batches(on_error):
        return list(EvalBatches(source, EvalImageTransform(16, 16, num_classes=3, on_error=on_error), batch_size=6))

    with pytest.raises(UserError, match=path):
        batches("stop")
    with caplog.at_level(logging.WARNING):
        (batch,) = batches("skip")
    assert batch["mask"].tolist() == [True, False, True, True, True, True]
    assert f"skipped {path}" in caplog.text


def test_a_file_that_vanished_is_named(root):
    source = FolderSource(root, "train")
    os.unlink(source.describe(0))
    with pytest.raises(OSError, match="No such file.*_0.JPEG"):
        source[0]


# --- mistakes in the layout


def test_an_empty_class_folder_to_train_on_is_named(root):
    for name in ("empty_1", "empty_2", "a_text_only"):
        (root / "train" / name).mkdir()
    (root / "train" / "a_text_only" / "readme.txt").write_text("")
    with pytest.raises(UserError, match="3 class folders without images .*: a_text_only, empty_1, empty_2. Remove"):
        FolderSource(root, "train")


def test_a_class_that_the_training_split_lacks_is_named(root):
    write(root, {"val/n02000000/a.jpg": encode()})
    with pytest.raises(UserError, match="1 class folders that are missing from .*/train: n02000000"):
        FolderSource(root, "val")
    assert len(FolderSource(root, "train")) == 12


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        ({}, "train", "does not exist; expected ROOT/train/CLASS/"),
        ({"other/one/a.jpg": b""}, "train", "has no split 'train': found other; expected"),
        ({"a.jpg": b""}, "train", "has no split 'train': found no folders"),
        ({"train/one/a.jpg": b""}, "train[:90%]", "has no split"),
        ({"train/one/a.jpg": b""}, "", "has no split ''"),
        ({"train/one/a.jpg": b""}, "..", "has no split '..'"),
        ({"train/one/a.jpg": b""}, "train/one", "has no split 'train/one'"),
        ({"train/a.jpg": b"", "train/b.PNG": b""}, "train", "no class folders, but 2 images directly in it"),
        ({"train/one/a.txt": b"", "train/two/b.txt": b""}, "train", "but no images in them"),
    ],
)
def test_a_wrong_layout_is_told(tmp_path, files, split, message):
    write(tmp_path / "data", files)
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        FolderSource(tmp_path / "data", split)


def test_a_class_folder_that_cannot_be_read_is_named(root):
    (root / "train" / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="cannot be read.*loop"):
        FolderSource(root, "train")


def test_a_bucket_is_refused():
    with pytest.raises(UserError, match="gs://bucket/imagenet: a folder of images must be local"):
        FolderSource("gs://bucket/imagenet", "train")
