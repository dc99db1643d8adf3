"""Files of `torch.save`, read without PyTorch: the values are right, and other files are one clear error."""

import collections
import gzip
import io
import itertools
import mmap
import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from polaformer_jax.errors import WeightsError
from polaformer_jax.weights import torch_zip
from tests.golden.fill import fill, is_buffer
from tests.support.golden_models import GOLDEN_FOLDER, SMALL
from tests.support.torch_files import (
    STORAGES,
    UNTYPED,
    Config,
    Parameter,
    View,
    official_checkpoint,
    records,
    relative_position_index,
    write_pth,
    write_zip,
)

DTYPES = [*STORAGES, *UNTYPED]
BASE = np.arange(24, dtype=np.float32)


def read_back(tmp_path, content, **options):
    return torch_zip.read(write_pth(tmp_path / "a.pth", content, **options))


# --- values


def test_official_pvt():
    content = torch_zip.read(GOLDEN_FOLDER / "official_pvt_llll.pth")
    shapes = SMALL["pvt_llll"]["shapes"]
    assert {name: list(array.shape) for name, array in content["model"].items()} == shapes
    for name, array in content["model"].items():
        np.testing.assert_array_equal(array, fill(name, array.shape), strict=True)
    assert (content["epoch"], content["max_accuracy"]) == (300, 78.8)


def test_official_swin(tmp_path):
    content = torch_zip.read(official_checkpoint(tmp_path / "official.pth"))
    assert {name: list(array.shape) for name, array in content["model"].items()} == SMALL["swin_llss"]["shapes"]
    for name, array in content["model"].items():
        if not is_buffer(name):
            np.testing.assert_array_equal(array, fill(name, array.shape), strict=True)
    index = content["model"]["layers.2.blocks.0.attn.relative_position_index"]
    np.testing.assert_array_equal(index, relative_position_index(7), strict=True)
    assert set(np.unique(content["model"]["layers.2.blocks.1.attn_mask"])) == {0, -100}
    assert (content["epoch"], content["max_accuracy"]) == (300, 82.6)


def test_the_config_is_a_plain_dict(tmp_path):
    config = torch_zip.read(official_checkpoint(tmp_path / "official.pth"))["config"]
    assert type(config) is dict and type(config["MODEL"]["LA"]) is dict
    assert config["MODEL"]["LA"] == {
        "ALPHA": 4,
        "KERNEL_SIZE": 5,
        "ATTN_TYPE": "LLSS",
        "PVT_LA_SR_RATIOS": 1111,
        "CSWIN_LA_SPLIT_SIZE": "56-28-14-7",
    }
    assert config["TRAIN"]["OPTIMIZER"]["BETAS"] == (0.9, 0.999)


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types(tmp_path, dtype, protocol):
    values = (np.random.default_rng(0).standard_normal((3, 4)) * 10).clip(0).astype(dtype)
    found = read_back(tmp_path, {"a": values}, protocol=protocol)["a"]
    np.testing.assert_array_equal(found, values, strict=True)


@pytest.mark.parametrize(
    "view, expected",
    [
        (View(BASE, 0, (6, 4), (1, 6)), BASE.reshape(4, 6).T),
        (View(BASE, 6, (2, 3), (6, 2)), BASE.reshape(4, 6)[1:3, ::2]),
        (View(BASE, 5, (4,), (1,)), BASE[5:9]),
        (View(BASE, 0, (4, 3), (2, 1)), np.lib.stride_tricks.sliding_window_view(BASE, 3)[:8:2]),
        (View(BASE, 2, (3, 5), (1, 0)), np.broadcast_to(BASE[2:5, None], (3, 5))),
        (View(BASE, 7, (), ()), BASE[7].reshape(())),
        (View(BASE, 0, (0, 3), (3, 1)), np.zeros((0, 3), np.float32)),
        (View(BASE, 0, (1, 2), (1 << 40, 1)), BASE[:2].reshape(1, 2)),
    ],
    ids="transposed sliced offset overlapping expanded scalar empty one-row".split(),
)
def test_views(tmp_path, view, expected):
    found = read_back(tmp_path, {"a": view, "whole": View(BASE, 0, (24,), (1,))})
    np.testing.assert_array_equal(found["a"], expected, strict=True)
    np.testing.assert_array_equal(found["whole"], BASE, strict=True)


def test_shared_storages_stay_shared(tmp_path):
    content = read_back(tmp_path, {"a": View(BASE, 0, (24,), (1,)), "b": View(BASE, 12, (3, 4), (4, 1))})
    assert np.shares_memory(content["a"], content["b"])


def test_tensors_are_mapped_not_copied(tmp_path):
    path = write_pth(tmp_path / "a.pth", {"a": np.ones(1 << 21, np.float32)})
    tracemalloc.start()
    array = torch_zip.read(path)["a"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(array.base, mmap.mmap) and not array.flags.writeable
    assert peak < 3 << 20, "the file has 8 MiB"


def test_plain_data(tmp_path):
    content = {
        "list": [1, -2.5, None, True, False, "text ü", b"bytes", b"", 2**40, -(2**63), 2**64 - 1],
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "ordered": collections.OrderedDict(b=1, a=2),
        "sets": [{1, 2}, frozenset({"a"}), set()],
        3: {None: 1, 0.5: 2, True: 3},
    }
    for protocol in (2, 3, 4):
        found = read_back(tmp_path, content, protocol=protocol)
        assert found == content
        assert type(found["ordered"]) is dict and list(found["ordered"]) == ["b", "a"]


def test_parameters_and_nested_configs(tmp_path):
    found = read_back(tmp_path, {"p": Parameter(np.eye(2)), "c": Config(A=Config(B=[1]), C=Config())})
    np.testing.assert_array_equal(found["p"], np.eye(2), strict=True)
    assert found["c"] == {"A": {"B": [1]}, "C": {}} and type(found["c"]["A"]) is dict


def test_archives_packed_again_without_alignment(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as target:
        for name, data in records({"a": BASE, "odd": np.ones(3, np.int8), "b": BASE.astype(np.float64)}).items():
            target.writestr(f"a/{name}", data)
    found = torch_zip.read(tmp_path / "a.pth")
    np.testing.assert_array_equal(found["a"], BASE, strict=True)
    np.testing.assert_array_equal(found["b"], BASE.astype(np.float64), strict=True)


def test_files_without_a_byte_order_are_little_endian(tmp_path):
    content = records({"a": BASE})
    del content["byteorder"]
    np.testing.assert_array_equal(torch_zip.read(write_zip(tmp_path / "a.pth", content))["a"], BASE)


def test_bfloat16_keeps_its_bits(tmp_path):
    bits = np.arange(0, 65536, 7, dtype=np.uint16)
    found = read_back(tmp_path, {"a": bits.view(ml_dtypes.bfloat16)})["a"]
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.view(np.uint16), bits, strict=True)


def test_all_pairs_of_types_in_one_file(tmp_path):
    """Storages of odd lengths before wide types: each record begins at its own alignment."""
    for one, other in itertools.product(DTYPES, repeat=2):
        found = read_back(tmp_path, {"a": np.ones(3, one), "b": np.ones(2, other)})
        assert found["a"].flags.aligned and found["b"].flags.aligned
        assert (found["a"].dtype, found["b"].dtype) == (one, other)


# --- other files


def gzipped() -> bytes:
    return gzip.compress(b"weights")


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, weights=BASE)
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("storages"))
    return file.getvalue()


def legacy() -> bytes:
    return pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)


@pytest.mark.parametrize(
    "content, found",
    [
        (b"", "is empty.*fetch it again"),
        (b"\0\x01\x02 noise", r"is of an unknown kind \(it begins with b'.*give a .pth file"),
        (legacy(), "old format of torch.save .*load it in PyTorch and save"),
        (pickle.dumps({"a": 1}, 2), "a plain pickle"),
        (tarred(), "a tar archive"),
        (gzipped(), "compressed with gzip.*gunzip"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (npz(), r"a zip archive without a data.pkl \(it has weights.npy\)"),
        (b"PK\x05\x06" + bytes(18), "an empty zip archive"),
        (struct.pack("<Q", 16) + b'{"a":1}         ', "a .safetensors file"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS.*git lfs pull"),
    ],
    ids="empty noise old pickle tar gzip hdf5 npz empty-zip safetensors html lfs".split(),
)
def test_other_files(tmp_path, content, found):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"a.pth .*{found}"):
        torch_zip.read(path)


def test_no_file(tmp_path):
    with pytest.raises(WeightsError, match="there is no weights file .*none.pth"):
        torch_zip.read(tmp_path / "none.pth")
    with pytest.raises(WeightsError, match="is a folder, expected a .pth file"):
        torch_zip.read(tmp_path)
    with pytest.raises(WeightsError, match="cannot read"):
        torch_zip.read("a\0.pth")


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(WeightsError, match="is a device or pipe"):
        torch_zip.read(tmp_path / "pipe.pth")


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    path = write_pth(tmp_path / "a.pth", {"a": BASE})

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(WeightsError, match="cannot read .*a.pth: .*Permission denied"):
        torch_zip.read(path)


def test_files_that_change_while_they_are_read(tmp_path, monkeypatch):
    path = write_pth(tmp_path / "a.pth", {"a": BASE})
    interpret = torch_zip.interpret

    def interpret_late(*args, **kwargs):
        with open(path, "ab") as file:
            file.write(b"more")
        return interpret(*args, **kwargs)

    monkeypatch.setattr(torch_zip, "interpret", interpret_late)
    with pytest.raises(WeightsError, match="was changed while it was read"):
        torch_zip.read(path)


def test_torchscript_is_refused_as_such(tmp_path):
    content = records({"a": BASE}) | {"constants.pkl": b"\x80\x02)."}
    with pytest.raises(WeightsError, match="a TorchScript program.*state_dict"):
        torch_zip.read(write_zip(tmp_path / "a.pth", content))


def test_big_endian_numbers_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="big-endian"):
        read_back(tmp_path, {"a": BASE}, byteorder="big")


def test_names_of_the_file_are_for_errors_only(tmp_path):
    write_pth(tmp_path / "a.pth", {"a": BASE}).rename(tmp_path / "copy.bin")
    assert list(torch_zip.read(tmp_path / "copy.bin")) == ["a"]
    (tmp_path / "copy.bin").write_bytes(b"noise")
    with pytest.raises(WeightsError, match="gs://bucket/a.pth is of an unknown kind"):
        torch_zip.read(tmp_path / "copy.bin", name="gs://bucket/a.pth")
