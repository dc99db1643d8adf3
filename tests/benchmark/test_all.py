"""`benchmark all`: parts that run one after the other, each in a process of its own."""

import argparse
import csv
import importlib

import pytest

from polaformer_jax.benchmark import all as everything
from polaformer_jax.cli.benchmark import SUBJECTS, main
from tests.benchmark.test_model import checkout  # noqa: F401


def arguments_of(subject, words):
    """What a benchmark's own parser makes of arguments."""
    parser = argparse.ArgumentParser()
    importlib.import_module(f"polaformer_jax.benchmark.{subject}").add_arguments(parser)
    return parser.parse_args(words)


def test_the_parts_are_benchmarks_with_options_that_they_have(tmp_path, checkout):  # noqa: F811
    words = [f"--out={tmp_path}", f"--official={checkout}", "--official-by", "eager", "compiled"]
    given = dict(everything.commands(arguments_of("all", words)))
    assert given.keys() == everything.PARTS.keys()
    for name, part in given.items():
        assert part[0] in SUBJECTS
        parsed = arguments_of(part[0], part[1:])
        assert parsed.csv == f"{tmp_path / name}.csv"
        if part[0] == "model":
            assert (parsed.official, parsed.official_by) == (str(checkout), ["eager", "compiled"])


def test_a_part_that_fails_stops_no_other_and_is_named(tmp_path, monkeypatch, capfd):
    small = ("ceilings", "--side=16", "--mib=1", "--calls=1", "--seconds=0")
    monkeypatch.setattr(everything, "PARTS", {"bad": ("ceilings", "--side=0"), "good": small})
    out = tmp_path / "new" / "results"
    assert main(["all", f"--out={out}"]) == 1
    rows = list(csv.DictReader((out / "good.csv").read_text().splitlines()))
    assert [row["ceiling"] for row in rows] == ["product", "product", "memory"]
    messages = capfd.readouterr().err
    assert "error: --side has 0" in messages and f"bad failed, see above; the other parts are in {out}" in messages


def test_what_cannot_be_is_found_at_once(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["all", f"--out={tmp_path / 'file'}"]) == 1
    assert "cannot be created" in capsys.readouterr().err
    assert main(["all", f"--out={tmp_path}", "--official=/nonexistent"]) == 1
    assert "there is no models/pola_pvt.py in it" in capsys.readouterr().err


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_benchmark_has_a_help(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert f"benchmark {name}" in capsys.readouterr().out
