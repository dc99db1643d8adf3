"""`benchmark start` measures new processes, and that a compilation cache shortens them."""

import csv
import os
import sys

import pytest

from polaformer_jax.benchmark import start
from polaformer_jax.benchmark.ours import Case
from polaformer_jax.cli.benchmark import main
from polaformer_jax.errors import UserError
from tests.benchmark.test_model import checkout  # noqa: F401

CASE = Case("pola_pvt_nano", 32, 2, "float32")


@pytest.mark.slow
def test_processes_start_cold_warm_and_with_the_official_code(checkout, tmp_path, capsys):  # noqa: F811
    path = tmp_path / "start.csv"
    given = ["--models=pola_pvt_nano", "--batch-sizes=2", "--calls=1", f"--csv={path}", f"--official={checkout}"]
    assert main(["start", *given, f"--official-python={sys.executable}"]) == 0
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["code"] for row in rows] == [start.COLD, start.WARM, "official"]
    assert {row["platform"] for row in rows} == {"cpu"}
    assert float(rows[0]["start_s"]) > float(rows[2]["start_s"]) > 0  # the fake one imports and computes nothing
    log = (checkout / "models/log.json").read_text()
    assert log.count("call (2, 3, 32, 32)") == 1  # the first logits, without a warm-up before
    assert f"{start.WARM}  " in capsys.readouterr().out


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path):
    start.start(CASE, str(tmp_path))
    compiled = {entry.name for entry in os.scandir(tmp_path)}
    assert any("lambda" in name for name in compiled)
    start.start(CASE, str(tmp_path))
    assert {entry.name for entry in os.scandir(tmp_path)} >= compiled
    assert {name for name in os.listdir(tmp_path) if name.endswith("-cache")} == {
        name for name in compiled if name.endswith("-cache")
    }


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(UserError, match="pola_pvt_nano 33 x 33.*new process: .*img_size"):
        start.start(CASE._replace(img_size=33), str(tmp_path))


def test_what_cannot_be_is_an_error(capsys):
    assert main(["start", "--models=pola_pvt_x"]) == 1
    assert "unknown model 'pola_pvt_x'" in capsys.readouterr().err
    assert main(["start", "--calls=0"]) == 1
    assert "--calls has 0: expected more than 0" in capsys.readouterr().err
