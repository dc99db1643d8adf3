"""The text of a compiled program (XLA's HLO), parsed: computations, instructions, arrays and how they lie in memory.

An instruction is on one line, or a few (https://openxla.org/xla/operation_semantics)::

    %name = bf16[8,48]{1,0:T(8,128)(2,1)S(1)} fusion(%a, %b), kind=kLoop, calls=%body, metadata={op_name="jit(f)/mul"}

After its dimensions an array has its layout (https://openxla.org/xla/shapes): the axes from the innermost to the
outermost; `T(8,128)`, the tile that the innermost axes are cut into, where a second tile only orders what is inside
the first; and `S(1)`, the memory that it lies in, where that is not the device's main memory.
"""

import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) ")
_END = re.compile(r"\}(, execution_thread=.*)?$")
_NAME = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_INDEX = re.compile(r"/\*index=\d+\*/")
_BITS = re.compile(r"[a-z]+(\d+)")
_OPERAND = re.compile(r"%?([\w.\-]+)$")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TWO_BRANCHES = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")


@functools.cache
def bytes_of(dtype: str) -> float:
    """Bytes of one element: "bf16", "pred", "s4", ...; tokens and opaque values have none."""
    if dtype in ("token", "opaque"):
        return 0
    if dtype == "pred":
        return 1
    if match := _BITS.match(dtype):
        return int(match[1]) / 8
    raise ValueError(f"{dtype!r} is no type of an array in a compiled program")


class Array(NamedTuple):
    """An array of a compiled program.

    Attributes:
        dtype: XLA's name, such as "bf16".
        shape: its dimensions.
        order: the axes from the innermost to the outermost; empty if the text does not say.
        tile: what the innermost axes are padded to multiples of, the outermost of them first; empty: not tiled.
        space: number of the memory that it lies in; 0 is the device's main memory.
    """

    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        """Bytes of its elements."""
        return self.elements * bytes_of(self.dtype)

    @property
    def padded_bytes(self) -> float:
        """Bytes that it takes in memory, whole tiles."""
        if not self.tile or not self.order:
            return self.bytes
        sizes = [self.shape[axis] for axis in self.order]  # the innermost first
        sizes += [1] * (len(self.tile) - len(sizes))
        for i, side in enumerate(reversed(self.tile)):
            sizes[i] = -(-sizes[i] // side) * side
        return math.prod(sizes) * bytes_of(self.dtype)


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        arrays: those of its result, of a tuple all.
        operands: names of instructions of the same computation; of a parameter its number, of a constant its value.
        attributes: the text after the operands.
        is_root: whether its result is that of the computation.
        is_tuple: whether its result is a tuple.
    """

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool
    is_tuple: bool

    def called(self, attribute: str) -> str | None:
        """Name of the computation in an attribute such as `calls`."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found and found[1]

    @property
    def branches(self) -> list[str]:
        """Names of the computations of a conditional."""
        if found := _BRANCHES.search(self.attributes):
            return [name.strip().lstrip("%") for name in found[1].split(",")]
        return _TWO_BRANCHES.findall(self.attributes)

    @property
    def op_name(self) -> str:
        """The operation of the traced program that it comes from, with the scopes around it; often empty."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""


class Computation:
    """Instructions by name, in the order in which they run where the program is scheduled."""

    def __init__(self, instructions: Iterable[Instruction]):
        self.instructions = {item.name: item for item in instructions}

    @functools.cached_property
    def root(self) -> Instruction:
        return next(item for item in self.instructions.values() if item.is_root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(item.operands[0]): item for item in self.instructions.values() if item.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """For each instruction those that use it, and as which operand."""
        found: dict[str, list[tuple[Instruction, int]]] = {name: [] for name in self.instructions}
        for item in self.instructions.values():
            for i, operand in enumerate(item.operands):
                if operand in found:
                    found[operand].append((item, i))
        return found

    def arrays(self, name: str) -> tuple[Array, ...]:
        """Those of an instruction's result."""
        return self.instructions[name].arrays if name in self.instructions else ()


class Program:
    """A compiled program.

    Attributes:
        computations: by name.
        entry: the computation that is the program.

    Raises:
        ValueError: the text is not that of a compiled program.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        entry = None
        lines = iter(text.splitlines())
        for line in lines:
            if not line or line[0].isspace() or not line.endswith("{"):
                continue
            is_entry, name = _HEADER.match(line).groups()
            inside = itertools.takewhile(lambda line: not _END.match(line), lines)
            self.computations[name] = Computation(map(_parsed, _joined(inside)))
            if is_entry:
                entry = name
        if entry is None:
            raise ValueError("not the text of a compiled program: it has no ENTRY computation")
        self.entry = self.computations[entry]


def _joined(lines: Iterable[str]) -> Iterator[str]:
    """One line for each instruction; the metadata of kernels has line breaks."""
    parts: list[str] = []
    for line in lines:
        if parts and _NAME.match(line):
            yield "".join(parts)
            parts = []
        parts.append(line)
    if parts:
        yield "".join(parts)


@functools.lru_cache(maxsize=1 << 14)
def arrays_of(text: str) -> tuple[Array, ...]:
    """All arrays of the text of a shape, which may be a tuple of tuples."""
    return tuple(_array(*match.groups()) for match in _ARRAY.finditer(text))


def _array(dtype: str, dimensions: str, layout: str | None) -> Array:
    shape = tuple(int(size.removeprefix("<=")) for size in dimensions.split(",") if size)
    order, _, rest = (layout or "").partition(":")
    tile, space = _TILE.search(rest), _SPACE.search(rest)
    return Array(
        dtype,
        shape,
        tuple(int(axis) for axis in order.split(",") if axis),
        tuple(int(side) for side in tile[1].split(",")) if tile else (),
        int(space[1]) if space else 0,
    )


def _parsed(line: str) -> Instruction:
    head = _NAME.match(line)
    shape, rest = _shape(line, head.end())
    opcode = _OPCODE.match(line, rest)
    end = _closing(line, opcode.end() - 1)
    return Instruction(
        name=head[2],
        arrays=arrays_of(_INDEX.sub("", shape)),
        opcode=opcode[1],
        operands=tuple(_operands(line[opcode.end() : end])),
        attributes=line[end + 1 :],
        is_root=head[1] is not None,
        is_tuple=shape.startswith("("),
    )


def _shape(line: str, start: int) -> tuple[str, int]:
    """The text of the result's shape, and where it ends."""
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    return line[start:end], end


def _operands(text: str) -> list[str]:
    """Names of operands, between commas outside of brackets; `f32[2]{0} %a` is `a`."""
    if not text:
        return []
    parts = _INDEX.sub("", text).split(",") if "(" not in text and "{" not in text else _split(_INDEX.sub("", text))
    stripped = (part.strip() for part in parts)
    return [found[1] if (found := _OPERAND.search(part)) else part for part in stripped]


def _split(text: str) -> list[str]:
    """Parts between the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


_PARENTHESIS = re.compile(r"[()]")


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` is closed."""
    depth = 0
    for match in _PARENTHESIS.finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"a parenthesis is not closed: {text[:200]}")
