"""Files that `torch.save` wrote (zip format, PyTorch 1.6 and later), read without PyTorch as views of the mapped file.

Such a file is a zip archive of uncompressed records: `NAME/data.pkl`, a pickle that describes the content, and
`NAME/data/KEY`, the numbers of each storage. Python's `zipfile` reads the directory; everything in it is checked here
before use, and each record that is used against its CRC-32.
"""

import contextlib
import mmap
import os
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from polaformer_jax.errors import WeightsError
from polaformer_jax.weights import kinds
from polaformer_jax.weights.torch_pickle import Storage, interpret

_ZIP = b"PK\x03\x04"

_HEADER = struct.Struct("<4s5H3I2H")  # of a record: PKWARE's APPNOTE, section 4.3.7
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_SIZES_FOLLOW = 0x8  # the header has zeros, and the sizes come after the data
_ZIP64 = 0xFFFFFFFF  # marks a size that is stored elsewhere
_CHUNK = 1 << 20
_SPARE = 64 << 20  # bytes by which the sum of the views may exceed the file's own size


class _Record(NamedTuple):
    start: int
    size: int
    checksum: int


def read(path: str | os.PathLike, *, name: str | None = None) -> object:
    """The content of the file: plain dicts, lists, tuples, sets and scalars; tensors are read-only NumPy arrays.

    Arrays are views of the mapped file, strided and overlapping as the tensors were. Nothing in the file is executed.

    Args:
        path: of a local file.
        name: the file's name in errors; by default its path.

    Raises:
        WeightsError: there is no such file, it is of another kind, it is damaged, or it holds something other than
            tensors and plain data.
    """
    path, name = Path(path), name or os.fspath(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise WeightsError(f"{name} is a folder, expected a .pth file; name the file inside it")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for a writer
            raise WeightsError(f"{name} is a device or pipe, expected a .pth file; copy it to a file")
        with open(path, "rb") as file:
            before = os.fstat(file.fileno())
            content = _read(file, before.st_size, name)
            after = os.fstat(file.fileno())
    except FileNotFoundError:
        raise WeightsError(f"there is no weights file {name}") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"cannot read {name}: {error}") from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise WeightsError(f"{name} was changed while it was read; wait until it is written, and try again")
    return content


def _read(file: BinaryIO, length: int, name: str) -> object:
    _check_kind(file.read(kinds.HEAD), name)
    archive = _Archive(file, length, name)
    return interpret(archive.content(archive.records["data.pkl"]), archive.tensor, source=name)


def _check_kind(head: bytes, name: str) -> None:
    """Raises an error that says what the file is, unless it is a zip archive."""
    if head.startswith(_ZIP):
        return
    unknown = f"of an unknown kind (it begins with {head[:8]!r})", "give a .pth file of PyTorch, or .safetensors"
    what, way_out = kinds.describe(head) or unknown
    raise WeightsError(f"{name} is {what}, expected a .pth file as torch.save writes it (a zip archive); {way_out}")


class _Archive:
    """The records of a file of torch.save, and views of the storages in them."""

    def __init__(self, file: BinaryIO, length: int, name: str):
        self._file, self._length, self._name = file, length, name
        self._used = {}  # storages by key, each with the bytes that its tensors have beyond it
        self._excess = 0  # the sum of these, where positive
        self.records = self._directory()
        if self._byte_order() == b"big":
            raise WeightsError(
                f"{name} was written on a big-endian machine, expected little-endian numbers;"
                f" {kinds.SAVE_AGAIN} on another"
            )
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def damaged(self, what: str) -> WeightsError:
        return WeightsError(f"{self._name} is damaged or was not written by torch.save: {what}; {kinds.FETCH_AGAIN}")

    def _directory(self) -> dict[str, _Record]:
        """The records by name, without the archive's name."""
        try:
            with contextlib.closing(zipfile.ZipFile(self._file)) as archive:
                entries = archive.infolist()
        except Exception as error:  # a damaged directory makes `zipfile` fail in many ways
            raise self.damaged(
                f"its zip directory, the last thing in the file, cannot be read ({error or type(error).__name__})"
            ) from error
        names = [entry.orig_filename for entry in entries]
        pickles = [found for found in names if f"/{found}".endswith("/data.pkl")]
        if not pickles:
            some = ", ".join(ascii(found)[1:-1][:60] for found in names[:3])
            raise WeightsError(
                f"{self._name} is a zip archive without a data.pkl (it has {some or 'nothing'}), expected a file of "
                "torch.save; unpack it if the .pth file is inside"
            )
        if len(pickles) > 1 or len(set(names)) < len(names):
            raise self.damaged("it has two records of the same name")
        prefix = pickles[0].removesuffix("data.pkl")
        if any(found.removeprefix(prefix).startswith(("constants.pkl", "code/")) for found in names):
            raise WeightsError(
                f"{self._name} is a TorchScript program, expected tensors; load it with torch.jit.load and save its "
                "state_dict() with torch.save"
            )
        records = {}
        for entry in entries:
            records[entry.orig_filename.removeprefix(prefix)] = self._locate(entry)
        if len(records) < len(entries):
            raise self.damaged("it has two records of the same name")
        end = 0
        for record in sorted(records.values()):  # before reading: many records over one range would cost endless work
            if record.start < end:
                raise self.damaged("two of its records overlap")
            end = record.start + record.size
        return records

    def _locate(self, entry: zipfile.ZipInfo) -> _Record:
        """Where the data of a record is; raises an error if its header disagrees with the directory."""
        name = ascii(entry.orig_filename)
        if entry.flag_bits & _ENCRYPTED:
            raise self.damaged(f"the record {name} is encrypted")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise self.damaged(f"the record {name} is compressed, which PyTorch does not do")
        disagrees = self.damaged(f"the header of the record {name} disagrees with the zip directory")
        header = self._bytes(entry.header_offset, _HEADER.size)
        if not header.startswith(_ZIP):
            raise disagrees
        _, _, flags, method, _, _, checksum, *sizes, name_length, extra_length = _HEADER.unpack(header)
        start = entry.header_offset + _HEADER.size + name_length + extra_length
        stored_name = self._bytes(entry.header_offset + _HEADER.size, name_length)
        follow = {0} if flags & _SIZES_FOLLOW else set()
        if (
            flags != entry.flag_bits
            or method != entry.compress_type
            or stored_name != entry.orig_filename.encode("utf-8" if flags & 0x800 else "cp437")
            or checksum not in {entry.CRC} | follow
            or not set(sizes) <= {entry.file_size, _ZIP64} | follow
        ):
            raise disagrees
        if start + entry.file_size > self._length:
            raise self.damaged(f"the record {name} should end at byte {start + entry.file_size:,} of {self._length:,}")
        return _Record(start, entry.file_size, entry.CRC)

    def _bytes(self, start: int, size: int) -> bytes:
        if start < 0 or start + size > self._length:
            raise self.damaged(f"it ends at byte {self._length:,}, but something should be at {start:,}")
        self._file.seek(start)
        data = self._file.read(size)
        if len(data) != size:
            raise self.damaged("it became shorter while it was read")
        return data

    def _verify(self, record: _Record, what: str) -> None:
        """Verifies the checksum through reads, not through the map, whose pages would all count as memory in use."""
        checksum, end = 0, record.start + record.size
        for start in range(record.start, end, _CHUNK):
            checksum = zlib.crc32(self._bytes(start, min(_CHUNK, end - start)), checksum)
        if checksum != record.checksum:
            raise self.damaged(f"the checksum of {what} is {checksum:08x}, and should be {record.checksum:08x}")

    def content(self, record: _Record) -> bytes:
        self._verify(record, "its pickle")
        return self._bytes(record.start, record.size)

    def _byte_order(self) -> bytes:
        """Files from before PyTorch 2.1 do not state it; they are little-endian."""
        if (record := self.records.get("byteorder")) is None:
            return b"little"
        self._verify(record, "the record 'byteorder'")
        order = self._bytes(record.start, min(record.size, 16))
        if order not in (b"little", b"big"):
            raise self.damaged(f"its byte order is {order!r}, expected 'little'")
        return order

    def tensor(
        self, storage: Storage, dtype: np.dtype, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
    ) -> np.ndarray:
        """A view of the map. Everything is computed in Python integers, which do not overflow."""
        record = self._storage(storage)
        numel = 1
        for n in size:
            numel *= n
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if numel and (last + 1) * dtype.itemsize > record.size:
            raise self.damaged(
                f"a tensor of shape {_short(size)}, strides {_short(stride)} and offset {offset} goes beyond its "
                f"storage of {record.size // dtype.itemsize} elements"
            )
        self._charge(storage, numel * dtype.itemsize)
        # A stride along an axis of one element has no effect, and may have any value.
        strides = [(step if n > 1 else 1) * dtype.itemsize for n, step in zip(size, stride, strict=True)]
        try:
            if not numel:
                array = np.zeros(size, dtype)
                array.flags.writeable = False
                return array
            return np.ndarray(size, dtype, self._map, record.start + offset * dtype.itemsize, strides)
        except (ValueError, OverflowError) as error:  # such as (0, 2**63)
            raise self.damaged(f"a tensor of shape {_short(size)} cannot be made ({error})") from error

    def _storage(self, storage: Storage) -> _Record:
        record = self.records.get(f"data/{storage.key}")
        key = ascii(storage.key)[:60]
        if record is None:
            raise self.damaged(f"the storage {key} is missing")
        if storage.key in self._used:
            if self._used[storage.key][0] != storage:
                raise self.damaged(f"the storage {key} is described in two ways")
            return record
        if storage.numel * storage.dtype.itemsize != record.size:
            raise self.damaged(
                f"the storage {key} has {record.size:,} bytes, expected {storage.numel:,} elements of {storage.dtype}"
            )
        self._verify(record, f"the storage {key}")
        if (
            storage.dtype == np.bool_
            and np.frombuffer(self._map, np.uint8, record.size, record.start).max(initial=0) > 1
        ):
            raise self.damaged(f"the storage {key} of bools has other values than 0 and 1")
        self._used[storage.key] = [storage, -record.size]
        return record

    def _charge(self, storage: Storage, size: int) -> None:
        """Limits the memory beyond the file's size that copies of shared and expanded tensors would need."""
        _, before = self._used[storage.key]
        after = self._used[storage.key][1] = before + size
        self._excess += max(0, after) - max(0, before)
        if self._excess > _SPARE + self._length:
            raise self.damaged(
                f"its tensors would have {self._excess:,} bytes more than its storages, expected at most {_SPARE:,} "
                "more than the file"
            )


def _short(values: tuple[int, ...]) -> str:
    return str(values) if len(values) <= 8 else f"{values[:8]}..."
