"""Data sets prepared from files that the user has: tfds's own builders, its checksums, and no network."""

import errno
import gzip
import hashlib
import io
import os
import re
import socket
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.download import checksums, resource
from tensorflow_datasets.image_classification import cifar, mnist

from polaformer_jax.cli import prepare as command
from polaformer_jax.data import archives
from polaformer_jax.data.images.transforms import decode
from polaformer_jax.data.sources import open_source
from polaformer_jax.data.tfds_source import find_prepared
from tests.support import GOLDEN_FOLDER, two_files
from tests.support.two_files import LEFT, RIGHT, TwoFiles, registered, without_name


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with the two files."""
    return two_files.write(tmp_path / "given", monkeypatch)


def download(builder, urls, tmp_path):
    """What a builder is given for these URLs by its download manager, which verifies it."""
    config = tfds.download.DownloadConfig()
    return builder._make_download_manager(download_dir=tmp_path, download_config=config).download(urls)


def prepare(tmp_path, folder, name="two_files") -> int:
    return command.main([name, "--data-dir", str(tmp_path / "data"), "--manual-dir", str(folder)])


def refusal(tmp_path, folder, capsys, name="two_files") -> str:
    """The message of a preparation that fails before it has written anything."""
    assert prepare(tmp_path, folder, name) == 1
    assert not (tmp_path / "data").exists()
    message = capsys.readouterr().err
    assert message.startswith("error: --manual-dir: ") and "Traceback" not in message
    return message


def records(tmp_path, name="two_files", split="train"):
    source = open_source(SimpleNamespace(source="tfds", name=name, data_dir=tmp_path / "data"), split)
    return [source[i] for i in range(len(source))]


def intensities(tmp_path, **kwargs) -> dict[int, int]:
    """The intensity of the image of each label."""
    return {record["label"]: int(decode(record["image"])[0, 0, 0]) for record in records(tmp_path, **kwargs)}


# --- files that match


@pytest.mark.parametrize(
    ("builder", "parts", "labels"),
    [
        (
            cifar.Cifar10,
            ("cifar-10-batches-bin", [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]),
            {"batches.meta.txt": 10},
        ),
        (
            cifar.Cifar100,
            ("cifar-100-binary", ["train.bin", "test.bin"]),
            {"coarse_label_names.txt": 20, "fine_label_names.txt": 100},
        ),
    ],
)
def test_cifar_is_prepared_from_its_archive_by_its_own_builder(tmp_path, monkeypatch, capsys, builder, parts, labels):
    (inside, batches), rng = parts, np.random.default_rng(0)
    (url,) = builder.url_infos
    folder, expected = tmp_path / "given", {"train": [], "test": []}
    folder.mkdir()
    with tarfile.open(folder / url.rsplit("/", 1)[-1], "w:gz") as archive:

        def add(name, content):
            entry = tarfile.TarInfo(f"{inside}/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))

        for name, count in labels.items():
            add(name, "".join(f"class {i}\n" for i in range(count)).encode())
        for number, name in enumerate(batches):
            image = rng.integers(0, 256, (3, 32, 32), np.uint8)
            add(name, bytes([number] * len(labels)) + image.tobytes())
            expected["test" if "test" in name else "train"].append((number, image.transpose(1, 2, 0).tobytes()))
    monkeypatch.setattr(builder, "url_infos", {url: registered(folder, url)})

    assert prepare(tmp_path, folder, builder.name) == 0
    assert f"(train {len(batches) - 1}, test 1)" in capsys.readouterr().out
    for split, examples in expected.items():
        found = [(r["label"], decode(r["image"]).tobytes()) for r in records(tmp_path, builder.name, split)]
        assert sorted(found) == sorted(examples)


def test_data_sets_with_archives_of_the_same_names_are_not_mixed_up(tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "_TRAIN_EXAMPLES", 1)
    monkeypatch.setattr(mnist, "_TEST_EXAMPLES", 1)
    intensity = {mnist.MNIST: 10, mnist.FashionMNIST: 20, mnist.KMNIST: 30}
    urls = {builder: list(builder.url_infos) for builder in intensity}
    for builder in intensity:
        folder = tmp_path / builder.name
        folder.mkdir()
        for url in urls[builder]:
            content = bytes(16) + bytes([intensity[builder]]) * 784 if "images" in url else bytes(8) + b"\x03"
            (folder / url.rsplit("/", 1)[-1]).write_bytes(gzip.compress(content))
        monkeypatch.setattr(builder, "url_infos", {url: registered(folder, url) for url in urls[builder]})
        assert prepare(tmp_path, folder, builder.name) == 0
    for builder in intensity:
        assert intensities(tmp_path, name=builder.name) == {3: intensity[builder]}


def test_links_to_the_files_will_do(tmp_path, folder):
    links = tmp_path / "links"
    links.mkdir()
    for path in folder.iterdir():
        (links / path.name).symlink_to(path)
    assert prepare(tmp_path, links) == 0
    assert intensities(tmp_path) == {0: 30, 1: 200}


def test_a_file_that_is_registered_without_a_name_has_that_at_the_end_of_its_url(tmp_path, folder, monkeypatch):
    info = registered(folder, LEFT)
    info.filename = None
    monkeypatch.setattr(TwoFiles, "urls", (f"{LEFT}?download=1", RIGHT))
    monkeypatch.setattr(TwoFiles, "url_infos", {f"{LEFT}?download=1": info, RIGHT: registered(folder, RIGHT)})
    assert prepare(tmp_path, folder) == 0
    assert intensities(tmp_path) == {0: 30, 1: 200}


def test_equal_files_may_have_several_names(tmp_path, folder, monkeypatch):
    (folder / "right.gz").write_bytes((folder / "left.gz").read_bytes())
    monkeypatch.setattr(TwoFiles, "url_infos", {url: registered(folder, url) for url in (LEFT, RIGHT)})
    given = archives.Archives("two_files", epath.Path(folder), TwoFiles.url_infos)
    builder = tfds.builder("two_files", data_dir=tmp_path / "data")
    with given.offered_to(builder):
        found = download(builder, [LEFT, RIGHT], tmp_path)
    assert found == [folder / "left.gz", folder / "right.gz"]  # one path would be unpacked twice at the same time


def test_an_earlier_download_is_used_beside_the_folder(tmp_path, folder):
    info = registered(folder, RIGHT)
    downloaded = tmp_path / "data/downloads/two_files" / resource.get_dl_fname(RIGHT, info.checksum)
    downloaded.parent.mkdir(parents=True)
    (folder / "right.gz").rename(downloaded)
    resource.write_info_file(RIGHT, downloaded, "two_files", "right.gz", info)
    assert prepare(tmp_path, folder) == 0
    assert intensities(tmp_path) == {0: 30, 1: 200}


# --- gzip headers that lost the name and the time


def test_the_file_in_debians_package_becomes_the_one_that_tfds_has_registered(tmp_path):
    builder = tfds.builder("fashion_mnist", data_dir=tmp_path)
    (url,) = [url for url in builder.url_infos if url.endswith("/t10k-labels-idx1-ubyte.gz")]
    given = archives.Archives("fashion_mnist", GOLDEN_FOLDER / "fashion_mnist", builder.url_infos)
    with given.offered_to(builder):
        path = download(builder, url, tmp_path)
        content = path.read_bytes()
    expected = "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"
    assert hashlib.sha256(content).hexdigest() == builder.url_infos[url].checksum == expected
    assert not path.exists() and not list((tmp_path / "fashion_mnist").iterdir())


def test_times_are_known_for_all_files_of_fashion_mnist():
    infos = mnist.FashionMNIST.url_infos.values()
    assert {info.checksum for info in infos} == archives.ORIGINAL_TIMES.keys()


def test_a_restored_file_is_prepared_and_the_folder_of_the_user_is_not_written(tmp_path, folder, monkeypatch, capsys):
    left = folder / "left.gz"
    original = left.read_bytes()
    monkeypatch.setitem(archives.ORIGINAL_TIMES, hashlib.sha256(original).hexdigest(), two_files.TIME)
    left.write_bytes(without_name(original, "left"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert prepare(tmp_path, folder) == 0
    assert intensities(tmp_path) == {0: 30, 1: 200}
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before
    assert "interrupted" not in capsys.readouterr().out  # no temporary folder is left


def test_a_file_that_cannot_be_restored_is_told_as_it_is(tmp_path, folder, monkeypatch, capsys):
    left = folder / "left.gz"
    original = left.read_bytes()
    monkeypatch.setitem(archives.ORIGINAL_TIMES, hashlib.sha256(original).hexdigest(), two_files.TIME)
    content = without_name(original, "left")[:-1]
    left.write_bytes(content)
    message = refusal(tmp_path, folder, capsys)
    assert f"found    {len(content)} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}" in message


# --- files that are not there: nothing is downloaded


@pytest.mark.parametrize(("there", "missing", "url"), [("left.gz", "right.gz", RIGHT), ("right.gz", "left.gz", LEFT)])
def test_a_missing_file_is_told_when_tfds_asks_for_it(tmp_path, folder, capsys, there, missing, url):
    size = len((folder / missing).read_bytes())
    (folder / missing).unlink()
    assert prepare(tmp_path, folder) == 1
    message = capsys.readouterr().err
    assert f"--manual-dir: 'two_files' needs a file that is not in {folder}:\n" in message
    assert f":\n  {missing} ({size} bytes), from {url}\n{folder} holds: {there}\n" in message
    assert "Other files" not in message and "give no folder" in message
    assert find_prepared("two_files", tmp_path / "data") is None


def test_other_missing_files_are_told_with_the_first(tmp_path, folder, monkeypatch, capsys):
    more = {f"https://example.org/more/{i}.zip": checksums.UrlInfo(5, f"{i:064}", f"{i}.zip") for i in range(30)}
    monkeypatch.setattr(TwoFiles, "url_infos", {**TwoFiles.url_infos, **more})
    (folder / "right.gz").unlink()
    assert prepare(tmp_path, folder) == 1
    message = capsys.readouterr().err
    assert "Other files" in message and "7.zip (5 bytes)" in message and "8.zip" not in message
    assert "  and 22 more\n" in message


def test_a_file_of_another_url_is_not_taken_for_its_namesake(tmp_path, folder, monkeypatch, capsys):
    old = "https://example.org/old/left.gz"
    infos = {**TwoFiles.url_infos, old: checksums.UrlInfo(5, "0" * 64, "left.gz")}
    monkeypatch.setattr(TwoFiles, "url_infos", infos)
    monkeypatch.setattr(TwoFiles, "urls", (LEFT, old))
    assert prepare(tmp_path, folder) == 1
    message = capsys.readouterr().err
    assert f"left.gz (5 bytes), from {old} (the file of this name is that of another URL)" in message


def test_a_url_without_a_checksum_cannot_be_given(tmp_path, folder, monkeypatch, capsys):
    monkeypatch.setattr(TwoFiles, "urls", (LEFT, "https://example.org/new.gz"))
    assert prepare(tmp_path, folder) == 1
    assert "needs https://example.org/new.gz, of which tfds has no checksum" in capsys.readouterr().err


def test_a_folder_with_none_of_the_files_is_told_before_the_work(tmp_path, folder, capsys):
    other = tmp_path / "other"
    other.mkdir()
    message = refusal(tmp_path, other, capsys)
    assert f"{other} has none of the files that tfds knows of 'two_files':\n  left.gz" in message
    assert f"from {RIGHT}\n{other} holds: nothing\n" in message
    for name in ("b\n.txt", *(f"{i:02}" for i in range(20))):
        (other / name).touch()
    message = refusal(tmp_path, other, capsys)
    assert "holds: 00, 01, 02, 03, 04, 05, 06, 07, and 13 more\n" in message
    for path in other.glob("[01]*"):
        path.unlink()
    assert r"holds: b\n.txt" in refusal(tmp_path, other, capsys)


def test_the_folder_below_that_holds_the_files_is_told(tmp_path, folder, capsys):
    message = refusal(tmp_path, tmp_path, capsys)
    assert f"{folder} holds left.gz: is that the folder?" in message


def test_a_data_set_that_takes_no_files_says_so(tmp_path, folder, capsys):
    message = refusal(tmp_path, folder, capsys, name="sklearn_digits")
    assert "'sklearn_digits' takes no files" in message


def test_a_folder_that_cannot_be_listed_is_told(tmp_path, folder, capsys, monkeypatch):
    def refuse(*args):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    assert "Permission denied" in refusal(tmp_path, folder, capsys)


# --- files that are not the registered ones


def replaced(make):
    """A function that makes something else in the place of a file."""

    def replace(path):
        path.unlink()
        make(path)

    return replace


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: path.write_bytes(b""), "found    0 bytes, SHA-256 e3b0c44298fc1c14"),
        (lambda path: path.write_bytes(path.read_bytes()[:12]), "found    12 bytes"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), "is not the file that tfds expects"),
        (lambda path: path.write_text("<html>"), "is not the file that tfds expects"),
        (replaced(Path.mkdir), f"is a folder, expected the file from {LEFT}"),
        (replaced(os.mkfifo), "is no regular file"),
        (replaced(lambda path: path.symlink_to("nowhere")), "cannot be read: .*No such file"),
        (replaced(lambda path: path.symlink_to(path.name)), "cannot be read: .*symbolic links"),
        (replaced(lambda path: path.symlink_to("/proc/self/mem")), "cannot be read: .*error"),
    ],
)
def test_a_file_of_that_name_that_is_another_is_told_before_the_work(tmp_path, folder, capsys, damage, told):
    damage(folder / "left.gz")
    message = refusal(tmp_path, folder, capsys)
    assert f"{folder / 'left.gz'} " in message and re.search(told, message) and "give no folder" in message


def test_sizes_and_checksums_are_told_for_all_such_files(tmp_path, folder, capsys):
    expected = dict(TwoFiles.url_infos)
    for path in folder.iterdir():
        path.write_bytes(b"other")
    message = refusal(tmp_path, folder, capsys)
    for url, info in expected.items():
        assert f"expected {info.size} bytes, SHA-256 {info.checksum}, from {url}\n" in message
    assert message.count(f"found    5 bytes, SHA-256 {hashlib.sha256(b'other').hexdigest()}") == 2


def test_a_file_that_changes_after_it_was_checked_is_refused_by_tfds(tmp_path, folder, monkeypatch, capsys):
    offered_to = archives.Archives.offered_to

    def change(self, builder):
        (folder / "left.gz").write_bytes(b"changed")
        return offered_to(self, builder)

    monkeypatch.setattr(archives.Archives, "offered_to", change)
    assert prepare(tmp_path, folder) == 1
    assert "NonMatchingChecksumError" in capsys.readouterr().err
