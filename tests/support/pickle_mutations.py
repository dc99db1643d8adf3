"""Ways to spoil the pickle in a `.pth` file, with the archive around it sound: added to `tests.mutations`."""

import pickletools
import struct

from tests.support.mutations import mutation
from tests.support.torch_files import archive


def _pickle_mutation(kind: str):
    def register(function):
        def apply(rng, base, canary):
            at = next(at for at, (name, _) in enumerate(base.records) if name.endswith("/data.pkl"))
            name, data = base.records[at]
            return archive([*base.records[:at], (name, function(rng, data, canary)), *base.records[at + 1 :]])

        return mutation(kind, suffix=".pth", edited=True)(apply)

    return register


def _opcodes(pickled: bytes) -> list[tuple[str, bytes]]:
    """The name and the bytes of each opcode."""
    found = [(opcode.name, position) for opcode, _, position in pickletools.genops(pickled)]
    ends = [position for _, position in found[1:]] + [len(pickled)]
    return [(name, pickled[start:end]) for (name, start), end in zip(found, ends, strict=True)]


@_pickle_mutation("pickle: bytes changed")
def _pickle_bytes(rng, pickled, canary):
    content = bytearray(pickled)
    for _ in range(rng.choice([1, 1, 2, 5])):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


@_pickle_mutation("pickle: opcodes swapped")
def _pickle_opcodes(rng, pickled, canary):
    opcodes = [data for _, data in _opcodes(pickled)]
    for _ in range(rng.choice([1, 1, 2, 5])):
        one, other = rng.randrange(len(opcodes)), rng.randrange(len(opcodes))
        match rng.randrange(4):
            case 0:
                opcodes[one], opcodes[other] = opcodes[other], opcodes[one]
            case 1:
                opcodes[one] = opcodes[other]
            case 2:
                opcodes.insert(one, opcodes[other])
            case 3 if len(opcodes) > 1:
                del opcodes[one]
    return b"".join(opcodes)


@_pickle_mutation("pickle: integers changed")
def _pickle_integers(rng, pickled, canary):
    opcodes = _opcodes(pickled)
    numbers = [at for at, (name, _) in enumerate(opcodes) if name.startswith("BININT")]
    content = [data for _, data in opcodes]
    for _ in range(rng.choice([1, 1, 2, 5])):
        exponent = rng.choice([8, 16, 31, 32, 33, 62, 63, 64, 65, 200, 1000])
        value = rng.choice([0, 1, 2, 3, -1, rng.randrange(-20, 2000), 2**exponent, -(2**exponent), 2**exponent - 1])
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        content[rng.choice(numbers)] = b"\x8a" + bytes([len(data)]) + data
    return b"".join(content)


_HOSTILE = (
    "os system",
    "posix system",
    "subprocess call",
    "builtins eval",
    "builtins exec",
    "__builtin__ eval",
    "builtins getattr",
    "builtins __import__",
    "torch load",
    "torch.hub load",
    "numpy load",
    "pickle loads",
    "_pickle loads",
    "importlib import_module",
    "runpy run_path",
    "ctypes CDLL",
    "collections OrderedDict.fromkeys",
    "os.path join",
)
_LISTED = (  # the reader knows these, in their places
    "collections OrderedDict",
    "yacs.config CfgNode",
    "torch LongStorage",
    "torch HalfStorage",
    "torch Size",
    "torch uint16",
    "torch.storage UntypedStorage",
    "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_parameter",
    "__builtin__ set",
    "_codecs encode",
)


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _named(rng, name: str) -> bytes:
    module, name = name.split(" ")
    return rng.choice([f"c{module}\n{name}\n".encode(), _text(module) + _text(name) + b"\x93"])


@_pickle_mutation("pickle: other objects named")
def _pickle_names(rng, pickled, canary):
    opcodes = _opcodes(pickled)
    content = [data for _, data in opcodes]
    names = [at for at, (name, _) in enumerate(opcodes) if name in ("GLOBAL", "STACK_GLOBAL")]
    at = rng.choice(names)
    if opcodes[at][0] == "STACK_GLOBAL":  # the module and the name lie on the stack, and are dropped
        content[at] = b"\x86" + rng.choice([b"0", b"\x85", b""])
    else:
        content[at] = b""
    content[at] += _named(rng, rng.choice([*_HOSTILE, *_LISTED]))
    return b"".join(content)


@_pickle_mutation("pickle: hostile calls")
def _pickle_calls(rng, pickled, canary):
    """Calls that would leave a trace, put where a value stands, before the end, or alone."""
    command = rng.choice([f"touch {canary}", f"open({canary!r}, 'w')"])
    name = rng.choice(_HOSTILE)
    call = rng.choice(
        [
            _named(rng, name) + _text(command) + b"\x85R",
            b"(" + _text(command) + f"i{name.replace(' ', chr(10))}\n".encode(),
            b"(" + _named(rng, name) + _text(command) + b"o",
            _named(rng, name) + _text(command) + b"\x85\x81",
            _named(rng, name) + _text(command) + b"\x85}\x92",
            b"ccollections\nOrderedDict\n)R}" + _text("__reduce__") + _named(rng, name) + b"sb",
            _text("storage") + _named(rng, name) + _text("0") + _text("cpu") + b"K\x01(ttQ",
        ]
    )
    opcodes = [data for _, data in _opcodes(pickled)]
    values = [
        at for at, (name, _) in enumerate(_opcodes(pickled)) if name in ("NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT")
    ]
    match rng.randrange(4):
        case 0:
            opcodes[rng.choice(values)] = call
        case 1:
            opcodes.insert(len(opcodes) - 1, _text("model") + call + b"s")
        case 2:
            opcodes.insert(rng.randrange(1, len(opcodes)), call)
        case 3:
            opcodes = [opcodes[0], call, b"."]
    return b"".join(opcodes)


@_pickle_mutation("pickle: bombs")
def _pickle_bombs(rng, pickled, canary):
    """Whatever grows out of proportion, or refers to itself."""
    count = rng.choice([10, 1000, 30_000])
    bomb = rng.choice(
        [
            b"(" * count,
            b"]" * count + b"a" * (count - 1),
            b"}" + _text("model") + b"r\xff\xff\xff\xff0",
            b"}r\xff\xff\xff\x7f",
            b"}q\x00" + _text("model") + b"h\x00s",
            b"}q\x00" + _text("module") + b"h\x00s" + _text("config") + b"h\x00s",
            b"]q\x00h\x00a",
            b"K\x01" + b"q\x00h\x00\x86" * min(count, 1000),
            b"]q\x00" + b"(h\x00h\x00eh\x00" * min(count, 1000),
            b"\x8b\xff\xff\xff\x7f",
            b"\x8e" + b"\xff" * 8 + b"abc",
            b"\x8d\0\0\0\0\0\0\0\x7f",
            b"}" + _text("config") + b"]" * count + b"a" * (count - 1) + b"s",
            b"}(" + b"".join(_text(f"a{i}") + b"N" for i in range(count)) + b"u",
        ]
    )
    return b"\x80\x02" + bomb + b"."
