"""Names from outside: shown on one line, encoded, and drawn as they are."""

import os

import pytest

from polaformer_jax.files import figures
from polaformer_jax.files.names import shown


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat", "cat"),
        ("größe сова 🦉", "größe сова 🦉"),
        (os.fsdecode(b"caf\xe9"), r"caf\xe9"),
        ("a\nb\tc\0", r"a\nb\tc\x00"),
        ("\u202etxt", r"\u202etxt"),  # would be written from right to left
        ("\ud83d", r"\ud83d"),
        (r"a\b", r"a\b"),
    ],
)
def test_what_cannot_be_printed_is_escaped(name, expected):
    assert shown(name) == expected
    assert shown(name).encode().decode() == expected


@pytest.mark.parametrize(
    "name", ["$a$b", "$", "$$", r"\$a$", "a_{b", "$\\frac{$", "100 %", "猫", os.fsdecode(b"\xe9$a$")]
)
def test_a_name_is_drawn_as_it_is(name, tmp_path):
    figure = figures.new(1, 1)
    axes = figure.subplots()
    axes.set_title(figures.plain(name))
    axes.set_xticks([0, 1], [figures.plain(name)] * 2)
    figures.save(figure, tmp_path / "a.svg")  # a formula would fail, or be drawn as one
    texts = [text for text in (axes.title, *axes.get_xticklabels())]
    assert all(text._preprocess_math(text.get_text()) == (shown(name), False) for text in texts)
