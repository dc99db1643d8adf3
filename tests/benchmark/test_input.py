"""`benchmark input` measures every stage and the whole, on images of its own."""

import csv

import pytest
from PIL import Image

from polaformer_jax.benchmark import input as benchmark
from polaformer_jax.cli.benchmark import main


def test_every_rate_is_measured_and_written(tmp_path, capsys):
    table = tmp_path / "rates.csv"
    options = ["--images=8", "--batch-size=4", "--repetitions=1", f"--csv={table}"]
    assert main(["input", *options]) == 0
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["name"] for row in rows] == [
        *benchmark.STAGES,
        "decode + crop + augment, bare loop",
        "pipeline, 0 workers",
        "pipeline, 1 worker",
    ]
    assert all(float(row["images_per_s"]) > 0 for row in rows)
    printed = capsys.readouterr().out
    assert all(row["name"] in printed for row in rows)
    assert "pipeline, 1 worker: " in printed


def test_the_images_are_like_imagenets_and_all_differ(tmp_path):
    benchmark.make_photographs(tmp_path, 6)
    paths = sorted(tmp_path.glob("train/*/*.jpeg"))
    assert len({path.read_bytes() for path in paths}) == 6
    assert {path.parent.name for path in paths} == {"photograph_0", "photograph_1"}
    assert all(30_000 < path.stat().st_size < 300_000 for path in paths)
    for path in paths:
        with Image.open(path) as image:
            assert image.size == (500, 375)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images=3"], "images is 3, batch size 64"),
        (["--repetitions=0"], "repetitions 0"),
        (["--config=configs/none.py:t"], "config 'configs/none.py': no such file"),
        (["--official=/nonexistent"], "there is no data/build.py in it; expected a checkout"),
    ],
)
def test_what_cannot_be_is_an_error(options, message, capsys):
    assert main(["input", *options]) == 1
    assert message in capsys.readouterr().err


def test_an_official_checkout_that_does_not_import_says_what_is_missing(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("")
    (tmp_path / "data" / "build.py").write_text("import no_such_package_at_all\n")
    assert main(["input", f"--official={tmp_path}"]) == 1
    error = capsys.readouterr().err
    assert "No module named 'no_such_package_at_all'" in error and "timm 0.4.12" in error
