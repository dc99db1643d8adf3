"""Damaged and lying zip archives around the content of a checkpoint: one clear error each."""

import io
import struct
import zipfile

import numpy as np
import pytest

from polaformer_jax.errors import WeightsError
from polaformer_jax.weights import torch_zip
from tests.support.torch_files import archive, records, write_pth

BASE = np.arange(24, dtype=np.float32)


def test_every_truncation_is_an_error(tmp_path):
    path = write_pth(tmp_path / "a.pth", {"a": BASE})
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(WeightsError):
            torch_zip.read(path)


def test_every_byte_of_data_is_checked(tmp_path):
    path = write_pth(tmp_path / "a.pth", {"a": BASE})
    content = bytearray(path.read_bytes())
    start = content.index(BASE.tobytes())
    for position in range(start, start + BASE.nbytes):
        content[position] ^= 0x10
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="damaged.*checksum of the storage '0' is [0-9a-f]{8}, and should be"):
            torch_zip.read(path)
        content[position] ^= 0x10


def lying(change) -> bytes:
    """An archive whose bytes were changed after writing."""
    content = bytearray(archive((f"a/{name}", data) for name, data in records({"a": BASE}).items()))
    change(content, content.index(b"PK\x01\x02"))
    return bytes(content)


def set_bytes(offset: int, value: bytes, *, directory: bool):
    def change(content, start):
        position = offset + (start if directory else 0)
        content[position : position + len(value)] = value

    return change


def compressed() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in records({"a": BASE}).items():
            target.writestr(f"a/{name}", data)
    return file.getvalue()


def doubled(name: str) -> bytes:
    return archive([*((f"a/{key}", data) for key, data in records({"a": BASE}).items()), (name, b"\x80\x02).")])


def overlapping() -> bytes:
    """Two names for one record, headers and all."""
    content = lying(lambda *_: None)
    start = content.index(b"PK\x01\x02")
    entry = bytearray(content[start : content.index(b"PK\x01\x02", start + 4)])
    entry[46:] = b"a/DATA.pkl"
    end = bytearray(content[content.index(b"PK\x05\x06") :])
    directory = content[start : -len(end)] + entry
    count = struct.unpack_from("<H", end, 8)[0] + 1
    struct.pack_into("<2H2I", end, 8, count, count, len(directory), start)
    body = bytearray(content[:start])
    return bytes(body + directory + end)


@pytest.mark.parametrize(
    "content, found",
    [
        (compressed(), "compressed"),
        (lying(set_bytes(8, b"\x09\x08", directory=True)), "encrypted"),
        (lying(set_bytes(10, b"\x08", directory=True)), "compressed"),
        (lying(set_bytes(0, b"PK\x03\x05", directory=False)), "is of an unknown kind"),
        (lying(set_bytes(6, b"\0\0", directory=False)), "disagrees with the zip directory"),
        (lying(set_bytes(18, b"\x07", directory=False)), "disagrees with the zip directory"),
        (lying(set_bytes(31, b"x", directory=False)), "disagrees with the zip directory"),
        (lying(set_bytes(42, b"\x01", directory=True)), "disagrees with the zip directory"),
        (lying(set_bytes(42, b"\xff\xff\xff\x7f", directory=True)), "ends at byte"),
        (lying(set_bytes(20, b"\xff\xff\xff\x7f" * 2, directory=True)), "should end at byte"),
        (lying(set_bytes(20, b"\xff\x02\0\0" * 2, directory=True)), "overlap"),
        (lying(set_bytes(16, b"1234", directory=True)), "checksum of its pickle"),
        (doubled("a/data.pkl"), "two records of the same name"),
        (doubled("b/data.pkl"), "two records of the same name"),
        (doubled("a/data/0"), "two records of the same name"),
        (overlapping(), "disagrees|overlap"),
        (lying(lambda content, start: content.__delitem__(slice(start, None))), "zip directory"),
    ],
    ids="deflated encrypted method signature flags size name offset far-offset long longer checksum twice two-pickles "
    "two-storages overlapping no-directory".split(),
)
def test_lying_archives(tmp_path, content, found):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=found):
        torch_zip.read(path)
