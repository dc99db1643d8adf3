"""Compiling ahead of time: what is read from a program, what is estimated, and how the largest batch is found."""

import csv
import dataclasses
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polaformer_jax.aot import pictures, report
from polaformer_jax.aot.attribution import OPTIMIZER, OTHER, Traffic
from polaformer_jax.aot.collectives import collectives, totals
from polaformer_jax.aot.compiling import OutOfMemoryError, compile_first, compile_step, out_of_memory
from polaformer_jax.aot.largest import largest
from polaformer_jax.aot.roofline import estimate
from polaformer_jax.aot.topologies import topology_devices
from polaformer_jax.cli import aot as command
from polaformer_jax.errors import UserError
from polaformer_jax.files import figures, tables
from polaformer_jax.hardware.chips import CHIPS, chip_of
from polaformer_jax.hardware.costs import product_flops
from tests.support.quick import FLAGS
from tests.support.recipes import digits as get_config

pytestmark = pytest.mark.usefixtures("shallow")

# --- collectives, as XLA writes them for CPUs and TPUs

PROGRAM = """\
HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

%region_0 (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (input: f32[64,32]) -> f32[8,32] {
  %all-reduce.9 = f32[64,32]{1,0:T(8,128)} all-reduce(%input), replica_groups=[1,8]<=[8], to_apply=%r
  ROOT %dynamic-slice = f32[8,32]{1,0} dynamic-slice(%all-reduce.9, %i, %z), dynamic_slice_sizes={8,32}
}

ENTRY %main (p: f32[64,32]) -> f32[64,32] {
  %ar = (f32[32]{0}, bf16[2,3]{1,0}) all-reduce(%a, %b), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%r
  %ag = f32[64,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}, \
metadata={op_name="jit(step)/gather"}
  %ags = (f32[8,32]{1,0}, f32[64,32]{1,0}) all-gather-start(%p), replica_groups=mesh['x'=4,'y'=2] {'x','y'}
  %agd = f32[64,32]{1,0} all-gather-done(%ags)
  %cps = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%q), source_target_pairs={{0,1}}
  %cpd = f32[4]{0} collective-permute-done(%cps)
  %rs = f32[8,32]{1,0} reduce-scatter(%p), replica_groups=mesh['x'=8] {'x':(1)2}, to_apply=%region_0
  %ag.2 = f32[64,128]{1,0} all-gather(%p), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}
  %f = f32[8,32]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %t = f32[64,32]{1,0} add(%agd, %all-reduce)
}
"""


def test_every_kind_is_read():
    found = collectives(PROGRAM)
    assert [(item.kind, item.bytes, item.group) for item in found] == [
        ("reduce-scatter", 1024, 8),  # what a TPU makes of an all-reduce that is cut up at once
        ("all-reduce", 140, 4),
        ("all-gather", 32768, 4),
        ("all-gather", 8192, 8),
        ("collective-permute", 16, 0),
        ("reduce-scatter", 1024, 2),
    ]
    assert found[2].source == "jit(step)/gather"
    assert found[2].shapes == (("f32", (64, 128)),)


def test_bytes_that_each_chip_sends():
    moved = {item.kind: item.moved for item in collectives(PROGRAM)[1:5]}
    assert moved == {"all-reduce": 140 * 2 * 3 / 4, "all-gather": 8192 * 7 / 8, "collective-permute": 16}
    assert collectives(PROGRAM)[0].moved == 1024 * 7


def test_totals():
    assert totals(collectives(PROGRAM)) == {
        "all-reduce": (1, 140),
        "all-gather": (2, 40960),
        "collective-permute": (1, 16),
        "reduce-scatter": (2, 2048),
    }
    assert totals([]) == {}


def test_a_real_program():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("x",), ()))
    program = jax.jit(lambda x: (x.sum(0), 2 * x), in_shardings=split, out_shardings=whole)
    found = collectives(program.lower(jnp.ones((16, 3))).compile().as_text())
    assert {(item.kind, item.bytes, item.group) for item in found} == {("all-reduce", 12, 8), ("all-gather", 192, 8)}


# --- the roofline


def flops_of(function, *shapes):
    return product_flops(
        jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).jaxpr
    )


def test_products_are_counted():
    product = 2 * 3 * 4 * 5
    assert flops_of(lambda a, b: a @ b, (3, 4), (4, 5)) == product
    assert flops_of(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (7, 3, 4), (7, 4, 5)) == 7 * product
    assert flops_of(jax.jit(lambda a, b: jnp.tanh(a @ b) + 1), (3, 4), (4, 5)) == product
    forward_and_twice_back = jax.value_and_grad(lambda a, b: (a @ b).sum(), (0, 1))
    assert flops_of(forward_and_twice_back, (3, 4), (4, 5)) == 3 * product
    twice_back = lambda a, b: forward_and_twice_back(a, b)[1]  # noqa: E731 its value is not asked for
    assert flops_of(twice_back, (3, 4), (4, 5)) == 2 * product
    scan = lambda a, b: jax.lax.scan(lambda c, x: (c, x @ b), 0.0, jnp.stack([a] * 6))  # noqa: E731
    assert flops_of(scan, (3, 4), (4, 5)) == 6 * product
    branch = lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: jnp.zeros((3, 5)))  # noqa: E731
    assert flops_of(branch, (3, 4), (4, 5)) == product
    assert flops_of(lambda a: a + a, (3, 4)) == 0


def test_convolutions_are_counted():
    def convolve(x, kernel, groups):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    assert flops_of(lambda x, k: convolve(x, k, 1), (2, 6, 6, 4), (3, 3, 4, 8)) == 2 * (2 * 6 * 6 * 8) * 9 * 4
    assert flops_of(lambda x, k: convolve(x, k, 4), (2, 6, 6, 4), (3, 3, 1, 4)) == 2 * (2 * 6 * 6 * 4) * 9


def test_a_step_takes_as_long_as_the_slowest_of_three():
    chip = chip_of("TPU v5 lite")
    found = estimate(chip, flops=197e12, memory_bytes=4 * 819e9, link_bytes=200e9)
    assert (found.compute, found.memory, found.links) == (1, 4, 1)
    assert (found.step, found.bound, found.mfu) == (4, "memory", 0.25)
    assert estimate(chip, flops=197e12, memory_bytes=0, link_bytes=0).mfu == 1


def test_chips():
    assert [chip.name for chip in CHIPS if chip.kind.startswith("TPU")] == ["v4", "v5e", "v5p", "v6e"]
    assert len({chip.kind for chip in CHIPS}) == len(CHIPS)
    assert chip_of("TPU v5 lite").flops == 197e12
    assert chip_of("cpu") is None  # no guess
    for chip in CHIPS:
        assert chip.link_bandwidth < chip.memory_bandwidth < chip.flops / 100


# --- the largest batch


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("size, base, start", [(1, 10, 8), (3, 50, 8), (0.4, 0, 1), (30, 40, 64), (200, 10, 4)])
def test_the_largest_batch(size, base, start, known):
    tried = []

    def used(examples):
        tried.append(examples)
        need = base + size * examples
        return need <= 100, need if need <= 100 or known else None

    found, most = largest(used, start=start, limit=100), int((100 - base) / size)
    assert most - max(1, most / 16) <= found <= most
    assert found == 0 or found in tried
    assert len(tried) == len(set(tried)) <= (6 if known else 10)


def test_what_the_compiler_says_of_memory():
    error = RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.")
    found = out_of_memory(error, get_config())
    assert isinstance(found, OutOfMemoryError)
    assert found.used == 20.5 * 2**30
    assert "train.batch_size=64 does not fit" in str(found)
    other = RuntimeError("INTERNAL: something else")
    assert out_of_memory(other, get_config()) is None


# --- a whole step, for fake devices


def small_config():
    config = get_config()
    config.model.kernel_size = 1
    config.train.batch_size = 16
    config.mesh.data, config.mesh.fsdp = 2, 2
    return config


@pytest.fixture(scope="module")
def program():
    """No data set is there."""
    config = small_config()
    config.data.data_dir = "nowhere"
    return compile_step(config, topology_devices("cpu:4"), num_examples=1000)


def test_a_step_is_compiled_without_data(program):
    assert (program.batch, program.mesh, program.chip) == (16, (2, 2), None)
    assert program.total_steps == 30 * (1000 // 16)
    assert program.memory > program.state + program.temporary > 0
    assert {item.kind for item in program.collectives} >= {"all-reduce", "all-gather"}
    assert program.estimate is None


def test_its_traffic_is_counted_by_part(program):
    parts = {row.module for row in program.traffic}
    assert parts >= {"MLP", "polarity attention", "heads, loss, metrics", OPTIMIZER, "augmentation"}
    assert sum(row.bytes for row in program.traffic if row.module == OTHER) < 0.01 * program.moved
    assert program.padding == 0  # a CPU's memory has no tiles
    # XLA's count here includes little that is not moved.
    assert 0.5 < program.moved / program.xla_bytes < 2
    optimizer = sum(row.bytes for row in program.traffic if row.module == OPTIMIZER)
    assert optimizer > 3 * program.state / 4  # parameters, two moments and the average, most of them split in two


def test_products_agree_with_the_count_of_xla(program):
    assert 0.7 < program.products / (4 * program.xla_flops) < 1.0  # which counts the rest of the arithmetic too


def test_it_is_described_and_written(program, tmp_path):
    text = report.describe(program)
    for part in ("batch 16 on 4 chips: mesh.data=2, mesh.fsdp=2", "all-gather", "peaks of this chip are not known"):
        assert part in text
    tables.write_csv(tmp_path / "a.csv", [report.row("cpu:4", program)])
    (row,) = csv.DictReader((tmp_path / "a.csv").read_text().splitlines())
    assert (row["model"], row["batch"], row["estimated_step_ms"]) == ("pola_pvt_nano", "16", "")
    assert float(row["all-gather_mib"]) > 0
    assert float(row["traffic_gib"]) == pytest.approx(program.moved / 2**30, abs=1e-3)
    assert float(row["padding_gib"]) == 0


def test_traffic_is_tabulated(program):
    head, *lines, total, of_xla = report.traffic_table(program).splitlines()
    assert head.split() == ["memory", "traffic,", "MiB", "forward", "backward", "both", "share", "padding", "copies"]
    assert total.startswith("all") and f"{program.moved / 2**20:.1f}" in total and "100.0 %" in total
    assert of_xla.split() == ["as", "XLA", "counts", f"{program.xla_bytes / 2**20:.1f}"]
    assert len(lines) == len({row.module for row in program.traffic})
    (optimizer,) = (line for line in lines if line.startswith(OPTIMIZER))
    assert optimizer.removeprefix(OPTIMIZER).split()[:2] == ["-", "-"]  # it has no passes
    rows = report.traffic_rows("cpu:4", program)
    moved = sum(row["read_mib"] + row["written_mib"] for row in rows)
    assert moved == pytest.approx(program.moved / 2**20, rel=1e-3)
    assert {row["pass"] for row in rows} == {"forward", "backward", ""}


def test_the_estimate_takes_the_true_traffic(program):
    chip = CHIPS[1]
    known = dataclasses.replace(program, chip=chip, xla_bytes=1e30)
    assert known.estimate.memory == pytest.approx(program.moved / chip.memory_bandwidth)


def test_what_xla_does_not_count_is_a_dash(program):
    """As for GPUs that are not present."""
    without = dataclasses.replace(program, xla_bytes=None, xla_flops=None, options={"xla_gpu_autotune_level": 0})
    text = report.describe(without)
    assert "- as XLA counts it" in text and "- on one chip as XLA counts them" in text
    assert "compiler options     xla_gpu_autotune_level=0" in text
    assert "as XLA counts" not in report.traffic_table(without)
    row = report.row("h100", without)
    assert row["xla_gib_per_chip"] is None and row["xla_flops_per_chip"] is None and row["traffic_gib"] > 0


def test_the_picture_has_a_bar_for_each_part_but_the_smallest(program, tmp_path):
    gib = 2**30
    rows = (
        Traffic("MLP", False, read=3 * gib, written=1 * gib, padding=1 * gib, copies=0),
        Traffic("MLP", True, read=4 * gib, written=2 * gib, padding=0, copies=0),
        Traffic(OPTIMIZER, False, read=1 * gib, written=1 * gib, padding=0, copies=0),
        Traffic(OTHER, False, read=1000, written=0, padding=0, copies=0),
    )
    figure = pictures.traffic(dataclasses.replace(program, traffic=rows))
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["MLP", OPTIMIZER]
    bars = [(bar.get_x(), bar.get_width()) for container in axes.containers for bar in container]
    assert bars == [(0, 3), (3, 6), (9, 1), (0, 2)]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["forward", "backward", "padding of tiles", "outside the passes"]
    assert [text.get_text() for text in axes.texts] == [" 10.00", " 2.00"]
    figures.save(pictures.traffic(program), tmp_path / "a.svg")


def test_products_that_have_no_default_are_compiled_with_the_next_options():
    tried = []

    def program(batch, options):
        tried.append(options)
        if options == {"a": 1}:
            raise jax.errors.JaxRuntimeError("INTERNAL: Couldn't find output tile sizes that satisfy hlo: %dot")
        if options == {"b": 1}:
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")
        return "compiled"

    experiment = types.SimpleNamespace(train_step=types.SimpleNamespace(program=program))
    assert compile_first(experiment, {}, [{"a": 1}, {"c": 1}]) == ("compiled", {"c": 1})
    assert tried == [{"a": 1}, {"c": 1}]
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        compile_first(experiment, {}, [{"b": 1}, {"c": 1}])


def test_times_are_called_estimates(program):
    known = dataclasses.replace(program, chip=CHIPS[1])
    times = [line for line in report.describe(known).splitlines() if " ms" in line or " h " in line or "%" in line]
    assert len(times) == 3 and all(line.startswith("ESTIMATE") for line in times)
    assert report.row("v5e:2x2", known)["estimated_step_ms"] > 0


def test_a_batch_that_cannot_be_split_is_refused():
    with pytest.raises(UserError, match="train.batch_size=6 cannot be split evenly over 4 devices"):
        compile_step(small_config(), topology_devices("cpu:4"), num_examples=1000, batch_size=6)


@pytest.mark.slow
def test_the_command(tmp_path):
    words = ["--config", "digits", "--topology", "cpu:4", "--config.mesh.fsdp=2", "--num_examples", "1437"]
    words += ["--config.model.kernel_size=1", "--traffic", "--csv", str(tmp_path / "a.csv")]
    words += ["--traffic-csv", str(tmp_path / "parts.csv"), "--traffic-plot", str(tmp_path / "parts.png")]
    line = [sys.executable, "-m", "polaformer_jax.cli", "aot", *words]
    done = subprocess.run(line, env=os.environ | {"XLA_FLAGS": FLAGS}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "batch 64 on 4 chips: mesh.data=2, mesh.fsdp=2" in done.stdout
    lines = (tmp_path / "a.csv").read_text().splitlines()
    assert lines[0].startswith("model,topology")
    assert np.isfinite(float(next(csv.DictReader(lines))["memory_gib"]))
    assert "memory traffic, MiB" in done.stdout
    parts = {row["module"] for row in csv.DictReader((tmp_path / "parts.csv").read_text().splitlines())}
    assert {"MLP", "polarity attention"} < parts
    assert (tmp_path / "parts.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_writes_no_file_over_another(tmp_path, capsys):
    name = str(tmp_path / "a.csv")
    assert command.main(["--config", "digits", "--topology", "cpu:4", "--csv", name, "--traffic-csv", name]) == 1
    assert "--csv, --traffic-csv and --traffic-plot name one file more than once" in capsys.readouterr().err
    assert command.main(["--config", "digits", "--topology", "cpu:4", "--traffic-csv", str(tmp_path)]) == 1
    assert "--traffic-csv: " in capsys.readouterr().err


def test_the_command_without_a_topology(capsys):
    assert command.main(["--config", "digits"]) == 1
    assert capsys.readouterr().err.startswith("error: --config and --topology are needed")
