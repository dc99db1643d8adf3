"""Files of `torch.save`, written without PyTorch: what tests read, honest ones and hostile ones."""

import collections
import dataclasses
import io
import math
import pickle
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from polaformer_jax.weights.torch_pickle import interpret
from tests.golden.fill import fill
from tests.support import GOLDEN_FOLDER

_ALIGNMENT = 64

STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.int32): "IntStorage",
    np.dtype(np.int16): "ShortStorage",
    np.dtype(np.int8): "CharStorage",
    np.dtype(np.uint8): "ByteStorage",
    np.dtype(np.bool_): "BoolStorage",
    np.dtype(np.complex64): "ComplexFloatStorage",
    np.dtype(np.complex128): "ComplexDoubleStorage",
}
UNTYPED = (np.dtype(np.uint16), np.dtype(np.uint32), np.dtype(np.uint64))  # PyTorch has no storage class for these


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A tensor over a storage that others may share. Offset and strides in elements, as PyTorch counts."""

    storage: np.ndarray
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Parameter:
    """An `nn.Parameter` outside of a state_dict."""

    value: np.ndarray


class Config(dict):
    """Is written as a `yacs.config.CfgNode`, its attributes included."""


@dataclasses.dataclass(frozen=True, eq=False)
class Name:
    """Any Python object, by its name alone; `Call` calls it."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    function: Name
    arguments: tuple


@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
    kind: Name
    key: str
    numel: int


class _Pickler(pickle._Pickler):
    """Python's own pickler, which knows tensors besides. Collects their storages."""

    def __init__(self, file, protocol: int):
        super().__init__(file, protocol)
        self.arrays = {}  # by id: the array is kept, so that ids stay unique, with its storage
        self._names = {}
        self._alive = []

    def save(self, obj, save_persistent_id=True):
        self._alive.append(obj)  # the memo goes by id
        if id(obj) in self.memo:
            return super().save(obj)
        match obj:
            case _Storage():
                self.save(("storage", obj.kind, obj.key, "cpu", obj.numel))
                self.write(pickle.BINPERSID)
            case Name():
                self._name(obj)
            case Call():
                self._call(obj.function, obj.arguments, obj)
            case Parameter():
                arguments = (self._tensor(obj.value), True, collections.OrderedDict())
                self._call(self._named("torch._utils", "_rebuild_parameter"), arguments, obj)
            case np.ndarray() | View():
                call = self._tensor(obj)
                self._call(call.function, call.arguments, obj)
            case Config():
                self.save(self._named("yacs.config", "CfgNode"))
                self.save(())
                self.write(pickle.NEWOBJ)
                self.memoize(obj)
                self._batch_setitems(obj.items())
                self.save({"__immutable__": True, "__deprecated_keys__": set(), "__new_allowed__": False})
                self.write(pickle.BUILD)
            case _:
                super().save(obj)

    def _named(self, module: str, name: str) -> Name:
        return self._names.setdefault((module, name), Name(module, name))

    def _name(self, obj: Name) -> None:
        if self.proto >= 4:
            self.save(obj.module)
            self.save(obj.name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        self.memoize(obj)

    def _call(self, function: Name, arguments: tuple, obj) -> None:
        self.save(function)
        self.save(arguments)
        self.write(pickle.REDUCE)
        self.memoize(obj)

    def _tensor(self, obj: np.ndarray | View) -> Call:
        if isinstance(obj, np.ndarray):
            obj = View(obj, 0, obj.shape, contiguous_strides(obj.shape))
        storage, dtype = self._storage(obj.storage), obj.storage.dtype
        arguments = (storage, obj.offset, obj.size, obj.stride, False, collections.OrderedDict())
        if dtype in UNTYPED:
            arguments += (self._named("torch", dtype.name),)
            return Call(self._named("torch._utils", "_rebuild_tensor_v3"), arguments)
        return Call(self._named("torch._utils", "_rebuild_tensor_v2"), arguments)

    def _storage(self, array: np.ndarray) -> _Storage:
        if id(array) not in self.arrays:
            if array.dtype in UNTYPED:
                kind, numel = self._named("torch.storage", "UntypedStorage"), array.nbytes
            else:
                kind, numel = self._named("torch", STORAGES[array.dtype]), array.size
            self.arrays[id(array)] = (array, _Storage(kind, str(len(self.arrays)), numel))
        return self.arrays[id(array)][1]


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def write_pth(path: Path, content: object, *, protocol: int = 2, byteorder: str = "little") -> Path:
    """Writes `content` as `torch.save` does: containers, scalars, NumPy arrays as tensors, and the classes above."""
    return write_zip(path, records(content, protocol=protocol, byteorder=byteorder))


def records(content: object, *, protocol: int = 2, byteorder: str = "little") -> dict[str, bytes]:
    """The records that `torch.save` puts into the archive."""
    file = io.BytesIO()
    pickler = _Pickler(file, protocol)
    pickler.dump(content)
    data = {f"data/{storage.key}": array.tobytes() for array, storage in pickler.arrays.values()}
    return pack(file.getvalue(), data, byteorder=byteorder)


def pack(pickled: bytes, data: Mapping[str, bytes], *, byteorder: str = "little") -> dict[str, bytes]:
    """The records around a given pickle."""
    first = {"data.pkl": pickled, "byteorder": byteorder.encode()}
    return first | dict(data) | {"version": b"3\n", ".data/serialization_id": b"0" * 40}


def write_zip(path: Path, content: Mapping[str, bytes] | Iterable[tuple[str, bytes]]) -> Path:
    """Writes an archive as PyTorch lays it out, under the name of the file."""
    items = content.items() if isinstance(content, Mapping) else content
    path.write_bytes(archive((f"{path.stem}/{name}", data) for name, data in items))
    return path


def archive(items: Iterable[tuple[str, bytes]]) -> bytes:
    """Uncompressed, at multiples of 64 bytes, with checksum and sizes after the data; `zipfile` cannot write it so."""
    body, directory, count = bytearray(), bytearray(), 0
    for name, data in items:
        raw, start = name.encode(), len(body)
        padding = -(start + 30 + len(raw) + 4) % _ALIGNMENT
        extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
        body += struct.pack("<4s5H3I2H", b"PK\x03\x04", 0, 0x808, 0, 0, 0, 0, 0, 0, len(raw), len(extra)) + raw + extra
        body += data
        sizes = (zlib.crc32(data), len(data), len(data))
        body += struct.pack("<4s3I", b"PK\x07\x08", *sizes)
        directory += struct.pack(
            "<4s6H3I5H2I", b"PK\x01\x02", 0, 0, 0x808, 0, 0, 0, *sizes, len(raw), 0, 0, 0, 0, 0, start
        )
        directory += raw
        count += 1
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, len(directory), len(body), 0)
    return bytes(body + directory + end)


def official_checkpoint(path: Path) -> Path:
    """Writes the checkpoint of the small Pola-Swin as the official trainer wrote it, config and optimizer included.

    Its pickle is the official trainer's, byte for byte. The tensors of the model are those of `tests.golden.fill`, the
    buffers are computed, and the optimizer's moments, which nobody reads, are arbitrary.
    """
    pickled = (GOLDEN_FOLDER / "official_swin_llss.pkl").read_bytes()
    shapes = {}  # of each storage

    def note(storage, dtype, offset, size, stride):
        assert offset == 0 and stride == contiguous_strides(size)
        shapes[storage.key] = size
        return storage

    content = interpret(pickled, note, source="official_swin_llss.pkl")
    data = {key: np.full(size, int(key), np.float32) for key, size in shapes.items()}
    for name, storage in content["model"].items():
        data[storage.key] = _official_tensor(name, shapes[storage.key])
    ordered = sorted(data, key=int)
    return write_zip(path, pack(pickled, {f"data/{key}": data[key].tobytes() for key in ordered}))


def _official_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    match name.rsplit(".", 1)[-1]:
        case "relative_position_index":
            return relative_position_index(math.isqrt(shape[0]))
        case "attn_mask":
            return attention_mask(math.isqrt(shape[0]), math.isqrt(shape[1]))
    return fill(name, shape)


def relative_position_index(window: int) -> np.ndarray:
    """(window², window²) int64: the row of the bias table for each pair of tokens in a window."""
    y, x = np.divmod(np.arange(window**2), window)
    down, right = y[:, None] - y, x[:, None] - x
    return (down + window - 1) * (2 * window - 1) + right + window - 1


def attention_mask(windows: int, window: int) -> np.ndarray:
    """(windows², window², window²) float32: -100 where a shift by half a window brought two regions together."""
    position = np.arange(windows * window)
    region = (position >= position.size - window).astype(int) + (position >= position.size - window // 2)
    region = (3 * region[:, None] + region).reshape(windows, window, windows, window)
    region = region.transpose(0, 2, 1, 3).reshape(windows**2, window**2)
    return np.where(region[:, :, None] == region[:, None, :], 0, -100).astype(np.float32)
