"""ListOps: long nested operations on lists of digits, and their values.

    [MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]    has the value 5

A draw is a tree. Its root has depth 1; a node is a digit with probability 3/4, and always at depth 10; otherwise an
operator with 2 to 10 children. A draw is kept when it has more than 500 and fewer than 2000 symbols, closing brackets
included: about one in twelve. (For the short ones, which are not part of the Long Range Arena: more than 50 and fewer
than 256.)

Source: Nangia and Bowman, "ListOps" (arXiv 1804.06028), with the settings of the Long Range Arena (arXiv 2011.04006).
Here trees are drawn level by level, a whole block of trees at once, since nearly all nodes belong to trees that are not
kept.
"""

from typing import NamedTuple

import numpy as np

SYMBOLS = (*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")  # a symbol's position is its byte in a record
MIN, MAX, MED, SM, CLOSE = range(10, 15)
MAX_DEPTH = 10
MAX_CHILDREN = 10
LENGTHS, SHORT_LENGTHS = (501, 1999), (51, 255)  # shortest and longest length that is kept
BLOCK = 8192  # trees drawn at once; with another number the same seed gives other trees
_OPERATOR_PROBABILITY = 0.25


class Expressions(NamedTuple):
    """The kept draws of a block, in the order in which they were drawn.

    Attributes:
        symbols: (all symbols,) uint8, the expressions one after the other.
        lengths: (expressions,) int64.
        values: (expressions,) uint8, 0 to 9.
    """

    symbols: np.ndarray
    lengths: np.ndarray
    values: np.ndarray


class Level(NamedTuple):
    """All nodes of one depth, siblings next to each other and in the order of their parents.

    Attributes:
        symbols: (nodes,) uint8, a digit or an operator.
        parents: (nodes,) the operator above each, as its index among the *operators* of the level above.
        children: (operators,) how many each operator has.
    """

    symbols: np.ndarray
    parents: np.ndarray
    children: np.ndarray


def draw_block(seed: int, block: int, between: tuple[int, int] = LENGTHS) -> Expressions:
    """The kept expressions of block number `block`: a function of the arguments only."""
    levels = draw_trees(np.random.default_rng([seed, block]), BLOCK)
    lengths, values = _measure(levels)
    return _write(levels, lengths, values[0], between)


def to_text(symbols: np.ndarray) -> str:
    """An expression as it is written, symbols separated by blanks."""
    return " ".join(SYMBOLS[symbol] for symbol in symbols)


def without_brackets(symbols: np.ndarray) -> np.ndarray:
    """The same expression with its closing brackets dropped; different expressions can become equal."""
    return symbols[symbols != CLOSE]


def draw_trees(rng: np.random.Generator, count: int) -> list[Level]:
    """Draws trees of any size; returns the levels of depth 1 to 10."""
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
    # In NumPy, the stream of `random` is more stable across versions than that of `integers`.
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
    # The integer part of the median: for an even number of digits, half the sum of the middle two, rounded down.
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
