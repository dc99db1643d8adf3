"""`benchmark ceilings`: how fast a device multiplies matrices, and reads and writes memory."""

import csv
import types

import pytest

from polaformer_jax.benchmark import ceilings
from polaformer_jax.cli.benchmark import main

SMALL = ("--side=64", "--mib=1", "--calls=2", "--seconds=0")


def test_both_are_measured_and_written(tmp_path, capsys):
    path = tmp_path / "ceilings.csv"
    assert main(["ceilings", *SMALL, "--dtypes", "float32", "bfloat16", f"--csv={path}"]) == 0
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [(row["ceiling"], row["dtype"], row["unit"], row["calls"]) for row in rows] == [
        ("product", "float32", "TFLOP/s", "2"),
        ("product", "bfloat16", "TFLOP/s", "2"),
        ("memory", "float32", "GB/s", "2"),
    ]
    for row in rows:
        assert 0 < float(row["rate_least"]) <= float(row["rate"]) <= float(row["rate_greatest"])
        assert (row["published"], row["device"]) == ("", "cpu")  # nobody publishes a CPU's
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_rates_are_the_work_of_the_arrays_over_the_time(monkeypatch):
    """Two operations for each product of a matrix product; an array is read, and one like it written."""
    h100 = types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(ceilings.jax, "devices", lambda: [h100])
    monkeypatch.setattr(ceilings, "seconds_of", lambda call: 0.5)
    wide, narrow, memory = ceilings.measure(["float32", "bfloat16"], side=100, mib=3, calls=1, seconds=0)
    assert wide.rate == narrow.rate == pytest.approx(2 * 100**3 / 0.5 / 1e12)
    assert memory.rate == pytest.approx(2 * 3 * 2**20 / 0.5 / 1e9)
    assert (wide.peak, narrow.peak, memory.peak) == (None, 989, 3350)
    assert [line.split()[-1] for line in ceilings.table([wide, narrow, memory]).splitlines()[1:]] == ["-", "0%", "0%"]


@pytest.mark.parametrize(
    ("option", "message"), [("--side=0", "--side has 0"), ("--mib=-1", "--mib has -1"), ("--calls=0", "--calls has 0")]
)
def test_what_cannot_be_is_an_error(option, message, capsys):
    assert main(["ceilings", *SMALL, option]) == 1
    assert message in capsys.readouterr().err
