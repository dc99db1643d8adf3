"""Ways to spoil a file of weights, seeded: `mutant(bases, seed, index)` gives the same file for ever.

A mutation either leaves the file's checksums as they were, and then a reader may give the original tensors or an error;
or it repairs them ("edited"), as a hostile author would, and then it may also give what the edited file really says.
"""

import copy
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tests.support.torch_files import archive


class Base(NamedTuple):
    """A sound file.

    Attributes:
        records: of a `.pth` file: (name, data) as they were packed; None for `.safetensors`.
        checked: whether the file has checksums.
    """

    name: str
    suffix: str
    content: bytes
    records: tuple[tuple[str, bytes], ...] | None
    checked: bool


class Mutant(NamedTuple):
    kind: str
    base: Base
    content: bytes
    edited: bool


class _Mutation(NamedTuple):
    suffix: str | None  # of the files that it fits; None: any
    edited: bool
    apply: Callable[[random.Random, Base, str], bytes]


MUTATIONS: dict[str, _Mutation] = {}


def mutant(bases: list[Base], seed: int, index: int, canary: str) -> Mutant:
    """The mutated file number `index`; kinds take turns. Hostile pickles among them would touch the file `canary`."""
    suffixes = {None, *(base.suffix for base in bases)}
    kinds = [kind for kind, mutation in MUTATIONS.items() if mutation.suffix in suffixes]
    kind = kinds[index % len(kinds)]
    rng = random.Random(f"{seed}:{index}")
    suffix, edited, apply = MUTATIONS[kind]
    base = rng.choice([base for base in bases if suffix in (None, base.suffix)])
    return Mutant(kind, base, apply(rng, base, canary), edited or not base.checked)


def mutation(kind: str, *, suffix: str | None = None, edited: bool = False):
    """Adds a function of (rng, base, canary) to the mutations."""

    def register(function):
        MUTATIONS[kind] = _Mutation(suffix, edited, function)
        return function

    return register


# --- any file


@mutation("bits flipped")
def _flip(rng, base, canary):
    content = bytearray(base.content)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


@mutation("bits of headers flipped")
def _flip_headers(rng, base, canary):
    content = bytearray(base.content)
    if base.suffix == ".pth":
        signature = rng.choice([b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"])
        start = rng.choice(_all(base.content, signature))
        stop = min(start + 46, len(content))
    else:
        start, stop = 0, 8 + int.from_bytes(base.content[:8], "little")
    for _ in range(rng.choice([1, 1, 1, 3])):
        content[rng.randrange(start, stop)] ^= 1 << rng.randrange(8)
    return bytes(content)


@mutation("truncated")
def _truncate(rng, base, canary):
    return base.content[: rng.choice([rng.randrange(len(base.content)), len(base.content) - rng.randrange(1, 64)])]


@mutation("bytes inserted, removed, moved")
def _splice(rng, base, canary):
    content, start = base.content, rng.randrange(len(base.content))
    length = rng.choice([1, 4, 64, 1000])
    part = content[start : start + length]
    match rng.randrange(5):
        case 0:
            return content[:start] + rng.randbytes(length) + content[start:]
        case 1:
            return content[:start] + content[start + length :]
        case 2:
            return content[:start] + bytes(len(part)) + content[start + length :]
        case 3:
            return content[:start] + part + content[start:]
    target = rng.randrange(len(content) - len(part) + 1)
    return content[:target] + part + content[target + len(part) :]


# --- .pth: headers of the archive

_NUMBERS = (0, 1, 2, 8, 0x7F, 0xFF, 0x808, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


@mutation("lying archive headers", suffix=".pth")
def _lie(rng, base, canary):
    """Fields of local headers, the directory and its end, set to odd values or moved a little."""
    content = bytearray(base.content)
    layouts = {
        b"PK\x03\x04": ("<H", (4, 6, 8, 10, 26, 28)),
        b"PK\x01\x02": ("<H", (4, 6, 8, 10, 28, 30, 32, 34, 36)),
        b"PK\x05\x06": ("<H", (4, 6, 8, 10, 20)),
    }
    wide = {b"PK\x03\x04": (14, 18, 22), b"PK\x01\x02": (16, 20, 24, 42), b"PK\x05\x06": (12, 16)}
    for _ in range(rng.choice([1, 1, 2])):
        signature = rng.choice(list(layouts))
        start = rng.choice(_all(base.content, signature))
        form, offsets = rng.choice([layouts[signature], ("<I", wide[signature])])
        position = start + rng.choice(offsets)
        before = struct.unpack_from(form, content, position)[0]
        value = rng.choice([*_NUMBERS, before + rng.randrange(-70, 70), before * 2])
        struct.pack_into(form, content, position, value % (1 << 8 * struct.calcsize(form)))
        if form == "<I" and signature == b"PK\x01\x02" and rng.random() < 0.5:  # both sizes alike
            struct.pack_into("<II", content, start + 20, *[value % (1 << 32)] * 2)
    return bytes(content)


@mutation("records doubled or lost", suffix=".pth")
def _double(rng, base, canary):
    records = list(base.records)
    name, data = rng.choice(records)
    match rng.randrange(4):
        case 0:
            records.insert(rng.randrange(len(records) + 1), (name, data))
        case 1:
            records.insert(rng.randrange(len(records) + 1), (name, rng.randbytes(len(data))))
        case 2:
            records.remove((name, data))
        case 3:
            records.append((f"other/{name.rsplit('/', 1)[-1]}", data))
    return archive(records)


@mutation("records overlapping", suffix=".pth")
def _overlap(rng, base, canary):
    """Directory entries that point at the header of another record."""
    content = bytearray(base.content)
    one, other = rng.sample(_all(base.content, b"PK\x01\x02"), 2)
    content[one + 42 : one + 46] = content[other + 42 : other + 46]
    if rng.random() < 0.5:
        content[one + 16 : one + 28] = content[other + 16 : other + 28]
    return bytes(content)


@mutation("records compressed", suffix=".pth")
def _compress(rng, base, canary):
    file = io.BytesIO()
    methods = [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
    with zipfile.ZipFile(file, "w") as target:
        for name, data in base.records:
            target.writestr(name, data, compress_type=rng.choice([zipfile.ZIP_STORED] * 3 + methods))
    return file.getvalue()


@mutation("records renamed", suffix=".pth", edited=True)
def _rename(rng, base, canary):
    records = list(base.records)
    at = rng.randrange(len(records))
    name, data = records[at]
    other = rng.choice(
        [name[:-1], name + "x", "../" + name, "/" + name, name.upper(), "", "ü" + name, rng.choice(records)[0]]
    )
    records[at] = (other, data)
    return archive(records)


@mutation("storages swapped or spoilt", suffix=".pth", edited=True)
def _swap(rng, base, canary):
    records = list(base.records)
    one, other = rng.sample([at for at, (name, _) in enumerate(records) if "/data/" in name], 2)
    (first, a), (second, b) = records[one], records[other]
    match rng.randrange(3):
        case 0:
            records[one], records[other] = (first, b), (second, a)
        case 1:
            records[one] = (first, rng.randbytes(len(a)))
        case 2:
            records[one] = (first, rng.randbytes(rng.choice([0, 1, len(a) + 1, 2 * len(a)])))
    return archive(records)


# --- .safetensors


@mutation("safetensors: lying header", suffix=".safetensors")
def _header(rng, base, canary):
    length = int.from_bytes(base.content[:8], "little")
    sound, data = json.loads(base.content[8 : 8 + length]), base.content[8 + length :]
    header = dict(sound)
    names = [name for name in header if name != "__metadata__"]
    for name in rng.sample(names, rng.choice([1, 1, 2])):
        entry = header[name] = copy.deepcopy(sound[name])
        odd = rng.choice([-1, 0, 1, 2, 7, 2**31, 2**63, 2**64, 2**200, 1.5, None, "4", [], True])
        match rng.randrange(8):
            case 0:
                entry["data_offsets"][rng.randrange(2)] = odd
            case 1:
                entry["data_offsets"] = rng.choice([sound[rng.choice(names)]["data_offsets"], [], [0], odd, [2, 1]])
            case 2:
                entry["dtype"] = rng.choice(["F16", "F64", "I32", "F8_E4M3", "BOOL", "F32 ", "", "U16", odd])
            case 3 if entry["shape"]:
                entry["shape"][rng.randrange(len(entry["shape"]))] = odd
            case 4:
                entry["shape"] = rng.choice(
                    [entry["shape"][::-1], entry["shape"] + [1], [], odd, [1] * 100, [2**62] * 3]
                )
            case 5:
                header[rng.choice([name + "x", "", "\ud800", name * 100, rng.choice(names)])] = entry
            case 6:
                metadata = header["__metadata__"] = dict(sound.get("__metadata__", {}))
                metadata[rng.choice([*metadata, "format", "x"])] = rng.choice(["torch", "", "0" * 8, odd])
            case 7:
                entry[rng.choice(["dtype", "shape", "data_offsets", "x"])] = odd
    return _with_header(json.dumps(header).encode(), data)


@mutation("safetensors: odd header", suffix=".safetensors")
def _odd_header(rng, base, canary):
    length = int.from_bytes(base.content[:8], "little")
    text, data = base.content[8 : 8 + length], base.content[8 + length :]
    match rng.randrange(6):
        case 0:
            claimed = rng.choice([0, 1, length - 1, length + 1, len(base.content), 10**8, 2**31, 2**63, 2**64 - 1])
            return claimed.to_bytes(8, "little") + text + data
        case 1:
            return _with_header(text + b" " * rng.randrange(100), data)
        case 2:
            return _with_header(b"[" * rng.choice([1, 1000, 100_000]), data)
        case 3:
            return _with_header(text[:-8].replace(b'"shape":[', b'"shape":[' + b"[" * rng.randrange(2000), 1), data)
        case 4:
            return _with_header(rng.choice([b"{}", b"null", b"[]", b'{"a":{}}', b'{"a":1}', b"\xff\xfe", b""]), data)
    first = text.index(b'"dtype"')
    return _with_header(text[:first] + text[first : first + 40] + text[first:], data)


def _with_header(text: bytes, data: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def _all(content: bytes, signature: bytes) -> list[int]:
    positions = np.flatnonzero(np.frombuffer(content, np.uint8) == signature[0])
    return [int(at) for at in positions if content.startswith(signature, at)]
