"""`benchmark attention` and `benchmark length`: attentions against the number of tokens."""

import csv
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polaformer_jax.benchmark import attention, length, length_plot
from polaformer_jax.benchmark.sweep import Point
from polaformer_jax.benchmark.timing import Timing
from polaformer_jax.cli.benchmark import main
from polaformer_jax.files import figures
from tests.support.recipes import recipe


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def point(tokens, attention, mode, ms):
    """A measured point, or one that was left out where the milliseconds are None."""
    if ms is None:
        return Point(tokens, attention, mode, None, None)
    program = types.SimpleNamespace(memory=ms * 2**20, seconds=1.0, flops=1e9)
    return Point(tokens, attention, mode, program, Timing(ms / 1e3, ms / 2e3, ms / 500, 10))


def points(polarity, softmax, lengths=(256, 512, 1024)):
    """Of both modes; relu takes a millisecond."""
    return [
        point(tokens, name, mode, ms)
        for mode in length.MODES
        for tokens, *times in zip(lengths, polarity, softmax, [1] * len(lengths), strict=True)
        for name, ms in zip(("polarity", "softmax", "relu"), times, strict=True)
    ]


# --- attention


@pytest.mark.slow
def test_the_attentions_are_measured_and_written(tmp_path, capsys):
    path = tmp_path / "attention.csv"
    given = ["--tokens", "16", "4", "--heads=2", "--width=4", "--batch-size=3", "--calls=2", "--seconds=0"]
    assert main(["attention", *given, f"--csv={path}"]) == 0
    rows = rows_of(path)
    assert [(row["tokens"], row["mode"], row["attention"]) for row in rows] == [
        (tokens, mode, name)
        for tokens in ("4", "16")
        for mode in ("forward", "gradient")
        for name in ("polarity", "softmax", "floor")
    ]
    assert {(row["batch"], row["heads"], row["width"], row["dtype"]) for row in rows} == {("3", "2", "4", "float32")}
    for row in rows:
        assert 0 < float(row["ms_least"]) <= float(row["ms"]) <= float(row["ms_greatest"])
        assert row["calls"] == "2" and float(row["compiler_memory_gib"]) >= 0
    by_name = {(row["attention"], row["tokens"]): float(row["gflops"]) for row in rows if row["mode"] == "forward"}
    assert by_name["polarity", "16"] == pytest.approx(4 * by_name["polarity", "4"], rel=1e-3)  # linear
    assert by_name["softmax", "16"] == pytest.approx(16 * by_name["softmax", "4"], rel=1e-3)  # quadratic
    assert by_name["floor", "16"] == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5 and printed[0].split()[-2:] == ["softmax/polarity", "polarity/floor"]


def test_the_ratio_is_of_the_medians_and_a_dash_where_one_is_left_out():
    measured = [
        point(tokens, name, mode, ms)
        for mode in attention.MODES
        for tokens, times in ((49, (2.0, 1.0)), (196, (4.0, 10.0)), (784, (8.0, None)))
        for name, ms in zip(("polarity", "softmax"), times, strict=True)
    ]
    lines = [line.split() for line in attention.table(measured).splitlines()]
    assert [line[-1] for line in lines[1:4]] == ["0.50", "2.50", "-"]
    assert lines[3][-3:] == ["-", "-", "-"]  # time, memory, ratio


def test_both_attentions_see_queries_keys_and_values_of_one_size():
    sizes = attention.Sizes(batch=2, heads=2, width=4, dtype="bfloat16")
    ours, theirs = (attention.arguments(name, 9, sizes) for name in ("polarity", "softmax"))
    for name in "qkv":
        assert ours[name].dtype == theirs[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(ours[name].reshape(2, 9, 2, 4), theirs[name])
    assert attention.polarity(ours).shape == (2, 9, 8)


# --- length


@pytest.mark.slow
def test_time_memory_and_plot_of_the_sequence_model(tmp_path, capsys):
    table, plot = tmp_path / "length.csv", tmp_path / "length.svg"
    given = ["--lengths=8", "--batch-size=2", "--calls=1", "--seconds=0", f"--csv={table}", f"--plot={plot}"]
    assert main(["length", *given]) == 0
    rows = rows_of(table)
    assert [(row["mode"], row["attention"]) for row in rows] == [
        (mode, name) for mode in ("forward", "training") for name in ("polarity", "softmax", "relu")
    ]
    assert {(row["tokens"], row["batch"], row["task"], row["dtype"]) for row in rows} == {
        ("8", "2", "listops", "float32")
    }
    assert all(float(row["ms"]) > 0 and float(row["gflops"]) > 0 for row in rows)
    assert plot.read_text().startswith("<?xml")
    assert capsys.readouterr().out.splitlines()[-1].startswith("polarity is faster than softmax: forward ")


@pytest.mark.parametrize(
    ("polarity", "softmax", "expected"),
    [
        ((4, 6, 8), (1, 7, 20), 512),
        ((4, 6, 8), (5, 7, 20), 256),
        ((4, 6, 8), (1, 5, 8), None),  # level is not faster
        ((4, 6, 8), (1, 5, None), None),  # what was left out is not compared
    ],
)
def test_the_crossover_is_the_first_length_at_which_polarity_is_faster(polarity, softmax, expected):
    measured = points(polarity, softmax)
    assert length.crossover(measured, "forward") == length.crossover(measured[::-1], "forward") == expected
    place = "at none of these lengths" if expected is None else f"first at {expected:,} tokens"
    last = length.table(measured).splitlines()[-1]
    assert last == f"polarity is faster than softmax: forward {place}, training {place}"


def test_what_was_left_out_is_a_dash():
    lines = [line.split() for line in length.table(points((4, 6, 8), (1, 5, None))).splitlines()]
    assert lines[3] == ["forward", "1,024", "8.000", "(4.000", "-", "16.000)", "0.008", "-", "-", *lines[3][9:]]


def test_the_plot_has_logarithmic_axes_every_point_and_the_crossover(tmp_path):
    measured = points((4, 6, 8), (1, 7, None))
    crossovers = {"forward": 512, "training": None}
    figure = length_plot.draw(measured, modes=length.MODES, attentions=length.ATTENTIONS, crossovers=crossovers)
    forward, training = figure.axes[:2]
    assert all((axes.get_xscale(), axes.get_yscale()) == ("log", "log") for axes in figure.axes)
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in forward.lines}
    assert drawn["polarity"] == ([256, 512, 1024], [4, 6, 8])
    assert drawn["softmax"] == ([256, 512], [1, 7])
    assert len(forward.lines) == len(training.lines) + 1  # the crossover's
    figures.save(figure, tmp_path / "a.svg")
    assert b"polarity faster: 512" in (tmp_path / "a.svg").read_bytes()


def test_the_batch_is_of_full_sequences_or_pairs():
    config = recipe("lra", "retrieval")
    config.train.batch_size = 3
    batch = length.batch(config, 16)
    assert (batch["tokens"].shape, batch["length"].shape, batch["mask"].shape) == ((3, 2, 16), (3, 2), (3,))
    assert np.all(batch["length"] == 16) and np.all(batch["mask"]) and np.all(batch["tokens"] > 0)
    traced = length.job(16, "softmax", "forward", config=config).trace()
    assert jax.tree.leaves(traced.out_info)[0].shape == (3, 2)


@pytest.mark.parametrize(
    ("subject", "options", "message"),
    [
        ("attention", ["--tokens=50"], "--tokens has 50: expected square numbers"),
        ("attention", ["--width=5"], "--width is 5: expected an even number"),
        ("attention", ["--heads=0"], "--heads has 0: expected more than 0"),
        ("attention", ["--max-memory-gib=0"], "--max-memory-gib has 0"),
        ("length", ["--lengths=-4"], "--lengths has -4: expected more than 0"),
        ("length", ["--plot=length.gif"], "expected the name of a .png or .svg file"),
        ("length", ["--config=configs/pola_pvt.py:t"], "its task is image, expected one of listops"),
        ("length", ["--calls=0"], "--calls has 0"),
    ],
)
def test_what_cannot_be_is_an_error(subject, options, message, capsys):
    assert main([subject, *options]) == 1
    assert message in capsys.readouterr().err
