"""Collectives of a compiled program: what its devices send each other, parsed from its HLO text.

The text is XLA's (https://openxla.org/xla/operation_semantics). An instruction is on one line:

    %name = f32[64,128]{1,0} all-reduce(%operand), channel_id=1, ..., metadata={op_name="jit(train_step)/..."}

or, if other instructions run meanwhile, a pair of `all-reduce-start` and `all-reduce-done`.
"""

import collections
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4}
BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(rf" = (\(.*?\)|\S+) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]<=|mesh\[([^\]]*)\][^{]*\{([^}]*)\})")
_AXIS = re.compile(r"('\w+')=(\d+)")
_PART = re.compile(r"('\w+')(?::\(\d+\)(\d+))?")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_SOURCE = re.compile(r'op_name="([^"]*)"')


class Collective(NamedTuple):
    """One instruction by which devices exchange data.

    Attributes:
        kind: one of `KINDS`.
        shapes: of its results on one device, with their dtypes: ("f32", (64, 128)).
        group: number of devices that exchange with each other; 0 if the text does not contain it.
        source: the name of the operation that it comes from.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    group: int
    source: str

    @property
    def bytes(self) -> int:
        """Bytes of the results on one device."""
        return math.ceil(sum(BYTES.get(dtype, 0) * math.prod(shape) for dtype, shape in self.shapes))

    @property
    def moved(self) -> float:
        """Least number of bytes that each device sends in a ring of its group."""
        n = self.group or 2
        share = {"all-reduce": 2 * (n - 1) / n, "all-gather": (n - 1) / n, "reduce-scatter": n - 1}
        share |= {"all-to-all": (n - 1) / n}
        return self.bytes * share.get(self.kind, 1.0)


def collectives(text: str) -> list[Collective]:
    """All collectives of a program. One inside a loop is listed once.

    TPU programs also have all-reduces whose result is sliced at once, in a computation called `all-reduce-scatter`:
    these are listed as reduce-scatters. And a TPU may split a collective into several steps, each fused with some
    arithmetic: these have one channel, and count as one.
    """
    found, computation, channels = [], "", set()
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[1]
        match = _INSTRUCTION.search(line)
        channel = _CHANNEL.search(line)
        if match is None or (channel and channel[1] in channels):
            continue
        if channel:
            channels.add(channel[1])
        result, kind, start = match.groups()
        shapes = [(d, tuple(int(n) for n in s.split(",") if n)) for d, s in _SHAPE.findall(_without_layouts(result))]
        if start and kind != "all-reduce":
            # (operands, results, and perhaps counters); of an all-reduce the results only.
            shapes = [shape for shape in shapes if shape[1] or shape[0] not in ("u32", "s32")]
            shapes = shapes[len(shapes) // 2 :]
        group = _group(line)
        if computation.startswith("all-reduce-scatter") and kind == "all-reduce":
            kind, shapes = "reduce-scatter", [(d, _cut(shape, group)) for d, shape in shapes]
        source = _SOURCE.search(line)
        found.append(Collective(kind, tuple(shapes), group, source[1] if source else ""))
    return found


def totals(found: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """The number of collectives of each kind, and the bytes of their results on one device."""
    counts: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    for item in found:
        count, size = counts[item.kind]
        counts[item.kind] = (count + 1, size + item.bytes)
    return dict(counts)


def _group(line: str) -> int:
    """Number of devices in each group. There are three notations.

    {{0,1},{2,3}}: all devices. [groups,size]<=[...]: numbers. mesh['a'=4,'b'=2] {'a'}: the axes that a group spans, or
    parts of them, 'a':(1)2.
    """
    match = _GROUPS.search(line)
    if match is None:
        return 0
    listed, size, mesh, axes = match.groups()
    if size:
        return int(size)
    if mesh:
        sizes = dict(_AXIS.findall(mesh))
        return math.prod(int(part or sizes[axis]) for axis, part in _PART.findall(axes))
    return len([number for number in listed.split(",") if number])


def _cut(shape: tuple[int, ...], group: int) -> tuple[int, ...]:
    """A 1-D shape with a fraction 1 / `group` of the elements."""
    return (-(-math.prod(shape) // max(group, 1)),)


def _without_layouts(result: str) -> str:
    return re.sub(r"\{[^{}]*\}", "", result)
