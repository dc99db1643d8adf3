"""`benchmark onnx` measures exported models in a process of its own, in turns with ours and the official code."""

import csv
import importlib.util
import sys

import pytest

from polaformer_jax.benchmark import onnx
from polaformer_jax.benchmark.model import Row
from polaformer_jax.benchmark.ours import Case, Subject
from polaformer_jax.benchmark.timing import Timing
from polaformer_jax.cli.benchmark import main

pytestmark = pytest.mark.usefixtures("shallow")
TINY = ("onnx", "--models=pola_pvt_nano", "--batch-sizes=8", "--calls=2", "--seconds=0")

# Answers as the worker does, without ONNX.
FAKE = """
import json, sys
given = json.loads(sys.stdin.readline())
assert given == {
    "model": "pola_pvt_nano", "arguments": {"img_size": 32, "num_classes": 1000}, "batch": 8, "modes": ["forward"],
    "threads": 3,
}, given
print(json.dumps({"compile_s": {"forward": None}, "memory": {"forward": None}, "version": "0"}), flush=True)
for line in sys.stdin:
    assert json.loads(line) == "forward"
    print(json.dumps({"seconds": 0.5}), flush=True)
"""


def test_a_model_is_measured_in_turns_with_ours(tmp_path, monkeypatch, capsys):
    worker, path = tmp_path / "worker.py", tmp_path / "onnx.csv"
    worker.write_text(FAKE)
    monkeypatch.setattr(onnx, "_WORKER", worker)
    assert main([*TINY, "--threads=3", f"--csv={path}"]) == 0
    ours, theirs = csv.DictReader(path.read_text().splitlines())
    assert (ours["code"], theirs["code"], theirs["mode"], theirs["calls"]) == ("ours", "ONNX Runtime", "forward", "2")
    assert float(theirs["images_per_s"]) == 16
    speed = float(ours["images_per_s"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ONNX Runtime, "))
    assert line == f"ONNX Runtime, pola_pvt_nano 32 x 32, batch 8, float32: {16 / speed:.2f} x JAX"


def test_ratios_are_within_a_case():
    def row(case, code, seconds):
        timing = Timing(seconds, seconds, seconds, 1)
        return Row(case, "forward", code, 1, "cpu", Subject(lambda: 0.0, None, None, "", None), timing)

    one, eight = Case("a", 32, 1, "float32"), Case("a", 32, 8, "float32")
    rows = [row(one, "ours", 3.0), row(one, "ONNX Runtime", 2.0), row(one, "official", 5.0)]
    rows += [row(eight, "ours", 1.0), row(eight, "ONNX Runtime", 4.0)]
    assert list(onnx.ratios(rows)) == [
        "ONNX Runtime, a 32 x 32, batch 1, float32: 1.50 x JAX, 2.50 x official",
        "ONNX Runtime, a 32 x 32, batch 8, float32: 0.25 x JAX",
    ]


@pytest.mark.skipif(importlib.util.find_spec("jax2onnx") is not None, reason="jax2onnx is installed here")
def test_a_python_without_the_extra_says_what_to_install(capsys):
    assert main([*TINY, f"--onnx-python={sys.executable}"]) == 1
    error = capsys.readouterr().err
    assert "polaformer_jax[onnx]" in error and "--onnx-python" in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dtypes=bfloat16"], "--dtypes bfloat16: ONNX files are written in float32"),
        (["--onnx-python=no_such_python"], "--onnx-python no_such_python: there is no such program"),
        (["--threads=0"], "--threads has 0: expected more than 0"),
    ],
)
def test_wrong_options(arguments, message, capsys):
    assert main([*TINY, *arguments]) == 1
    assert message in capsys.readouterr().err
