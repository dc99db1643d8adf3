"""Safetensors files, tensor by tensor: written without a second copy in memory, read as views of a mapped file.

The format (https://github.com/huggingface/safetensors) is eight bytes with the length of a JSON header, the header, and
the tensors' bytes. It has no checksum of its own, so files that we write carry one in their metadata: CRC-32 of the
header without the checksum, then of everything after the header.
"""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from polaformer_jax.errors import WeightsError
from polaformer_jax.files import atomic

FORMAT = "polaformer_jax/1"  # the tag in the metadata of a file that we wrote

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_CHUNK = 1 << 20


def write(path: str | os.PathLike, arrays: Mapping[str, object], metadata: Mapping[str, str]) -> None:
    """Writes arrays to `path` atomically; only one of them is held in memory in addition to the arrays themselves.

    The library's own writer needs all tensors contiguous at once, which doubles the memory of a transposing conversion.

    Args:
        path: local or in a bucket. Its folder is created if it is missing.
        arrays: NumPy or JAX arrays, in any memory layout.
        metadata: strings for the header; the format tag and the checksum are added.
    """
    # Wide dtypes first, so that every tensor is at a multiple of its item's size.
    names = sorted(arrays, key=lambda name: (-np.dtype(arrays[name].dtype).itemsize, name))
    header, offset = {"__metadata__": {**metadata, "format": FORMAT}}, 0
    for name in names:
        dtype = np.dtype(arrays[name].dtype)
        end = offset + int(np.prod(arrays[name].shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(arrays[name].shape), "data_offsets": [offset, end]}
        offset = end
    checksum = _header_checksum(header)
    for name in names:
        checksum = zlib.crc32(_bytes(arrays[name]), checksum)
    header["__metadata__"]["checksum"] = f"{checksum:08x}"
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic.writing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(_bytes(arrays[name]))


def read(path: Path, *, name: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read-only arrays that are views of the mapped file, and the metadata, which is empty for files of other programs.

    Raises:
        WeightsError: it is not a safetensors file, or it is damaged. For files of other programs only the structure can
            be checked.
    """
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass  # checks lengths, offsets, types and shapes, and that the tensors cover the file without a gap
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (safetensors.SafetensorError, ValueError, OSError, RecursionError) as error:
        raise WeightsError(
            f"{name} is damaged, or not a safetensors file ({error}): fetch or write it again"
        ) from error
    metadata = header.pop("__metadata__", None) or {}
    # Either of two signs is enough: a damaged tag must not make it a foreign file, whose checksum is not verified.
    if metadata.get("format") == FORMAT or metadata.keys() >= {"checksum", "layout"}:
        _verify(path, name, {**header, "__metadata__": metadata}, start=8 + length)
    else:
        metadata = {}
    if unknown := sorted({entry["dtype"] for entry in header.values()} - set(_DTYPES)):
        raise WeightsError(f"{name} has tensors of type {', '.join(unknown)}; expected {', '.join(_DTYPES)}")
    return _views(path, header, start=8 + length), metadata


def _views(path: Path, header: dict, *, start: int) -> dict[str, np.ndarray]:
    content = np.memmap(path, np.uint8, mode="r")
    views = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        views[name] = content[start + begin : start + end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return views


def _verify(path: Path, name: str, header: dict, *, start: int) -> None:
    found = header["__metadata__"].get("checksum")
    checksum = _header_checksum(header)
    with open(path, "rb") as file:  # read rather than mapped: the pages of a map would count as memory
        file.seek(start)
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    if found != f"{checksum:08x}":
        raise WeightsError(
            f"{name} is damaged: its checksum is {checksum:08x}, and should be {found}; fetch or write it again"
        )


def _header_checksum(header: dict) -> int:
    metadata = {key: value for key, value in header["__metadata__"].items() if key != "checksum"}
    return zlib.crc32(json.dumps({**header, "__metadata__": metadata}, sort_keys=True).encode())


def _bytes(array) -> bytes:
    """A copy of the array's bytes in C order (files in a bucket take nothing but `bytes`)."""
    return np.asarray(array).tobytes()
