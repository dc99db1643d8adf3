"""The results on the Long Range Arena: rows in a file, and the documentation's table made from it."""

import dataclasses
import json

import pytest

from polaformer_jax.analysis.results import lra, page, rows
from polaformer_jax.analysis.results.lra import Row
from polaformer_jax.cli import results
from polaformer_jax.errors import UserError

ROW = Row("listops", "no_brackets", "polarity", 3.0, 0, 5000, 37.5, 5400.0, "CPU, 2 cores", "abcdef1", "seed 0", "")


def line_of(found, *parts):
    (line,) = [line for line in lra.table(found).splitlines() if all(part in line for part in parts)]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_rows_come_back_as_they_were_written(tmp_path):
    written = [ROW, dataclasses.replace(ROW, attention="softmax", alpha=None, accuracy=38.05, hardware='a "b", c')]
    for row in written:
        assert rows.append(tmp_path / "new/lra.csv", row)
    assert not rows.append(tmp_path / "new/lra.csv", ROW)
    assert rows.read(tmp_path / "new/lra.csv", Row) == written


def test_what_was_not_run_is_a_dash():
    assert line_of([], "Text", "α = 5")[2:] == ["72.33", "–", "–", "–", "–", "–", "–"]
    assert len(lra.table([]).splitlines()) == 2 + 5 * 4


def test_a_run_stands_beside_the_published_figure():
    expected = ["37.35", "37.50", "5,000", "1", "1 h 30 min", "CPU, 2 cores", "seed 0"]
    assert line_of([ROW], "ListOps", "α = 3")[2:] == expected


def test_seeds_are_one_line_and_their_mean():
    found = [ROW, dataclasses.replace(ROW, seed=1, accuracy=38.5)]
    assert line_of(found, "ListOps", "α = 3")[3:6] == ["38.00 ± 0.71", "5,000", "2"]


def test_other_steps_and_tokenisations_are_lines_of_their_own():
    found = [ROW, dataclasses.replace(ROW, steps=500), dataclasses.replace(ROW, tokenisation="brackets", time=50.0)]
    assert line_of(found, "ListOps, no brackets", "α = 3", " 500 ")[2] == "37.35"
    expected = ["–", "37.50", "5,000", "1", "1 min", "CPU, 2 cores", "seed 0"]
    assert line_of(found, "ListOps, brackets", "α = 3")[2:] == expected


def test_other_data_and_settings_are_lines_of_their_own():
    found = [ROW, dataclasses.replace(ROW, changes="optimizer.lr=0.001"), dataclasses.replace(ROW, data="seed 1")]
    last = [line.split("|")[-2].strip() for line in lra.table(found).splitlines() if "37.50" in line]
    assert last == ["seed 0", "seed 0; optimizer.lr=0.001", "seed 1"]


def test_attention_that_nothing_was_published_for():
    row = dataclasses.replace(ROW, task="text", tokenisation="", attention="relu", alpha=None)
    assert line_of([row], "Text", "relu")[2:4] == ["–", "37.50"]


def test_a_file_that_is_none(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("task,accuracy\n")
    with pytest.raises(UserError, match="begins with task,accuracy, expected task,tokenisation,attention"):
        rows.read(file, Row)
    for line, message in (
        ("text,,polarity,3.0,zero,1,1,1,CPU,a,b,", "line 3: invalid literal for int.*'zero'"),
        ("words,,polarity,3.0,0,1,1,1,CPU,a,b,", "line 3: task 'words', expected one of listops"),
        ("text,,polarity", "line 3: .*shorter"),
    ):
        rows.write(file, [ROW])
        file.write_text(f"{file.read_text()}{line}\n")
        with pytest.raises(UserError, match=message):
            rows.read(file, Row)


def test_a_folder_that_is_no_finished_training(tmp_path, capsys):
    assert results.main(["--dir", str(tmp_path), "add", str(tmp_path)]) == 1
    assert "config.json does not exist" in capsys.readouterr().err
    for name, content in (("config", {"task": {"name": "image"}}), ("training", {}), ("eval", {})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="is a training of the task image, expected one of listops"):
        lra.row_of(tmp_path)


def test_a_page_without_a_place_for_the_table():
    with pytest.raises(UserError, match="no place for the table"):
        page.with_table("# Nothing", "lra", "")
