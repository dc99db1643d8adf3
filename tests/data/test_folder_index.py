"""The index of a folder of images: files are listed once, and no change and no damage goes unseen."""

import logging
import os
import pickle
import time

import pytest

from polaformer_jax.data import folder_source
from polaformer_jax.data.folder_source import FolderSource
from polaformer_jax.errors import UserError
from tests.support.image_folders import CLASSES, OLD, encode, paths, pictures, settle, write


@pytest.fixture(autouse=True)
def cache_dir(tmp_path_factory, monkeypatch):
    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory))
    return directory


@pytest.fixture
def root(tmp_path):
    return pictures(tmp_path)


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


def test_times_that_tell_no_folders_apart_are_not_trusted(tmp_path, listings):
    """Some mounts report one time, whatever happens in a folder. Here more folders than are listed anyway."""
    names = [f"class{number:02}" for number in range(20)]
    root = write(tmp_path / "root", {f"train/{name}/{i}.png": encode(i) for name in names for i in range(2)})

    def constant():
        for name in names:
            os.utime(root / "train" / name, ns=(OLD, OLD))

    constant()
    assert len(FolderSource(root, "train")) == 40
    (root / "train" / names[13] / "new.png").write_bytes(encode(7))
    constant()
    assert len(FolderSource(root, "train")) == 41 and listings == ["train"] * 2


def test_a_change_that_no_time_shows_is_seen_in_the_folders_that_are_listed(root, listings):
    before = FolderSource(root, "train")
    (root / "train" / CLASSES[2] / f"{CLASSES[2]}_0.JPEG").rename(root / "train" / CLASSES[2] / "renamed.JPEG")
    settle(root)
    after = FolderSource(root, "train")
    assert listings == ["train"] * 2 and len(after) == len(before) == 12 and after.digest != before.digest


def test_what_is_left_out_is_counted(root, caplog):
    write(root, {"train/n01440764/a.webp": b"", "train/n01440764/B.WEBP": b"", "train/n01443537/notes": b""})
    (root / "train" / "n01443537" / "more").mkdir()
    (root / "train" / "n01443537" / ".hidden").write_bytes(b"")
    for _ in range(2):  # listed, and from the index
        with caplog.at_level(logging.WARNING):
            assert len(FolderSource(root, "train")) == 12
        (message,) = caplog.messages
        assert message.startswith("pictures/train: left out, for they are no .jpeg, .jpg, .png: ")
        assert message.endswith(": 2 .webp files, 1 files without a suffix, 1 folders")
        caplog.clear()


def test_many_kinds_that_are_left_out_are_summed(root, caplog):
    write(root, {f"train/n01440764/frame.{number:03}": b"" for number in range(30)})
    with caplog.at_level(logging.WARNING):
        FolderSource(root, "train")
    (message,) = caplog.messages
    assert message.endswith(": 1 .000 files, 1 .001 files, 1 .002 files, 1 .003 files, 1 .004 files, 25 of other kinds")


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
    yield content.replace(b'"format": 2', b'"format": 0')
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
    again = pickle.loads(pickle.dumps(source))
    assert again[3] == source[3] and again.origin == source.origin == str(root)


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
