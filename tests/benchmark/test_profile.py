"""`benchmark profile` says which operations of a program take how long."""

import csv

import jax
import jax.numpy as jnp
import pytest

from polaformer_jax.benchmark import profile
from polaformer_jax.cli.benchmark import main

PROGRAM = """
HloModule jit_f
%body (p: f32[4]) -> f32[4] {
  ROOT %add_multiply_fusion.2 = f32[4]{0} fusion(%p), kind=kLoop, calls=%c, metadata={op_name="jit(f)/while/body/mul"}
}
ENTRY %main {
  %while.5 = (s32[], f32[4]{0}) while(%tuple.1), condition=%c, body=%body, metadata={op_name="jit(f)/while"}
  %dot.1 = f32[8,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}, metadata={op_name="jit(f)/dot_general" source_line=3}
  %kernel.1 = f32[8,8]{1,0} custom-call(%dot.1), frontend_attributes={kernel_metadata={
"reads":"2"
}}, metadata={op_name="jit(f)/kernel/pallas_call"}
  ROOT %copy.7 = f32[8,8]{0,1} copy(%dot.1)
}
"""


def test_a_program_names_its_operations():
    assert profile.operations(PROGRAM) == {
        "add_multiply_fusion.2": ("fusion", "jit(f)/while/body/mul"),
        "while.5": ("while", "jit(f)/while"),
        "dot.1": ("dot", "jit(f)/dot_general"),
        "kernel.1": ("custom-call", "jit(f)/kernel/pallas_call"),
        "copy.7": ("copy", ""),
    }


def test_operations_of_one_kind_and_origin_are_a_row(monkeypatch):
    seen = [("dot.1", 2e-3), ("while.5", 9e-3), ("add_multiply_fusion.2", 1e-3), ("add_multiply_fusion.2", 5e-3)]
    monkeypatch.setattr(profile, "_events", lambda call, calls: iter(seen * calls))
    rows = profile.profile(None, PROGRAM, calls=2)
    assert [(row.kernel, row.origin, row.count) for row in rows] == [
        ("add_multiply_fusion", "jit(f)/while/body/mul", 2),
        ("dot", "jit(f)/dot_general", 1),
    ]
    assert [row.seconds for row in rows] == pytest.approx([6e-3, 2e-3])
    lines = [line.split() for line in profile.table(rows, top=1).splitlines()]
    assert [line[-2:] for line in lines] == [["ms", "share"], ["6.0", "75.0%"], ["2.0", "25.0%"], ["8.0", "100.0%"]]


def test_the_profiler_sees_the_operations_of_this_device():
    program = jax.jit(lambda x: jnp.sort(jnp.tanh(x @ x), axis=0)).lower(jnp.ones((256, 256))).compile()
    rows = profile.profile(lambda: program(jnp.ones((256, 256))), program.as_text(), calls=2)
    assert {row.origin.split("/")[-1] for row in rows} >= {"dot_general", "tanh", "sort"}
    assert all(row.seconds > 0 for row in rows)


def test_a_model_is_profiled(tmp_path, capsys):
    path = tmp_path / "profile.csv"
    assert main(["profile", "--model=pola_pvt_nano", "--batch-size=2", "--top=3", f"--csv={path}"]) == 0
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert any("polarity_attention" in row["origin"] for row in rows)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-2:]] == ["others", "all"]
