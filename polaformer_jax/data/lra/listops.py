"""ListOps: nested operations on lists of digits, long ones, and their values.

    [MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]    has the value 5

A draw is a tree. Its root has depth 1; a node is a digit with probability 3/4, and always at depth 10; else an operator
with 2 to 10 children. A draw is kept when it has more than 500 and fewer than 2000 symbols, closing brackets counted:
about one in twelve. (Of the short ones, which are no part of the Long Range Arena: more than 50 and fewer than 256.)

Source: Nangia and Bowman, "ListOps" (arXiv 1804.06028), with the settings of the Long Range Arena (arXiv 2011.04006).
Drawn here by the level, a whole block of trees at once, since nearly all nodes belong to trees that are not kept.
"""

from typing import NamedTuple

import numpy as np

SYMBOLS = (*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")  # a symbol's position is its byte in a record
MIN, MAX, MED, SM, CLOSE = range(10, 15)
MAX_DEPTH = 10
MAX_CHILDREN = 10
LENGTHS, SHORT_LENGTHS = (501, 1999), (51, 255)  # the shortest and the longest that are kept
BLOCK = 8192  # trees drawn at once; part of what a seed means
_OPERATOR_PROBABILITY = 0.25


class Expressions(NamedTuple):
    """What is kept of a block of draws, in the order of the draws.

    Attributes:
      symbols: (all symbols,) uint8, the expressions one after the other.
      lengths: (expressions,) int64.
      values: (expressions,) uint8, 0 to 9.
    """

    symbols: np.ndarray
    lengths: np.ndarray
    values: np.ndarray


class Level(NamedTuple):
    """All nodes of one depth, siblings beside each other and in the order of their parents.

    Attributes:
      symbols: (nodes,) uint8, a digit or an operator.
      parents: (nodes,) the operator above each, as its number among the *operators* of the level above.
      children: (operators,) how many each operator has.
    """

    symbols: np.ndarray
    parents: np.ndarray
    children: np.ndarray


def draw_block(seed: int, block: int, between: tuple[int, int] = LENGTHS) -> Expressions:
    """The kept expressions of block number `block`: a function of these numbers alone."""
    levels = draw_trees(np.random.default_rng([seed, block]), BLOCK)
    lengths, values = _measure(levels)
    return _write(levels, lengths, values[0], between)


def to_text(symbols: np.ndarray) -> str:
    """An expression as it is written, symbols separated by blanks."""
    return " ".join(SYMBOLS[symbol] for symbol in symbols)


def without_brackets(symbols: np.ndarray) -> np.ndarray:
    """The same expression with its closing brackets dropped; it cannot always be told from others any more."""
    return symbols[symbols != CLOSE]


def draw_trees(rng: np.random.Generator, count: int) -> list[Level]:
    """Draws trees of any size; the levels of depth 1 to 10."""
    levels, parents = [], np.arange(count)
    for depth in range(1, MAX_DEPTH + 1):
        nodes = len(parents)
        symbols = _uniform(rng, nodes, 10)
        operator = rng.random(nodes) <= _OPERATOR_PROBABILITY if depth < MAX_DEPTH else np.zeros(nodes, bool)
        operators = np.count_nonzero(operator)
        symbols[operator] = MIN + _uniform(rng, operators, 4)
        children = 2 + _uniform(rng, operators, MAX_CHILDREN - 1)
        levels.append(Level(symbols, parents, children))
        parents = np.repeat(np.arange(operators), children)
    return levels


def _uniform(rng: np.random.Generator, count: int, options: int) -> np.ndarray:
    # NumPy keeps the stream of `random` from version to version more faithfully than that of `integers`.
    return (rng.random(count) * options).astype(np.uint8)


def _measure(levels: list[Level]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Lengths and values of the subtrees below all nodes, level by level; from the leaves up."""
    lengths, values = [], []
    for depth in reversed(range(MAX_DEPTH)):
        level = levels[depth]
        length, value = np.ones(len(level.symbols), np.int64), level.symbols.copy()
        operator = level.symbols >= MIN
        if operator.any():
            starts = np.cumsum(level.children, dtype=np.int64) - level.children
            length[operator] = 2 + np.add.reduceat(lengths[-1], starts)
            value[operator] = _apply(level.symbols[operator], values[-1], starts, level.children)
        lengths.append(length)
        values.append(value)
    return lengths[::-1], values[::-1]


def _apply(operators: np.ndarray, digits: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The values of operators whose operands are runs of `digits`."""
    owners = np.repeat(np.arange(len(operators)), counts)
    ordered = digits[np.argsort(owners * 16 + digits, kind="stable")].astype(np.int64)
    ends = starts + counts
    # The integer part of the median: of an even number of digits the lower half of the sum of the two in the middle.
    median = (ordered[starts + (counts - 1) // 2] + ordered[starts + counts // 2]) // 2
    total = np.add.reduceat(digits, starts, dtype=np.int64) % 10
    return np.choose(operators - MIN, (ordered[starts], ordered[ends - 1], median, total)).astype(np.uint8)


def _write(levels: list[Level], lengths: list[np.ndarray], values: np.ndarray, between: tuple[int, int]) -> Expressions:
    """Puts every node of the kept trees at its place in the text: after its parent and its earlier siblings."""
    kept = (lengths[0] >= between[0]) & (lengths[0] <= between[1])
    total = int(lengths[0][kept].sum())
    symbols = np.empty(total, np.uint8)
    places = np.where(kept, np.cumsum(lengths[0] * kept) - lengths[0], -1)  # (nodes,) -1: not in a kept tree
    for depth, level in enumerate(levels):
        written = places >= 0
        symbols[places[written]] = level.symbols[written]
        operator = level.symbols >= MIN
        if not operator.any():
            break
        closing = written & operator
        symbols[places[closing] + lengths[depth][closing] - 1] = CLOSE
        below, children = lengths[depth + 1], level.children
        starts = np.cumsum(children, dtype=np.int64) - children
        before = np.cumsum(below) - below
        above = np.repeat(places[operator], children)  # (nodes of the next level,)
        places = np.where(above >= 0, above + 1 + before - np.repeat(before[starts], children), -1)
    return Expressions(symbols, lengths[0][kept], values[kept])
