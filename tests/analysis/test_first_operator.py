"""The answers that the first operator of a ListOps expression gives."""

import numpy as np
import pytest

from polaformer_jax.analysis import first_operator
from polaformer_jax.cli import lra_baseline
from polaformer_jax.data.lra import store
from polaformer_jax.data.lra.listops import MAX, MIN


def write(data_dir, **splits):
    """Data of (first symbol, value) pairs."""
    with store.writing("lra_listops", data_dir, origin="made up", settings={}) as writer:
        for split, pairs in splits.items():
            for first, value in pairs:
                writer.add(split, value, bytes([first, 3, 4, 14]), lengths=(4, 3))
    return str(data_dir)


@pytest.fixture
def data_dir(tmp_path):
    return write(
        tmp_path,
        train=[(MIN, 0), (MIN, 0), (MIN, 2), (MAX, 9), (MAX, 8), (MAX, 8)],
        dev=[(MIN, 0), (MAX, 9), (MAX, 8), (MIN, 2)],
        test=[(MAX, 8), (MAX, 8)],
    )


def test_an_answer_is_the_commonest_value_of_training_expressions_with_the_same_operator(data_dir):
    right = first_operator.correct_answers(data_dir)
    np.testing.assert_array_equal(right["train"], [True, True, False, False, True, True])
    np.testing.assert_array_equal(right["dev"], [True, False, True, False])
    np.testing.assert_array_equal(right["test"], [True, True])


def test_the_command_prints_a_line_for_each_split(data_dir, capsys):
    assert lra_baseline.main(["--data-dir", data_dir]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        ["train", "6", "66.67", "19.25"],
        ["dev", "4", "50.00", "25.00"],
        ["test", "2", "100.00", "0.00"],
    ]


def test_data_that_is_not_there_is_an_error_that_says_how_to_get_it(tmp_path, capsys):
    assert lra_baseline.main(["--data-dir", str(tmp_path)]) == 1
    assert "polaformer prepare lra_listops" in capsys.readouterr().err
