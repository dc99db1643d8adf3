"""Bytes that a compiled program moves between a device and its memory, instruction by instruction.

Each instruction that runs - of the entry, of what it calls, of loop bodies as often as they run where that is known,
else once, of a conditional those of the branch that moves most - reads its operands and writes its results once, as
far as they lie in the device's memory, and as large as they are there: in whole tiles. XLA's own count
(`cost_analysis`) includes arrays that stay on the chip, and neither padding nor repetitions of loops. Exceptions:

- What only names memory moves nothing: tuples, bitcasts, parameters, the ends of asynchronous instructions.
- Slices and gathers read what they return. So does a fusion that uses an operand only through slices.
- Updates in place (dynamic-update-slice, scatter) write the update, and what is left stays where it is. So do fusions
  whose result is one.
- Asynchronous instructions count where they start.
- A kernel (custom call) reads operands as often as its metadata says: `pallas_call(metadata={"reads": "1 2"})`, one
  number for each operand. Without them it moves every array once, or more if its cost estimate says so.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from polaformer_jax.aot.hlo import Array, Computation, Instruction, Program
from polaformer_jax.aot.loops import trips

# These name memory, or end what has been counted where it started.
_NAMING = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "optimization-barrier",
    "add-dependency",
    "domain",
    "send",
    "recv",
}
_SLICES = {"slice", "dynamic-slice", "gather"}
_UPDATES = {"dynamic-update-slice", "scatter"}
# Whose results depend on other elements than those in the same place, though they may be as many.
_NO_ELEMENT_BY_ELEMENT = {
    *("reduce", "dot", "convolution", "custom-call", "sort", "scatter", "reduce-window", "select-and-scatter", "fft"),
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast"),
}
_HOST = 5  # the memory space of arrays in the host's memory
# Custom calls of XLA that put parts of one array side by side where they lie, or only reserve memory.
_NAMING_CALLS = ("ConcatBitcast", "AllocateBuffer")
_WITH_WORKSPACE = ("__cublas", "__cudnn")  # these libraries' calls also return memory that they may have used
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_READS = re.compile(r'kernel_metadata=\{[^}]*"reads":"([\d ]+)"')
_ESTIMATE = re.compile(r'"bytes_accessed":"(\d+)"')


class Part(NamedTuple):
    """An array, how much of it is moved, and how often: a half is 0.5, an array that is read twice 2."""

    array: Array
    share: float = 1.0


@dataclasses.dataclass(frozen=True)
class Move:
    """What one instruction moves, all times that it runs.

    Attributes:
        instruction: the instruction.
        computation: where it is.
        callers: the instructions that run this computation, the innermost last.
        read, written: bytes, with padding.
        padding: how many of these are padding.
        times: how often it runs.
    """

    instruction: Instruction
    computation: Computation
    callers: tuple[Instruction, ...]
    read: float
    written: float
    padding: float
    times: float

    @property
    def bytes(self) -> float:
        """Bytes in both directions, with padding."""
        return self.read + self.written


def moves(program: Program, *, platform: str) -> list[Move]:
    """What the instructions of a program move, in the order in which they run; those that move nothing are left out.

    Args:
        program: compiled for one device or one of several.
        platform: of the devices, "tpu", "gpu" or "cpu". On a TPU every memory but the first is on the chip (VMEM,
            SMEM, flags); elsewhere numbers of memories only say what an allocation is for.
    """
    return list(_Counter(program, platform).of(program.entry, 1, ()))


class _Counter:
    def __init__(self, program: Program, platform: str):
        self._program, self._on_tpu = program, platform == "tpu"
        self._shares: dict[tuple[int, str], float] = {}

    def of(self, computation: Computation, times: float, callers: tuple[Instruction, ...]) -> Iterator[Move]:
        for item in computation.instructions.values():
            if item.opcode in _NAMING or item.opcode.endswith(("-update", "-done")):
                continue
            inside = (*callers, item)
            if item.opcode == "while":
                runs = trips(self._program, item, computation)
                yield from self.of(self._called(item, "body"), times * (1 if runs is None else runs), inside)
            elif item.opcode == "call":
                yield from self.of(self._called(item, "to_apply"), times, inside)
            elif item.opcode == "async-start":
                yield from self.of(self._called(item, "calls"), times, inside)
            elif item.opcode == "conditional":
                branches = (list(self.of(self._program.computations[name], times, inside)) for name in item.branches)
                yield from max(branches, key=lambda found: sum(move.bytes for move in found))
            elif (move := self._move(item, computation, times, callers)).bytes:
                yield move

    def _called(self, item: Instruction, attribute: str) -> Computation:
        return self._program.computations[item.called(attribute)]

    def _move(self, item: Instruction, computation: Computation, times: float, callers) -> Move:
        read, written = self._parts(item, computation)
        sizes = [self._bytes(parts) for parts in (read, written)]
        padding = sum(padded - plain for padded, plain in sizes)
        return Move(item, computation, callers, times * sizes[0][0], times * sizes[1][0], times * padding, times)

    def _bytes(self, parts: list[Part]) -> tuple[float, float]:
        """Bytes of what lies in the device's memory: with padding, and without."""
        here = [part for part in parts if self._in_memory(part.array)]
        return sum(p.share * p.array.padded_bytes for p in here), sum(p.share * p.array.bytes for p in here)

    def _in_memory(self, array: Array) -> bool:
        return array.space == 0 if self._on_tpu else array.space != _HOST

    def _parts(self, item: Instruction, computation: Computation) -> tuple[list[Part], list[Part]]:
        """What an instruction reads and what it writes."""
        by_operand = [computation.arrays(name) for name in dict.fromkeys(item.operands)]
        arrays = [array for operand in by_operand for array in operand]
        whole, results = [Part(array) for array in arrays], [Part(array) for array in item.arrays]
        match item.opcode:
            case "fusion":
                return self._fusion(item, computation, item.arrays)
            case "fusion-start":
                return self._fusion(item, computation, _results(item, arrays))
            case "slice" | "dynamic-slice" | "gather":
                return [Part(arrays[0], _share(results[0].array, arrays[0])), *whole[1:]], results
            case "dynamic-update-slice" | "dynamic-update-slice-start":
                update, operand = computation.arrays(item.operands[1])[0], arrays[0]
                return [Part(update)], [Part(operand, _share(update, operand))]
            case "scatter":
                return self._scatter(item, computation)
            case "custom-call":
                return self._custom_call(item, computation, arrays)
            case opcode if opcode.endswith("-start"):
                return _started(item, arrays)
        return whole, results

    def _scatter(self, item: Instruction, computation: Computation) -> tuple[list[Part], list[Part]]:
        """Operands, indices and updates; as many elements as there are updates are read and written in place."""
        count = len(item.arrays)
        operands = [array for name in item.operands for array in computation.arrays(name)]
        share = _share(operands[-1], operands[0])
        changed = [Part(array, share) for array in item.arrays]
        return [*changed, *map(Part, operands[count:])], changed

    def _fusion(
        self, item: Instruction, computation: Computation, results: Sequence[Array]
    ) -> tuple[list[Part], list[Part]]:
        body = self._called(item, "calls")
        roots = _roots(body)
        written = [Part(array, self._updated(body, name)) for array, name in zip(results, roots, strict=False)]
        written += [Part(array) for array in results[len(roots) :]]
        read = []
        for i, name in enumerate(item.operands):
            inner = body.parameters.get(i)
            share = 1.0 if inner is None or inner.is_tuple else self._needed(body, inner)
            read += [Part(array, share) for array in computation.arrays(name)]
        return read, written

    def _needed(self, body: Computation, value: Instruction) -> float:
        """How much of a value a fused computation needs: less than all of what is only used through slices.

        They are followed through what is computed element by element, and into fusions inside fusions. Slices that
        overlap count apart, at most as the whole.
        """
        key = id(body), value.name
        if key not in self._shares:
            self._shares[key] = self._find_needed(body, value)
        return self._shares[key]

    def _find_needed(self, body: Computation, value: Instruction) -> float:
        if value.is_root:
            return 1.0
        total = 0.0
        for user, operand in body.users[value.name]:
            if user.opcode in _SLICES and operand == 0:
                total += self._needed(body, user) * _share(user.arrays[0], value.arrays[0])
            elif user.opcode in _UPDATES and operand == 0 and _in_place(body, user):
                continue  # in place
            elif user.opcode == "fusion":
                called = self._called(user, "calls")
                total += self._needed(called, called.parameters[operand])
            elif _same_size(user, value) and user.opcode not in _NO_ELEMENT_BY_ELEMENT:
                total += self._needed(body, user)
            else:
                return 1.0
        return min(1.0, total)

    def _updated(self, body: Computation, name: str) -> float:
        """How much of a fusion's result is written: of an update in place the update."""
        item = _made_by(body, name)
        if item.opcode == "dynamic-update-slice":
            return _share(body.arrays(item.operands[1])[0], item.arrays[0])
        if item.opcode == "scatter":
            return _share(body.arrays(item.operands[-1])[0], item.arrays[0])
        if item.opcode == "fusion" and not item.is_tuple:
            called = self._called(item, "calls")
            return self._updated(called, called.root.name)
        return 1.0

    def _custom_call(
        self, item: Instruction, computation: Computation, arrays: list[Array]
    ) -> tuple[list[Part], list[Part]]:
        target = _TARGET.search(item.attributes)
        target = target[1] if target else ""
        if target in _NAMING_CALLS:
            return [], []
        results = list(item.arrays)
        if target.startswith(_WITH_WORKSPACE):
            results = results[:1] + [array for array in results[1:] if array.dtype not in ("s8", "u8")]
        if (reads := _READS.search(item.attributes)) and len(times := reads[1].split()) == len(item.operands):
            pairs = zip(item.operands, map(float, times), strict=True)
            read = [Part(array, number) for name, number in pairs for array in computation.arrays(name)]
            return read, list(map(Part, results))
        if estimate := _ESTIMATE.search(item.attributes):
            # Which operands are read again is not known: it is all of them, equally often.
            again = int(estimate[1]) - sum(array.bytes for array in (*arrays, *results))
            shares = [1 + max(0.0, again) / max(sum(array.bytes for array in arrays), 1)] * len(arrays)
        else:
            shares = [1.0] * len(arrays)
        return list(map(Part, arrays, shares)), list(map(Part, results))


def _share(part: Array, whole: Array) -> float:
    """How much of an array another one is, at most all of it."""
    return min(1.0, part.elements / max(whole.elements, 1))


def _same_size(user: Instruction, value: Instruction) -> bool:
    return not user.is_tuple and math.prod(user.arrays[0].shape) == math.prod(value.arrays[0].shape)


def _roots(body: Computation) -> list[str]:
    """The names of a fusion's results, in the fused computation."""
    return list(body.root.operands) if body.root.opcode == "tuple" else [body.root.name]


def _made_by(body: Computation, name: str) -> Instruction:
    """What computes a value of a fused computation, but for copies of it."""
    item = body.instructions[name]
    while item.opcode in ("bitcast", "copy") and item.operands[0] in body.instructions:
        item = body.instructions[item.operands[0]]
    return item


def _in_place(body: Computation, update: Instruction) -> bool:
    """Whether an update is a result of a fused computation, and so made in the memory of what is updated."""
    return any(_made_by(body, name) is update for name in _roots(body))


def _started(item: Instruction, arrays: list[Array]) -> tuple[list[Part], list[Part]]:
    """Of an asynchronous instruction; those of slices read what they return."""
    new = _results(item, arrays)
    slices = item.opcode.removesuffix("-start") in _SLICES
    share = sum(array.bytes for array in new) / max(sum(array.bytes for array in arrays), 1) if slices else 1.0
    return [Part(array, min(1.0, share)) for array in arrays], list(map(Part, new))


def _results(item: Instruction, arrays: list[Array]) -> list[Array]:
    """The results of an asynchronous instruction, whose value also holds its operands `arrays`, and counters."""
    new = [array for array in item.arrays if array.shape or array.dtype not in ("u32", "s32")]
    if item.opcode != "all-reduce-start":  # which returns the results alone
        for array in arrays:
            if array in new:
                new.remove(array)
    return new
