"""`benchmark image-size`: a segmenter on growing images, each case in processes of its own."""

import csv
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from polaformer_jax.benchmark import image_size, image_size_plot, image_size_worker, programs
from polaformer_jax.benchmark.image_size_case import ATTENTIONS, MODES, Case, Program, Row
from polaformer_jax.benchmark.programs import GIB
from polaformer_jax.benchmark.sweep import Job
from polaformer_jax.benchmark.timing import Timing
from polaformer_jax.benchmark.workers import answer_of
from polaformer_jax.cli.benchmark import main
from polaformer_jax.errors import UserError
from polaformer_jax.files import figures
from polaformer_jax.hardware.costs import product_flops
from polaformer_jax.models import registry


def case(size=32, mode="forward", attention="polarity"):
    return Case("pola_pvt_nano", "semantic_fpn", "float32", size, mode, attention)


def row(size, mode, attention, ms, gib):
    """A measured row, or one that was left out where the milliseconds are None; the limit is 10 GiB."""
    program = Program(int(gib * GIB), 10 * GIB, 1.0, 1e9, "cpu", "0.10.2")
    timing = ms and Timing(ms / 1e3, ms / 2e3, ms / 500, 4)
    return Row(case(size, mode, attention), program, timing, ms and GIB, ms and "process")


def rows():
    """Of both modes; polarity grows as the pixels, softmax as their square until it does not fit."""
    return [
        found
        for mode in MODES
        for i, size in enumerate((256, 512, 1024))
        for found in (
            row(size, mode, "polarity", 10 * 4**i, 0.5 * 4**i),
            row(size, mode, "softmax", None if i == 2 else 20 * 16**i, 0.25 * 16**i),
        )
    ]


@pytest.mark.slow
def test_time_memory_and_plot_of_a_segmenter(tmp_path, capsys):
    table, plot = tmp_path / "image_size.csv", tmp_path / "image_size.svg"
    given = ["--model=pola_pvt_nano", "--sizes", "32", "--attentions", "softmax", "polarity", "--rounds=2"]
    assert main(["image-size", *given, "--calls=3", "--seconds=0", f"--csv={table}", f"--plot={plot}"]) == 0
    found = list(csv.DictReader(table.read_text().splitlines()))
    assert [(row["mode"], row["attention"]) for row in found] == [
        (mode, name) for mode in MODES for name in ("softmax", "polarity")
    ]
    for row in found:
        assert 0 < float(row["ms_least"]) <= float(row["ms"]) <= float(row["ms_greatest"]) and row["calls"] == "4"
        assert 0.001 < float(row["compiler_memory_gib"]) < 0.2 < float(row["peak_gib"]) < 2  # with Python and JAX
        assert (row["peak_by"], row["device"], row["jax"]) == ("process", "cpu", jax.__version__)
    assert plot.read_text().startswith("<?xml")
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["forward", "32", "64"]


# --- what is computed


def flops(size, attention):
    return product_flops(image_size_worker.job(case(size, attention=attention)).trace().jaxpr.jaxpr)


def test_softmax_sees_all_tokens_in_every_stage_and_polarity_is_linear():
    config = case().config().backbone
    # What grows faster than the pixels: the scores of all queries and keys, and the sums of all values, in each block.
    stages = zip(config.stage_channels, config.depths, (64, 16, 4, 1), strict=True)
    quadratic = sum(48 * depth * channels * tokens**2 for channels, depth, tokens in stages)
    small, large = (flops(size, "softmax") - flops(size, "polarity") for size in (32, 64))
    assert large - 4 * small == quadratic


def test_reductions_are_those_of_pvt():
    assert case(attention="softmax_reduced").config().backbone.reductions == (8, 4, 2, 1)
    assert case(attention="softmax").config().backbone.reductions == (1, 1, 1, 1)


def test_gradients_are_those_of_all_parameters_of_a_model_made_for_the_size():
    given = case(64, "gradient", "softmax")
    loss, grads = image_size_worker.job(given).trace().out_info
    model = registry.create_abstract(given.config())
    assert loss.shape == () and model.config.img_size == 64
    wanted = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, wanted)


# --- the process


@pytest.fixture
def small_job(monkeypatch):
    """In place of the segmenter."""
    numbers = jnp.arange(4.0)
    small = Job(lambda: jax.jit(jnp.sum).trace(numbers), lambda program: lambda: program(numbers))
    monkeypatch.setattr(image_size_worker, "job", lambda case: small)


def test_what_the_compiler_reports_is_compared_with_the_limit(small_job, monkeypatch):
    found = Program(**image_size_worker.compiled(case(), memory_gib=1))
    assert found.fits and 16 < found.memory < 10_000 and (found.limit, found.device) == (GIB, "cpu")
    assert not Program(**image_size_worker.compiled(case(), memory_gib=16 / GIB)).fits

    def refuse(trace):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(programs, "compiled", refuse)
    message = "RESOURCE_EXHAUSTED: Out of memory allocating"
    found = Program(**image_size_worker.compiled(case(), memory_gib=1))
    assert not found.fits and found.memory is None
    message = "INTERNAL"
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        image_size_worker.compiled(case(), memory_gib=1)


def test_calls_are_timed_as_often_and_as_long_as_asked(small_job):
    answer = image_size_worker.timed(case(), calls=3, seconds=0)
    assert len(answer["seconds"]) == 3 and min(answer["seconds"]) > 0
    assert answer["peak"] > 2**25 and answer["peak_by"] == "process"
    assert sum(image_size_worker.timed(case(), calls=1, seconds=0.05)["seconds"]) >= 0.05


def test_a_process_answers_with_its_last_line_and_says_why_it_fails():
    def python(code):
        return answer_of([sys.executable, "-c", code], {"n": 2}, failure="it failed: {error}")

    assert python("print('first'); import json; print(json.dumps({'m': json.loads(input())['n'] + 1}))") == {"m": 3}
    with pytest.raises(UserError, match="it failed: it ended with status 1, saying 'ValueError: n'"):
        python("raise ValueError('n')")
    with pytest.raises(UserError, match="it ended with status 0$"):
        python("pass")


def test_processes_take_turns_and_what_does_not_fit_is_not_run(monkeypatch):
    asked, peaks = [], iter((5, 3, 4, 6))

    def answer(command, question, **_):
        name = question["case"]["attention"]
        asked.append((question["what"], name, question["case"]["img_size"]))
        if question["what"] == "compiled":
            memory = None if name == "softmax_reduced" else {"polarity": 100, "softmax": 101}[name]
            return {"memory": memory, "limit": 100, "seconds": 1.0, "flops": 1.0, "device": "cpu", "jax": "0"}
        assert question["given"] == {"calls": 2, "seconds": 0.5}
        return {"seconds": [1.0, len(asked)], "peak": next(peaks), "peak_by": "process"}

    monkeypatch.setattr(image_size, "answer_of", answer)
    ended = []
    cases = [case(attention=name) for name in ATTENTIONS] + [case(64)]
    found = image_size.measure(
        cases, memory_gib=1, rounds=2, calls=3, seconds=1, after_process=lambda: ended.append(None)
    )
    assert asked == [
        *[("compiled", name, 32) for name in ATTENTIONS],
        ("compiled", "polarity", 64),
        *[("timed", "polarity", 32), ("timed", "polarity", 64)] * 2,
    ]
    assert len(ended) == 12 and [row.case for row in found] == cases
    assert found[0].timing == Timing(3.0, 1.0, 7, 4) and (found[0].peak, found[3].peak) == (4, 3)
    assert [row.timing for row in found[1:3]] == [None, None]
    assert [row.record()["compiler_memory_gib"] for row in found[1:3]] == ["0.0000", None]


# --- what is shown


def test_the_table_has_a_dash_and_the_compilers_number_for_what_was_not_run():
    lines = image_size.table(rows()[::-1]).splitlines()
    assert lines[1].split() == "forward 256 4,096 10.0 (5.0 - 20.0) 0.50 1.00 20.0 (10.0 - 40.0) 0.25 1.00".split()
    assert lines[3].split() == "forward 1,024 65,536 160.0 (80.0 - 320.0) 8.00 1.00 - 64.00 -".split()
    growth = "time grows with the pixels to the power of: polarity 1.00 (512 to 1,024), softmax 2.00 (256 to 512)"
    assert lines[-2:] == [f"forward: {growth}", f"gradient: {growth}"]


def test_one_size_has_no_growth():
    assert (
        image_size.exponent([row(256, "forward", "polarity", 1.0, 1), row(512, "forward", "polarity", None, 1)]) is None
    )


def test_the_plot_has_logarithmic_axes_and_hollow_marks_for_what_was_not_run(tmp_path):
    figure = image_size_plot.draw(rows())
    assert all((axes.get_xscale(), axes.get_yscale()) == ("log", "log") for axes in figure.axes)
    time, _, memory, _ = figure.axes

    def drawn(axes, name, face):
        return [
            (list(line.get_xdata()), list(line.get_ydata()))
            for line in axes.lines
            if (line.get_color(), line.get_markerfacecolor()) == (image_size_plot.COLOURS[name], face)
        ]

    red, blue = (image_size_plot.COLOURS[name] for name in ("softmax", "polarity"))
    assert drawn(time, "softmax", red) == [([256, 512], [20, 320])] and not drawn(time, "softmax", "white")
    assert drawn(memory, "softmax", "white") == [([512, 1024], [4, 64])]
    assert drawn(time, "polarity", blue) == [([256, 512, 1024], [10, 40, 160])]
    assert not drawn(memory, "polarity", "white")
    low, high = time.get_ylim()
    assert low < 10 and 320 < high < 1000  # the guides, which reach 2,560, do not stretch it
    figures.save(figure, tmp_path / "a.svg")
    assert b"limit: 10 GiB" in (tmp_path / "a.svg").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model=pola_swin_t"], "--model pola_swin_t is a PolaSwin, expected a PolaPVT"),
        (["--model=pola_pvt_x"], "unknown model 'pola_pvt_x'"),
        (["--sizes", "64", "100"], "img_size=100: expected a multiple of 32"),
        (["--max-memory-gib=0"], "--max-memory-gib has 0: expected more than 0"),
        (["--rounds=0"], "--rounds has 0: expected more than 0"),
        (["--seconds=-1"], "--seconds is -1"),
        (["--plot=a.gif"], "expected the name of a .png or .svg file"),
    ],
)
def test_what_cannot_be_is_an_error(options, message, capsys):
    assert main(["image-size", *options]) == 1
    assert message in capsys.readouterr().err
