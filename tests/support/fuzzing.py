"""Judges what a reader of weights makes of a spoilt file: the clear error, or correct weights, and nothing else.

"Correct" is the original, bit for bit. Where the mutation repaired the checksums, or the file never had any
(safetensors of others), the file may legitimately say something else: then the tensors have to be those of an
independent reading of the same bytes, by Python's own unpickler with harmless stand-ins and `zipfile`, or by `json`.
"""

import collections
import json
import math
import pickle
import signal
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

from polaformer_jax.errors import WeightsError
from polaformer_jax.weights import WeightsFile, safetensors_file
from polaformer_jax.weights.files import unwrap
from tests.support import pickle_mutations  # noqa: F401, adds its mutations
from tests.support.mutations import Base, Mutant
from tests.support.torch_files import STORAGES, UNTYPED, Config, Parameter, View, archive, records

Load = Callable[[Path], WeightsFile]


class Failure(Exception):
    """A reader did something else than to give correct weights or the error."""


class _Hang(BaseException):
    """No `Exception`, so that no reader takes it for one of its own."""


def bases() -> list[Base]:
    """Sound files of some ten thousand bytes: checkpoints of two protocols, our safetensors, and one of others."""
    rng = np.random.default_rng(0)
    state = {f"layer.{i}.weight": rng.standard_normal((3 + i, 8)).astype(np.float32) for i in range(8)}
    state |= {f"layer.{i}.half": rng.standard_normal(9).astype(ml_dtypes.bfloat16) for i in range(2)}
    state["index"] = rng.integers(0, 99, (5, 5))
    state["mask"] = rng.random((2, 4, 4)) < 0.5
    shared = rng.standard_normal(60)
    views = {"a": View(shared, 3, (4, 6), (1, 4)), "b": View(shared, 0, (60,), (1,)), "c": View(shared, 7, (), ())}
    unsigned = {"u": rng.integers(0, 99, (2, 3)).astype(np.uint16), "p": Parameter(np.ones(3, np.float16))}
    content = {
        "model": collections.OrderedDict(state | views),
        "optimizer": {"state": {0: {"step": np.array(3, np.float32), "exp_avg": np.ones((3, 8), np.float32)}}},
        "epoch": 300,
        "max_accuracy": 82.6,
        "config": Config(MODEL=Config(NAME="small", ALPHA=4, BETAS=(0.9, 0.999), NONE=None), TAGS=["a", True, b"c"]),
    }
    found = []
    for name, inner, protocol in (("protocol 2", content, 2), ("protocol 4", {"state_dict": state | unsigned}, 4)):
        items = tuple((f"a/{key}", data) for key, data in records(inner, protocol=protocol).items())
        found.append(Base(name, ".pth", archive(items), items, True))
    floats = {key: array for key, array in state.items() if array.dtype == np.float32}
    return [*found, *_safetensors(floats)]


def _safetensors(arrays: dict[str, np.ndarray]) -> list[Base]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        safetensors_file.write(path, arrays, {"layout": "ours", "model": "none"})
        ours = path.read_bytes()
    return [
        Base("ours", ".safetensors", ours, None, True),
        Base("of others", ".safetensors", safetensors.numpy.save(arrays), None, False),
    ]


def judge(mutant: Mutant, path: Path, load: Load, original: WeightsFile, *, seconds: int = 10) -> str:
    """ "error" or "correct".

    Args:
        path: is (over)written with the mutant. What hostile pickles would touch is `canary_of(path)`.
        original: what `load` gave for the sound file.
        seconds: after which a reader hangs.

    Raises:
        Failure: anything else.
    """
    path.write_bytes(mutant.content)
    before = signal.signal(signal.SIGALRM, _ring)
    signal.alarm(seconds)
    try:
        found = load(path)
        for array in found.tensors.values():
            array.tobytes()
    except WeightsError as error:
        if path.name not in str(error) or not str(error).isprintable():
            raise Failure(f"the error does not name the file, or is not printable: {ascii(str(error))}") from error
        return "error"
    except _Hang:
        raise Failure(f"it hung for {seconds} s") from None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Failure(f"{type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        if canary_of(path).exists():
            canary_of(path).unlink()
            raise Failure("something in the file was executed")
    if not same(found, original):
        if not mutant.edited:
            raise Failure("other weights than the original, without an error")
        try:
            expected = independent(path)
        except Exception as error:
            raise Failure(f"it gave weights, but an independent reading fails: {error!r}") from error
        if not same(found, expected):
            raise Failure("other weights than an independent reading gives")
    return "correct"


def canary_of(path: Path) -> Path:
    return path.with_name("canary")


def _ring(*_):
    raise _Hang


def same(one: WeightsFile, other: WeightsFile) -> bool:
    return (
        one.layout == other.layout
        and one.facts == other.facts
        and one.tensors.keys() == other.tensors.keys()
        and all(_bits(array) == _bits(other.tensors[name]) for name, array in one.tensors.items())
    )


def _bits(array: np.ndarray) -> tuple:
    return array.dtype, array.shape, array.tobytes()


def independent(path: Path) -> WeightsFile:
    """Reads a file by other means, for mutants that have passed the reader under test: this one has no limits."""
    content = path.read_bytes()
    if content.startswith(b"PK"):
        tensors, facts = unwrap(_Unpickler(path).load(), path.name)
        return WeightsFile(str(path), "torch", tensors, {}, facts)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    metadata = header.pop("__metadata__", None) or {}
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype = {"BF16": ml_dtypes.bfloat16, "BOOL": np.bool_}.get(entry["dtype"])
        dtype = dtype or f"<{entry['dtype'][0].lower()}{int(entry['dtype'][1:]) // 8}"
        arrays[name] = np.frombuffer(content[start + begin : start + end], dtype).reshape(entry["shape"])
    layout = metadata["layout"] if metadata.get("format") == safetensors_file.FORMAT else "torch"
    if layout == "torch":
        arrays, _ = unwrap(arrays, path.name)
    return WeightsFile(str(path), layout, arrays, metadata, {})


class Name:
    """A stand-in for a Python object. Where nothing calls it, it stands for itself, as in the reader under test."""

    def __init__(self, value):
        self.value = value

    def __call__(self, *arguments):
        return self.value(*arguments)


class Storage:
    def __init__(self, values: np.ndarray):
        self.values = values


class _Unpickler(pickle._Unpickler):
    """Python's own machine; every name becomes a stand-in."""

    def __init__(self, path: Path):
        self._archive = zipfile.ZipFile(path)
        name = next(name for name in self._archive.namelist() if f"/{name}".endswith("/data.pkl"))
        self._prefix = name.removesuffix("data.pkl")
        super().__init__(self._archive.open(name))

    def load(self):
        with self._archive:
            return super().load()

    def find_class(self, module, name):
        if module == "torch" and name.endswith("Storage"):
            return Name(next(dtype for dtype, storage in STORAGES.items() if storage == name))
        if module == "torch" and name != "Size":
            return Name(next(dtype for dtype in UNTYPED if dtype.name == name))
        return Name(_STAND_INS[name])

    def persistent_load(self, pid):
        _, kind, key, _, numel = pid
        values = np.frombuffer(self._archive.read(f"{self._prefix}data/{key}"), kind.value)
        assert values.size == numel
        return Storage(values)

    def _new(self):
        arguments, name = self.stack.pop(), self.stack.pop()
        self.append(name(*arguments))

    def _drop_state(self):
        self.stack.pop()

    def _ignore_frame(self):
        self.read(8)

    dispatch = {
        **pickle._Unpickler.dispatch,
        pickle.NEWOBJ[0]: _new,
        pickle.BUILD[0]: _drop_state,
        pickle.FRAME[0]: _ignore_frame,
    }


def _strided(values: np.ndarray, offset, size, stride) -> np.ndarray:
    """Element by element, as the definition of a strided tensor says."""
    elements = np.empty(math.prod(size), values.dtype)
    for number, index in enumerate(np.ndindex(*size)):
        elements[number] = values[offset + sum(i * step for i, step in zip(index, stride, strict=True))]
    return elements.reshape(size)


_STAND_INS = {
    "OrderedDict": dict,
    "CfgNode": dict,
    "Size": tuple,
    "UntypedStorage": np.dtype(np.uint8),
    "set": set,
    "frozenset": frozenset,
    "bytes": bytes,
    "encode": lambda text, encoding: text.encode(encoding),
    "_rebuild_parameter": lambda array, *_: array,
    "_rebuild_tensor_v2": lambda storage, offset, size, stride, *_: _strided(storage.values, offset, size, stride),
    "_rebuild_tensor_v3": lambda storage, offset, size, stride, _, __, dtype, *___: _strided(
        storage.values.view(dtype.value), offset, size, stride
    ),
}
