"""The pickle inside a PyTorch checkpoint, interpreted against a closed list: nothing is imported, and nothing called.

A pickle is a program for a small stack machine, and Python's own machine imports and calls whatever the program names.
This one knows the opcodes that `torch.save` emits for plain data and the few names in `_NAMES`; everything else is an
error. The work and the memory that a file can cause are at most in proportion to its own size.

The format is described in `pickletools`, the encoding of tensors in `torch._utils` and `torch.serialization`.
"""

import dataclasses
import pickletools
from collections.abc import Callable
from typing import NoReturn

import ml_dtypes
import numpy as np

from polaformer_jax.errors import WeightsError

_STORAGES = {
    "torch.FloatStorage": np.float32,
    "torch.DoubleStorage": np.float64,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": ml_dtypes.bfloat16,
    "torch.LongStorage": np.int64,
    "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16,
    "torch.CharStorage": np.int8,
    "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
    "torch.ComplexFloatStorage": np.complex64,
    "torch.ComplexDoubleStorage": np.complex128,
    "torch.storage.UntypedStorage": np.uint8,  # with the types below, which have no storage class of their own
}
_DTYPES = {"torch.uint16": np.uint16, "torch.uint32": np.uint32, "torch.uint64": np.uint64}
_SETS = {  # under the names of Python 3 and of Python 2, which protocol 2 writes
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "__builtin__.set": set,
    "__builtin__.frozenset": frozenset,
}
_CONFIG = "yacs.config.CfgNode"
_NAMES = {
    "collections.OrderedDict",
    "torch.Size",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    _CONFIG,
    "_codecs.encode",  # protocol 2 writes bytes as text and its encoding
    "__builtin__.bytes",
    *_SETS,
    *_STORAGES,
    *_DTYPES,
}

_LARGEST = 16 << 20  # bytes; the pickle of the largest official model with its optimizer has less than 1 MiB
_MOST_STEPS = 1_000_000  # opcodes, axes of tensors, items of sets; the same pickle has about 100,000
_LARGEST_INTEGER = 1 << 64  # larger ones have no use here, and long integers with equal hashes make dicts slow
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_CONTAINERS = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_KEYS = (str, int, float, bool, bytes, type(None))  # tuples with equal hashes are easy to make, and as slow


@dataclasses.dataclass(frozen=True, slots=True)
class Name:
    """A Python object of the closed list, only by its name."""

    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """Where the file keeps the numbers of one or more tensors.

    Attributes:
        key: of its record in the archive.
        dtype: type of its elements.
        numel: their number.
    """

    key: str
    dtype: np.dtype
    numel: int


MakeTensor = Callable[[Storage, np.dtype, int, tuple, tuple], np.ndarray]


def interpret(data: bytes, make_tensor: MakeTensor, *, source: str) -> object:
    """What the pickle describes: dicts, lists, tuples, sets, scalars, and what `make_tensor` returned for tensors.

    Ordered dicts and configs (`CfgNode`) become plain dicts; attributes of either are dropped. A name of the closed
    list that is not called, or a storage without a tensor, remains a `Name` or a `Storage`.

    Args:
        make_tensor: called with a tensor's storage, type, offset into the storage, shape and strides (in elements).
            These are non-negative integers, with one stride per axis; nothing else about them has been checked.
        source: names the file in errors.

    Raises:
        WeightsError: the pickle names anything else, or is damaged.
    """
    if len(data) > _LARGEST:
        raise WeightsError(
            f"{source}: its pickle has {len(data):,} bytes, expected at most {_LARGEST:,}: it is not a checkpoint "
            "of tensors; load it in PyTorch and save the state_dict only"
        )
    machine = _Machine(make_tensor, source)
    try:
        for opcode, argument, position in pickletools.genops(data):
            machine.position = position
            machine.step(opcode.name, argument)
    except WeightsError:
        raise
    except (ValueError, OverflowError, IndexError, KeyError) as error:  # of genops: text, lengths, no STOP
        machine.damaged(f"cannot be decoded ({ascii(str(error))[1:-1][:200]})")
    if machine.position + 1 != len(data):
        machine.damaged(f"ends {len(data) - machine.position - 1} bytes before the end of its record")
    return machine.result


class _Machine:
    """The stack machine. Containers are filled in place, so that shared and cyclic ones cost nothing extra."""

    def __init__(self, make_tensor: MakeTensor, source: str):
        self.make_tensor = make_tensor
        self.source = source
        self.position = 0
        self.steps = 0
        self.stack = []
        self.outer = []  # the stacks below each mark
        self.memo = {}  # a dict, not a list: an index may be any number, and must not allocate memory
        self.result = None

    def damaged(self, what: str) -> NoReturn:
        raise WeightsError(
            f"{self.source} is damaged, or not written by torch.save: its pickle {what} (byte {self.position}); "
            "fetch it again, or load it in PyTorch and save the state_dict only"
        )

    def refuse(self, what: str) -> NoReturn:
        raise WeightsError(
            f"{self.source}: {what}; weights files do not need this. It is refused, and nothing was executed. "
            "If you trust the file, load it in PyTorch (weights_only=False) and save the state_dict only"
        )

    def step(self, opcode: str, argument: object) -> None:
        self.charge(1)
        if (opcode == "PROTO") != (self.position == 0):
            self.damaged(f"has the opcode {opcode}, where PROTO is expected first and never again")
        match opcode:
            case "BINGET" | "LONG_BINGET":
                if argument not in self.memo:
                    self.damaged(f"recalls the object {argument}, which it has not stored")
                self.stack.append(self.memo[argument])
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.top()
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.top()
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4":
                if abs(argument) >= _LARGEST_INTEGER:
                    self.damaged(f"has an integer of {argument.bit_length()} bits, expected at most 64")
                self.stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                argument.encode()  # half of a surrogate pair could not be printed: a ValueError
                self.stack.append(argument)
            case "BINFLOAT" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8":
                self.stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self.stack.append(_CONSTANTS[opcode])
            case "MARK":
                self.outer.append(self.stack)
                self.stack = []
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [self.pop() for _ in range(_TUPLES[opcode])]
                self.stack.append(tuple(reversed(items)))
            case "TUPLE":
                items = self.pop_to_mark()
                self.stack.append(tuple(items))
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                self.stack.append(_CONTAINERS[opcode]())
            case "APPEND":
                item = self.pop()
                self.top(list).append(item)
            case "APPENDS":
                items = self.pop_to_mark()
                self.top(list).extend(items)
            case "SETITEM":
                value, key = self.pop(), self.pop()
                self.top(dict)[self.key(key)] = value
            case "SETITEMS":
                items = self.pop_to_mark()
                if len(items) % 2:
                    self.damaged("has a key without a value")
                target = self.top(dict)
                for key, value in zip(items[::2], items[1::2], strict=True):
                    target[self.key(key)] = value
            case "ADDITEMS":
                items = self.pop_to_mark()
                self.top(set).update(self.key(item) for item in items)
            case "FROZENSET":
                items = self.pop_to_mark()
                self.stack.append(frozenset(self.key(item) for item in items))
            case "GLOBAL":  # genops joins module and name with a space
                self.stack.append(self.known(".".join(argument.split(" "))))
            case "STACK_GLOBAL":
                name, module = self.pop(str), self.pop(str)
                self.stack.append(self.known(f"{module}.{name}"))
            case "BINPERSID":
                self.stack.append(self.storage(self.pop()))
            case "REDUCE":
                arguments, name = self.pop(tuple), self.pop(Name)
                self.stack.append(self.build(name.name, arguments))
            case "NEWOBJ":
                arguments, name = self.pop(tuple), self.pop(Name)
                if name.name != _CONFIG or arguments:
                    self.damaged(f"creates a {name.name} in a way that PyTorch does not")
                self.stack.append({})
            case "BUILD":  # attributes: `_metadata` of a state_dict, `__immutable__` and the like of a CfgNode
                self.pop()
                self.top(dict)
            case "PROTO":
                if not 2 <= argument <= 5:
                    self.damaged(f"is of protocol {argument}, expected 2 to 5")
            case "FRAME":
                pass
            case "STOP":
                self.result = self.pop()
                if self.stack or self.outer:
                    self.damaged("leaves objects unused")
            case _:
                about = f" for {ascii(argument)[:200]}" if isinstance(argument, str) else ""
                self.refuse(f"its pickle has the opcode {opcode}{about} (byte {self.position})")

    def charge(self, steps: int) -> None:
        self.steps += steps
        if self.steps > _MOST_STEPS:
            raise WeightsError(
                f"{self.source}: its pickle takes more than {_MOST_STEPS:,} steps: it is not a checkpoint of tensors; "
                "load it in PyTorch and save the state_dict only"
            )

    def top(self, kind: type = object):
        if not self.stack:
            self.damaged("needs an object where there is none")
        if not isinstance(self.stack[-1], kind):
            self.damaged(f"has a {type(self.stack[-1]).__name__} where a {kind.__name__} is expected")
        return self.stack[-1]

    def pop(self, kind: type = object):
        self.top(kind)
        return self.stack.pop()

    def pop_to_mark(self) -> list:
        if not self.outer:
            self.damaged("goes back to a mark that it has not set")
        items, self.stack = self.stack, self.outer.pop()
        return items

    def key(self, key: object):
        if type(key) not in _KEYS:
            self.damaged(f"has a {type(key).__name__} as the key of a dict or in a set, expected text or a number")
        return key

    def known(self, name: str) -> Name:
        if name not in _NAMES:
            self.refuse(f"the file refers to the Python object {ascii(name)[1:-1][:200]}")
        return Name(name)

    def storage(self, identifier: object) -> Storage:
        match identifier:
            case ("storage", Name(kind), str(key), str(), int(numel)) if kind in _STORAGES and _is_count(numel):
                return Storage(key, np.dtype(_STORAGES[kind]), numel)
        self.damaged("has a persistent object that is not the storage of a tensor")

    def build(self, name: str, arguments: tuple) -> object:
        """What the call of a listed name would return."""
        match name.removeprefix("torch._utils."), arguments:
            case "_rebuild_tensor_v2", (Storage() as storage, offset, size, stride, _, _, *rest) if len(rest) <= 1:
                return self.tensor(storage, storage.dtype, offset, size, stride, *rest)
            case "_rebuild_tensor_v3", (Storage() as storage, offset, size, stride, _, _, Name(dtype), *rest) if (
                dtype in _DTYPES and len(rest) <= 1
            ):
                return self.tensor(storage, np.dtype(_DTYPES[dtype]), offset, size, stride, *rest)
            case "_rebuild_parameter", (np.ndarray() as array, _, _):
                return array
            case "torch.Size", (tuple() as size,):
                return size
            case "collections.OrderedDict", ():
                return {}
            case "_codecs.encode", (str() as text, "latin1"):
                self.charge(len(text) // 64)  # one text may become many bytes
                return text.encode("latin1")
            case "__builtin__.bytes", ():
                return b""
            case kind, (list() as items,) if kind in _SETS:
                self.charge(len(items))  # one list may become many sets
                return _SETS[kind](self.key(item) for item in items)
        self.damaged(f"calls {name} with arguments that PyTorch does not give it")

    def tensor(self, storage: Storage, dtype: np.dtype, offset, size, stride, flags=None) -> np.ndarray:
        if flags:
            self.refuse("it has a tensor that PyTorch is to conjugate or negate (resolve_conj() gives a plain one)")
        if not (_is_count(offset) and _are_counts(size) and _are_counts(stride) and len(size) == len(stride)):
            self.damaged("has a tensor whose offset, shape and strides are not integers from 0, or do not match")
        self.charge(len(size))
        return self.make_tensor(storage, dtype, offset, size, stride)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _are_counts(values: object) -> bool:
    return isinstance(values, tuple) and len(values) <= 64 and all(map(_is_count, values))
