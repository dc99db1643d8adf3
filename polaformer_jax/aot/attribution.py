"""Which part of the model, or of the training step, moves the bytes of a compiled program.

Models and steps name their parts by `jax.named_scope`, and jitted functions have names by themselves. XLA keeps the
path of names of the operation that an instruction comes from, "jit(step)/transpose(jvp(block))/mlp/jit(gelu)/mul". The
innermost name of `MODULES` says to which part an instruction belongs, and `transpose` that it is of the backward pass.

A fusion belongs to the part of its matrix product or kernel, whatever is fused with it; one without to its result's.

Instructions that compute nothing, copies into another layout or between memories, belong to the part that uses what
they make. So do others without a name; or, if nothing uses them, to the part that made what they read.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from polaformer_jax.aot.hlo import Computation, Instruction, Program
from polaformer_jax.aot.traffic import Move

OPTIMIZER, OTHER = "optimizer, EMA, gradient sums", "other"
# Names of scopes and jitted functions, and the part of the step that they are.
MODULES = {
    "augmentation": "augmentation",
    "optimizer": OPTIMIZER,
    "patch_embedding": "patch embedding",
    "patch_merging": "patch merging",
    "softmax_attention": "softmax attention",
    "polarity_attention": "polarity attention",
    "packed_attention": "polarity attention",
    "projected_attention": "polarity attention",
    "rotary_linear_attention": "polarity attention",
    "relu_attention": "relu attention",
    "attention": "projections of attention",
    "depthwise_conv": "depthwise convolution",
    "mlp": "MLP",
    "fused_mlp": "MLP",
    "layer_norm": "LayerNorm",
    "windows": "windows and their shift",
    "block": "residual, stochastic depth",
    "stochastic_depth": "residual, stochastic depth",
    "head": "heads, loss, metrics",
    "loss": "heads, loss, metrics",
}
# Parts of the step that have no backward pass of their own.
WITHOUT_PASSES = ("augmentation", OPTIMIZER)

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-", "ragged-all-to-all")
_COPIES = ("copy", "copy-start", "transpose", "reshape", "slice-start", "dynamic-slice-start")
_NAMES = re.compile(r"\w+")
_STEPS = 24  # instructions from one without a name to one with a name, at most


class Traffic(NamedTuple):
    """Bytes that one part moves in one pass.

    Attributes:
        module: the part, one of the values of `MODULES`, or `OTHER`.
        backward: whether it is in the backward pass, where there is recomputation too.
        read, written: bytes, with padding.
        padding: how many of these are padding.
        copies: how many of these copy from one layout, or one memory, to another, and compute nothing.
    """

    module: str
    backward: bool
    read: float
    written: float
    padding: float
    copies: float

    @property
    def bytes(self) -> float:
        return self.read + self.written


def by_module(program: Program, moves: Iterable[Move]) -> list[Traffic]:
    """The sums of `moves` by part and pass, the parts that move most first."""
    found = _Origins(program)
    sums: dict[tuple[str, bool], list[float]] = {}
    for move in moves:
        total = sums.setdefault(found.of(move), [0.0] * 4)
        copied = move.bytes if found.is_copy(move.instruction) else 0
        for i, value in enumerate((move.read, move.written, move.padding, copied)):
            total[i] += value
    rows = [Traffic(*key, *total) for key, total in sums.items()]
    of_part = {row.module: sum(other.bytes for other in rows if other.module == row.module) for row in rows}
    return sorted(rows, key=lambda row: (-of_part[row.module], row.module, row.backward))


def origin(op_name: str) -> tuple[str, bool] | None:
    """The part that a path of names belongs to, and whether it is of the backward pass; None if no name is known."""
    for path in op_name.split(";"):  # instructions that XLA has merged
        if "/" in path:  # otherwise it is the name of an argument
            known = (name for name in reversed(_NAMES.findall(path)) if name in MODULES)
            if (name := next(known, None)) is not None:
                return MODULES[name], "transpose(" in path
    return None


class _Origins:
    def __init__(self, program: Program):
        self._program = program
        self._known: dict[int, tuple[str, bool] | None] = {}  # by identity: instructions are compared slowly

    def of(self, move: Move) -> tuple[str, bool]:
        """The part that an instruction belongs to, and whether it is of the backward pass."""
        module, backward = self._find(move) or (OTHER, False)
        backward = backward or any("transpose(" in caller.op_name for caller in move.callers)
        return module, backward and module not in WITHOUT_PASSES

    def _find(self, move: Move) -> tuple[str, bool] | None:
        item, computation = move.instruction, move.computation
        own = self._own(item)
        if item.opcode.startswith(_COLLECTIVES):
            return own if own and own[0] == "augmentation" else (OPTIMIZER, False)
        if own is not None and not self.is_copy(item):
            return own
        return (
            self._near(item, _users, computation)
            or own
            or self._near(item, _sources, computation)
            or next(filter(None, (origin(caller.op_name) for caller in reversed(move.callers))), None)
        )

    def _near(self, item: Instruction, neighbours, computation: Computation) -> tuple[str, bool] | None:
        """The part of the nearest instruction with a name, among those that use a value or make what it is made of."""
        seen, front = {item.name}, [item]
        for _ in range(_STEPS):
            near = {one.name: one for item in front for one in neighbours(item, computation) if one.name not in seen}
            front = list(near.values())
            seen |= near.keys()
            for one in front:
                if (found := self._own(one)) is not None and not self.is_copy(one):
                    return found
        return None

    def is_copy(self, item: Instruction) -> bool:
        """Whether an instruction only moves values to another place or layout."""
        if item.opcode != "fusion":
            return item.opcode in _COPIES
        return all(one.opcode in ("copy", "bitcast", "transpose", "reshape") for one in self._members(item))

    def _own(self, item: Instruction) -> tuple[str, bool] | None:
        """From the names of the instruction: of a fusion those of its product or kernel, else its own, else its last
        member's that has any."""
        if id(item) not in self._known:
            members = list(self._members(item)) if item.opcode == "fusion" else []
            products = [one for one in members if one.opcode in ("convolution", "dot", "custom-call")]
            names = (one.op_name for one in (*products, item, *reversed(members)))
            self._known[id(item)] = next(filter(None, map(origin, names)), None)
        return self._known[id(item)]

    def _members(self, item: Instruction) -> Iterator[Instruction]:
        """What a fusion computes, also in fusions inside it."""
        for inner in self._program.computations[item.called("calls")].instructions.values():
            if inner.opcode == "fusion":
                yield from self._members(inner)
            elif inner.opcode not in ("parameter", "constant", "tuple", "get-tuple-element"):
                yield inner


def _users(item: Instruction, computation: Computation) -> list[Instruction]:
    return [user for user, _ in computation.users[item.name] if not (user.opcode == "tuple" and user.is_root)]


def _sources(item: Instruction, computation: Computation) -> list[Instruction]:
    names = (name for name in item.operands if name in computation.instructions)
    return [computation.instructions[name] for name in names]
