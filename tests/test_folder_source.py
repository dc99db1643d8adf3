"""Folders of images: classes and labels, the index on disk, every kind of file, and every mistake in the layout."""

import hashlib
import io
import logging
import os
import pickle
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from polaformer_jax.data import folder_source
from polaformer_jax.data.folder_source import FolderSource
from polaformer_jax.data.pipeline import EvalBatches, train_batches
from polaformer_jax.data.sources import Source, open_source
from polaformer_jax.data.transforms import EvalImageTransform, TrainImageTransform
from polaformer_jax.errors import UserError

CLASSES = ("n01440764", "n01443537", "n15075141")
OLD = 1_600_000_000 * 10**9  # ns: a time of change that lies far back


@pytest.fixture(autouse=True)
def cache_dir(tmp_path_factory, monkeypatch):
    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory))
    return directory


def pixels(seed, size=(20, 30)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def encode(seed=0, mode="RGB", fmt="jpeg", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed)).convert(mode).save(buffer, fmt, **options)
    return buffer.getvalue()


def write(root, files):
    """Writes files, and gives all folders an old time of change."""
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    settle(root)
    return root


def settle(root, ns=OLD):
    for directory, _, _ in os.walk(root):
        os.utime(directory, ns=(ns, ns))


@pytest.fixture
def root(tmp_path):
    """Three classes with four images each to train on, two to evaluate; written in an order that is not theirs."""
    counts = {"val": 2, "train": 4}
    return write(
        tmp_path / "pictures",
        {
            f"{split}/{name}/{name}_{number}.JPEG": encode(100 * label + number)
            for split, count in counts.items()
            for label, name in reversed(list(enumerate(CLASSES)))
            for number in reversed(range(count))
        },
    )


def config(root, **changes):
    fields = {"source": "folder", "name": "pictures", "data_dir": str(root), "train_split": "train"}
    return SimpleNamespace(**fields | changes)


def paths(source):
    return [os.path.relpath(source.describe(i), Path(source.describe(i)).parents[2]) for i in range(len(source))]


def digest(batch):
    return hashlib.sha256(b"".join(k.encode() + batch[k].tobytes() for k in sorted(batch))).hexdigest()


@pytest.fixture
def listings(monkeypatch):
    """Collects the splits whose files are listed."""
    seen, original = [], folder_source._list_files
    monkeypatch.setattr(
        folder_source,
        "_list_files",
        lambda directory, *rest: (seen.append(directory.name), original(directory, *rest))[1],
    )
    return seen


# --- classes, labels, records


def test_a_folder_is_a_source(root):
    source = open_source(config(root), "train")
    assert isinstance(source, Source)
    assert source.name == "pictures/train" and source.class_names == CLASSES and source.num_classes == 3
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


# --- the index


def test_files_are_listed_once(root, listings):
    first, second = FolderSource(root, "train"), FolderSource(root, "train")
    assert listings == ["train"] and paths(first) == paths(second)
    assert [second[i] for i in range(12)] == [first[i] for i in range(12)]
    FolderSource(root, "val")
    assert listings == ["train", "val"]
    assert sorted(path.name for path in root.iterdir() if path.is_file()) == [
        ".polaformer_index_train",
        ".polaformer_index_val",
    ]


def test_a_change_of_the_files_is_seen(root, listings):
    assert len(FolderSource(root, "train")) == 12
    (root / "train" / CLASSES[1] / "new.jpg").write_bytes(encode(7))
    source = FolderSource(root, "train")
    assert len(source) == 13 and source.describe(8).endswith("new.jpg") and source[8]["label"] == 1
    (root / "train" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG").unlink()
    assert len(FolderSource(root, "train")) == 12
    (root / "train" / "n09999999").mkdir()
    (root / "train" / "n09999999" / "a.jpg").write_bytes(encode(8))
    assert FolderSource(root, "train").num_classes == 4
    assert listings == ["train"] * 4


def test_a_folder_that_changed_a_moment_ago_is_looked_at_again(root, listings):
    settle(root, time.time_ns())
    FolderSource(root, "train")
    # As if the file had come within the same tick of the file system's clock.
    (root / "train" / CLASSES[0] / "late.jpg").write_bytes(encode())
    settle(root, time.time_ns() - 10)
    assert len(FolderSource(root, "train")) == 13 and listings == ["train"] * 2


def damage(content):
    yield b""
    yield b"\n"
    yield b"{}\n"
    yield b"[1]\n"
    yield content[:-1]
    yield content[: len(content) // 2]
    yield content[:-5] + b"x" + content[-4:]
    yield content.replace(b'"format": 1', b'"format": 0')
    yield content.replace(b'"counts": [4, 4, 4]', b'"counts": [5, 3, 4]')
    yield content.replace(b'"counts": [4, 4, 4]', b'"counts": "abc"')
    yield content.replace(CLASSES[0].encode(), b"n00000000", 1)
    yield os.urandom(500)


def test_a_damaged_index_is_made_anew(root, listings):
    FolderSource(root, "train")
    index = root / ".polaformer_index_train"
    content = index.read_bytes()
    for number, damaged in enumerate(damage(content)):
        assert damaged != content
        index.write_bytes(damaged)
        assert len(FolderSource(root, "train")) == 12 and len(listings) == number + 2
        assert index.read_bytes() == content


def test_where_the_root_cannot_be_written_the_index_lies_in_the_cache(root, listings, cache_dir, monkeypatch):
    original = folder_source.atomic.write

    def write_elsewhere(path, content):
        if str(path).startswith(str(root)):
            raise PermissionError(13, "Permission denied")
        original(path, content)

    monkeypatch.setattr(folder_source.atomic, "write", write_elsewhere)
    assert len(FolderSource(root, "train")) == 12
    source = FolderSource(root, "train")
    assert listings == ["train"] and not list(root.glob(".polaformer*"))
    assert len(list((cache_dir / "polaformer_jax").iterdir())) == 1
    assert pickle.loads(pickle.dumps(source))[3] == source[3]


def test_an_index_that_can_be_kept_nowhere_travels_in_the_pickle(root, caplog, monkeypatch):
    def refuse(path, content):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(folder_source.atomic, "write", refuse)
    with caplog.at_level(logging.WARNING):
        source = FolderSource(root, "train")
    assert "cannot be kept" in caplog.text
    again = pickle.loads(pickle.dumps(source))
    assert [again[i] for i in range(12)] == [source[i] for i in range(12)]


def test_a_pickle_is_small_and_never_means_other_files(tmp_path):
    files = {f"train/one/{'long' * 20}_{number}.jpg": b"" for number in range(2000)}
    source = FolderSource(write(tmp_path, files), "train")
    data = pickle.dumps(source)
    assert len(data) < 2000
    assert paths(pickle.loads(data)) == paths(source)
    (tmp_path / "train" / "one" / "another.jpg").write_bytes(b"")
    assert len(FolderSource(tmp_path, "train")) == 2001
    with pytest.raises(UserError, match="changed since .*/train was opened"):
        pickle.loads(data)


# --- in the pipeline


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
    with pytest.raises(UserError, match="1 class folders that .*/train lacks: n02000000"):
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
        ({"train/a.jpg": b"", "train/b.PNG": b""}, "train", "no class folders, and 2 images beside them"),
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
