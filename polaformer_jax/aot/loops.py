"""How often the loop of a compiled program runs."""

import re

from polaformer_jax.aot.hlo import Computation, Instruction, Program

_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_INDEX = re.compile(r"\bindex=(\d+)")


def trips(program: Program, loop: Instruction, around: Computation) -> int | None:
    """How often the body of a `while` runs; None: not known.

    XLA's back ends for CPUs and GPUs note it. For TPUs it follows from the counter, which `scan` and `fori_loop` have:
    an element of the loop's tuple that starts at a constant, and to which the body adds a constant, while it is less
    than a third one.

    Args:
        loop: an instruction of `around`.
    """
    if noted := _TRIPS.search(loop.attributes):
        return int(noted[1])
    condition = program.computations[loop.called("condition")]
    body = program.computations[loop.called("body")]
    initial = around.instructions.get(loop.operands[0])
    test = condition.root
    if initial is None or initial.opcode != "tuple" or body.root.opcode != "tuple":
        return None
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None

    def value(name: str, inside: Computation) -> int | None:
        """Of a constant inside the loop, or of one that is carried through it."""
        if (carried := _carried(name, inside)) is None:
            return _constant(name, inside)
        unchanged = _carried(body.root.operands[carried], body) == carried
        return _constant(initial.operands[carried], around) if unchanged else None

    counter = _carried(test.operands[0], condition)
    if counter is None:
        return None
    step = body.instructions[body.root.operands[counter]]
    if step.opcode != "add" or counter not in (which := [_carried(name, body) for name in step.operands]):
        return None
    start, limit = _constant(initial.operands[counter], around), value(test.operands[1], condition)
    by = value(step.operands[1 - which.index(counter)], body)
    if start is None or limit is None or not by or by < 0:
        return None
    return max(0, -(-(limit - start) // by))


def _constant(name: str, computation: Computation) -> int | None:
    """The integer that a value is, perhaps copied; None: it is no constant."""
    item = computation.instructions.get(name)
    while item is not None and item.opcode in ("copy", "bitcast"):
        item = computation.instructions.get(item.operands[0])
    if item is None or item.opcode != "constant" or not re.fullmatch(r"-?\d+", item.operands[0]):
        return None
    return int(item.operands[0])


def _carried(name: str, computation: Computation) -> int | None:
    """Which element of the loop's tuple a value is; None: it is none."""
    item = computation.instructions.get(name)
    while item is not None and item.opcode in ("copy", "bitcast"):
        item = computation.instructions.get(item.operands[0])
    if item is None or item.opcode != "get-tuple-element":
        return None
    source = computation.instructions.get(item.operands[0])
    return int(_INDEX.search(item.attributes)[1]) if source is not None and source.opcode == "parameter" else None
