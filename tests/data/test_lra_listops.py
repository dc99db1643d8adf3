"""ListOps: what is drawn is what the definition says, and its answers are right."""

import re
import statistics

import numpy as np
import pytest
from scipy import stats

from polaformer_jax.data.lra import listops


@pytest.fixture(scope="module")
def expressions():
    """Texts and values of some thousands of kept expressions."""
    found = []
    for block in range(4):
        kept = listops.draw_block(7, block)
        parts = np.split(kept.symbols, np.cumsum(kept.lengths)[:-1])
        found += [(listops.to_text(part), int(value)) for part, value in zip(parts, kept.values, strict=True)]
    return found


def evaluate(text):
    """By Python's own parser: the text rewritten as nested calls."""
    functions = {
        "MIN": lambda *digits: min(digits),
        "MAX": lambda *digits: max(digits),
        "MED": lambda *digits: int(statistics.median(digits)),
        "SM": lambda *digits: sum(digits) % 10,
    }
    call = re.sub(r"\[(\w+)", r"\1(", text.replace(" ]", ")")).replace(") ", "), ")
    return eval(re.sub(r"(\d) (?=[\dMS])", r"\1, ", call), {"__builtins__": {}}, functions)


def test_the_evaluator_knows_the_operators():
    assert evaluate("[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]") == 5
    assert [evaluate(f"[{name} 9 2 5 8 ]") for name in ("MIN", "MAX", "MED", "SM")] == [2, 9, 6, 4]


def test_the_values_are_those_of_the_text(expressions):
    assert all(evaluate(text) == value for text, value in expressions[:600])


def test_texts_are_well_formed_and_no_deeper_than_ten(expressions):
    for text, _ in expressions[:500]:
        depth = children = deepest = 0
        open_nodes = []
        for word in text.split():
            if word == "]":
                children = open_nodes.pop()
                assert 2 <= children <= 10
            else:
                depth = len(open_nodes) + 1
                deepest = max(deepest, depth)
                if open_nodes:
                    open_nodes[-1] += 1
                if word.startswith("["):
                    open_nodes.append(0)
        assert not open_nodes and deepest <= 10


def test_lengths_are_between_the_bounds_and_as_long_on_average_as_is_known(expressions):
    with_brackets = np.array([len(text.split()) for text, _ in expressions])
    without = np.array([len(text.replace(" ]", "").split()) for text, _ in expressions])
    assert 500 < with_brackets.min() < 520 and 1950 < with_brackets.max() < 2000
    # Three standard errors of the mean of some 2,700 lengths with a deviation of about 400.
    np.testing.assert_allclose(with_brackets.mean(), 1036, atol=25)
    np.testing.assert_allclose(without.mean(), 888, atol=22)
    assert 0.075 < len(expressions) / (4 * listops.BLOCK) < 0.09


def test_short_expressions_are_of_the_same_draws_and_between_their_own_bounds():
    short, every = (listops.draw_block(7, 0, between) for between in (listops.SHORT_LENGTHS, (1, 10**6)))
    assert 50 < short.lengths.min() < 55 and 250 < short.lengths.max() < 256
    kept = (every.lengths > 50) & (every.lengths < 256)
    np.testing.assert_array_equal(short.lengths, every.lengths[kept])
    np.testing.assert_array_equal(short.symbols, every.symbols[np.repeat(kept, every.lengths)])
    np.testing.assert_array_equal(short.values, every.values[kept])


def test_digits_and_operators_of_kept_expressions_are_uniform(expressions):
    words = " ".join(text for text, _ in expressions[:600]).split()
    for names in ("0123456789", ("[MIN", "[MAX", "[MED", "[SM")):
        counts = [words.count(name) for name in names]
        assert stats.chisquare(counts).pvalue > 1e-3, counts


def test_labels_are_as_published(expressions):
    share = np.bincount([value for _, value in expressions], minlength=10) / len(expressions)
    # MIN makes zeros and MAX nines; the others have about 8 % each.
    assert 0.13 < share[0] < 0.20 and 0.13 < share[9] < 0.20
    assert np.all((share[1:9] > 0.05) & (share[1:9] < 0.12))


def test_draws_have_the_defined_probabilities():
    levels = listops.draw_trees(np.random.default_rng(1), 5000)
    assert len(levels) == 10 and levels[-1].children.size == 0
    inner = np.concatenate([level.symbols for level in levels[:-1]])
    operators = np.count_nonzero(inner >= listops.MIN)
    assert stats.binomtest(operators, len(inner), 0.25).pvalue > 1e-3
    children = np.bincount(np.concatenate([level.children for level in levels]))[2:]
    assert len(children) == 9 and stats.chisquare(children).pvalue > 1e-3
    kinds = np.bincount(inner[inner >= listops.MIN] - listops.MIN)
    assert len(kinds) == 4 and stats.chisquare(kinds).pvalue > 1e-3


def test_the_symbols_of_both_tokenisations():
    kept = listops.draw_block(0, 0)
    first = kept.symbols[: kept.lengths[0]]
    assert set(np.unique(kept.symbols)) == set(range(15)) and len(listops.SYMBOLS) == 15
    shorter = listops.without_brackets(first)
    assert listops.to_text(shorter) == listops.to_text(first).replace(" ]", "")
    assert set(np.unique(listops.without_brackets(kept.symbols))) == set(range(14))


def test_a_block_is_a_function_of_seed_and_number():
    one, same, other = (listops.draw_block(*numbers) for numbers in ((3, 5), (3, 5), (5, 3)))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not np.array_equal(one.lengths, other.lengths)


def test_the_draws_are_written_down():
    kept = listops.draw_block(0, 0)
    assert listops.to_text(kept.symbols[:12]) == "[SM 0 4 5 [MAX 8 4 7 1 0 [SM 4"
    assert kept.lengths[:5].tolist() == [821, 1974, 538, 994, 1019]
