"""A data set of tfds that is made from two downloads, for preparing it from files."""

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums

LEFT, RIGHT = "https://example.org/data/left.gz", "https://example.org/data/right.gz"
TIME = 10**9  # in the headers of both


class TwoFiles(tfds.core.GeneratorBasedBuilder):
    """A grey image for each of two files, which hold its intensity as text; nothing is registered until `write`."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None
    urls = (LEFT, RIGHT)

    def _info(self):
        features = {"image": tfds.features.Image(shape=(4, 4, 1)), "label": tfds.features.ClassLabel(num_classes=2)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(dl_manager.download_and_extract(list(self.urls)))}

    def _generate_examples(self, files):
        for label, file in enumerate(files):
            yield label, {"image": np.full((4, 4, 1), int(Path(file).read_text()), np.uint8), "label": label}


def write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a folder with the two files, and registers them with tfds as they are there."""
    folder.mkdir()
    for name, intensity in (("left", 30), ("right", 200)):
        with open(folder / f"{name}.gz", "wb") as file, gzip.GzipFile(name, "wb", fileobj=file, mtime=TIME) as packed:
            packed.write(b"%d" % intensity)
    monkeypatch.setattr(TwoFiles, "url_infos", {url: registered(folder, url) for url in (LEFT, RIGHT)})
    return folder


def registered(folder: Path, url: str) -> checksums.UrlInfo:
    """What tfds would register of a URL at which the file of this folder is."""
    name = url.rsplit("/", 1)[-1]
    content = (folder / name).read_bytes()
    return checksums.UrlInfo(size=len(content), checksum=hashlib.sha256(content).hexdigest(), filename=name)


def without_name(content: bytes, name: str) -> bytes:
    """What the builds of Debian make of a gzip file."""
    assert content[3] == 8 and content[10:].startswith(name.encode() + b"\0")
    return content[:3] + bytes(5) + content[8:10] + content[11 + len(name) :]
