"""The comparison of attentions on images: rows of runs, the table with time and memory, the picture, the page."""

import dataclasses
import json

import pytest

from polaformer_jax.analysis.results import images, page, rows
from polaformer_jax.analysis.results.images import Row, Step
from polaformer_jax.benchmark.recipes import experiment
from polaformer_jax.cli import results
from polaformer_jax.errors import UserError
from polaformer_jax.files import figures
from polaformer_jax.training import recipes
from polaformer_jax.training.workdir import as_json
from tests.support import ROOT

ROW = Row(
    *("fashion_mnist", "pola_pvt_nano", "polarity", 4.0, True, True, 972_874, 0, 800, 86.25, 0.4, 200.0),
    *("CPU, 1 core", "abcdef1", "tfds fashion_mnist/3.0.1", ""),
)
RELU = "fashion_mnist:pvt,attention=relu"
STEP = Step(RELU, 128, 971_850, 250.0, 240.0, 260.0, 10, 300.0, "CPU, 2 cores")


def line_of(table, *parts):
    (line,) = [line for line in table.splitlines() if all(part in line for part in parts)]
    return [cell.strip() for cell in line.strip("|").split("|")]


def finished(workdir, text, **changes):
    """The work directory of a training of a recipe, without its weights."""
    config = recipes.load(text)
    config.update_from_flattened_dict(changes)
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(as_json(config)))
    training = {"steps": config.train.steps, "seconds": 12.5, "hardware": "CPU, 1 core", "commit": "abcdef1"}
    (workdir / "training.json").write_text(json.dumps(training))
    result = {
        "split": "test",
        "kind": "raw",
        "step": config.train.steps,
        "origin": "tfds fashion_mnist/3.0.1",
        "accuracy": 0.8625,
        "loss": 0.4,
    }
    (workdir / "eval.json").write_text(json.dumps(result))
    return workdir


@pytest.mark.parametrize("name", [table.name for table in page.TABLES])
def test_documented_tables_are_those_of_the_files(name):
    """`polaformer results page` writes them."""
    (table,) = [table for table in page.TABLES if table.name == name]
    text = (ROOT / "docs" / table.page).read_text()
    assert text == page.with_table(text, name, page.tables(ROOT / "docs/results")[name])


@pytest.mark.parametrize(
    "options, variant",
    [
        ("pvt", ("polarity", 4.0, True, True)),
        ("swin,alpha=0", ("polarity", 0.0, True, True)),
        ("swin,attention=softmax,gate=False,convolution=False", ("softmax", None, False, False)),
    ],
)
def test_a_run_becomes_a_row(tmp_path, options, variant):
    workdir = finished(tmp_path / "run", f"fashion_mnist:{options},seed=3,steps=20")
    row = images.row_of(workdir)
    assert row.variant == variant and (row.seed, row.steps, row.accuracy, row.changes) == (3, 20, 86.25, "")
    assert results.main(["--dir", str(tmp_path), "add", str(workdir)]) == 0
    assert rows.read(tmp_path / page.IMAGES, Row) == [row]


def test_what_differs_from_the_recipe_is_named(tmp_path):
    workdir = finished(tmp_path / "run", "fashion_mnist:pvt", **{"optimizer.lr": 1e-3})
    assert images.row_of(workdir).changes == "optimizer.lr=0.001"


def test_other_runs_are_refused(tmp_path, capsys):
    workdir = finished(tmp_path / "run", "digits")
    with pytest.raises(UserError, match="trained pola_pvt_nano on sklearn_digits, expected pola_pvt_nano or pola_swin"):
        images.row_of(workdir)
    assert results.main(["--dir", str(tmp_path), "add", str(workdir)]) == 1
    (workdir / "config.json").write_text("{")
    assert results.main(["--dir", str(tmp_path), "add", str(workdir)]) == 1
    assert "is damaged" in capsys.readouterr().err


def test_what_was_not_run_is_a_dash():
    table = images.table([], [])
    assert len(table.splitlines()) == 2 + len(images.MODELS) * len(images.VARIANTS)
    assert line_of(table, "Pola-Swin", "α = 1")[2:] == ["–"] * 6


def test_seeds_are_one_line_with_time_and_memory_of_a_step():
    found = [
        dataclasses.replace(ROW, attention="relu", alpha=None, seed=seed, accuracy=86.0 + seed) for seed in (0, 1, 2)
    ]
    expected = ["972,874", "87.00 ± 1.00", "3", "800", "250", "300"]
    assert line_of(images.table(found, [STEP]), "Pola-PVT", " relu |")[2:] == expected


def test_other_settings_are_lines_of_their_own():
    found = [ROW, dataclasses.replace(ROW, steps=20), dataclasses.replace(ROW, changes="optimizer.lr=0.001")]
    table = images.table(found, [])
    assert line_of(table, "Pola-PVT", "optimizer.lr=0.001")[1] == "polarity, α = 4; optimizer.lr=0.001"
    assert line_of(table, "Pola-PVT", " 20 ")[3:5] == ["86.25", "1"]
    other = dataclasses.replace(ROW, alpha=2.0)
    assert line_of(images.table([other], []), "α = 2")[3] == "86.25"


def test_all_variants_have_the_same_number_of_parameters_to_one_percent():
    for model in images.MODELS:
        counts = []
        for variant in images.VARIANTS:
            options = [f"{name}={value}" for name, value in variant._asdict().items() if value is not None]
            name = model.removeprefix("pola_").removesuffix("_nano")
            text = f"fashion_mnist:{name},{','.join(options)}"
            assert dataclasses.replace(STEP, config=text).place() == (model, variant)
            counts.append(experiment(text).parameter_count)
        assert max(counts) < 1.01 * min(counts), model


def test_a_step_of_another_recipe_is_refused():
    with pytest.raises(UserError, match="recipe 'digits': expected one of fashion_mnist"):
        images.table([], [dataclasses.replace(STEP, config="digits")])


def test_weights_chosen_by_test_accuracy_are_refused(tmp_path):
    workdir = finished(tmp_path / "run", "fashion_mnist:pvt,steps=20")
    result = json.loads((workdir / "eval.json").read_text())
    (workdir / "eval.json").write_text(json.dumps({**result, "step": 10}))
    with pytest.raises(UserError, match="is of step 10 of 20: checkpoints were chosen by test accuracy"):
        images.row_of(workdir)


@pytest.mark.parametrize("file, missing", [("training", "seconds"), ("eval", "accuracy")])
def test_a_damaged_work_directory_is_named(tmp_path, file, missing):
    workdir = finished(tmp_path / "run", "fashion_mnist:pvt,steps=20")
    path = workdir / f"{file}.json"
    content = json.loads(path.read_text())
    del content[missing]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{file}.json has no {missing}: evaluate this work directory"):
        images.row_of(workdir)


def test_a_folder_that_does_not_exist_is_no_empty_one(tmp_path, capsys):
    for arguments in ([], ["page", "--docs", str(ROOT / "docs")]):
        assert results.main(["--dir", str(tmp_path / "nowhere"), *arguments]) == 1
        assert "--dir" in (said := capsys.readouterr().err) and "does not exist" in said


def test_a_page_is_written_as_a_whole(tmp_path, capsys):
    docs, folder = tmp_path / "docs", tmp_path / "results"
    docs.mkdir()
    rows.append(folder / page.IMAGES, ROW)
    assert results.main(["--dir", str(folder), "page", "--docs", str(docs)]) == 1
    assert "long_range_arena.md does not exist" in capsys.readouterr().err
    for table in page.TABLES:
        (docs / table.page).write_text(f"# Title\n\n{page.begin(table.name)}\n{page.end(table.name)}\n\nMore.\n")
    assert results.main(["--dir", str(folder), "page", "--docs", str(docs)]) == 0
    assert "| Pola-PVT | polarity, α = 4 | 972,874 | 86.25 |" in (docs / "comparison.md").read_text()
    for name in page.PICTURES:
        assert (docs / name).read_bytes().startswith(b"\x89PNG" if name.endswith(".png") else b"<?xml"), name
    assert (docs / "long_range_arena.md").read_text().endswith("\n\nMore.\n")


def test_the_picture_has_a_mark_for_each_seed_of_one_setting(tmp_path):
    shorter = dataclasses.replace(ROW, steps=5, accuracy=10.0)
    changed = dataclasses.replace(ROW, changes="optimizer.lr=0.1", accuracy=20.0)
    figure = images.draw([shorter, changed, ROW, dataclasses.replace(ROW, seed=1, accuracy=87.0)])
    lines = [list(line.get_xdata()) for line in figure.axes[0].lines if line.get_xdata().size]
    assert lines == [[86.25, 87.0], [86.625, 86.625]]
    figures.save(figure, tmp_path / "comparison.png")
