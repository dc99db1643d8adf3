"""How things are timed: in turns; what a program needs; and where a sweep over lengths stops."""

import types

import jax
import jax.numpy as jnp
import pytest

from polaformer_jax.benchmark import programs, timing
from polaformer_jax.benchmark.sweep import Job, sweep
from polaformer_jax.benchmark.timing import Timing, take_turns, warm
from polaformer_jax.errors import UserError
from polaformer_jax.files import tables


class Runs:
    """Things that take as long as they are told to, and a record of who ran."""

    def __init__(self, **seconds):
        self.ran = []
        self.runs = {name: lambda name=name: self._run(name) for name in seconds}
        self._seconds = {name: iter(values) for name, values in seconds.items()}

    def _run(self, name):
        self.ran.append(name)
        return next(self._seconds[name])


def test_things_take_turns_and_the_median_counts():
    given = Runs(a=[3.0, 1.0, 2.0], b=[10.0, 40.0, 20.0])
    turns = []
    timings = take_turns(given.runs, calls=3, seconds=0, after_turn=lambda: turns.append(len(given.ran)))
    assert given.ran == ["a", "b"] * 3
    assert turns == [1, 2, 3, 4, 5, 6]
    assert timings == {"a": Timing(2.0, 1.0, 3.0, 3), "b": Timing(20.0, 10.0, 40.0, 3)}


def test_a_quick_thing_is_called_again_in_its_turn_until_its_share_of_the_seconds_is_over():
    given = Runs(quick=[0.25] * 8, slow=[5.0] * 2)
    timings = take_turns(given.runs, calls=2, seconds=2.0)
    assert given.ran == [*["quick"] * 4, "slow"] * 2  # a round's share is one second
    assert (timings["quick"].calls, timings["slow"].calls) == (8, 2)


@pytest.mark.parametrize(
    "pages, calls",
    [
        ([5000, 3000, 10, 10], 4),  # until two calls in a row took no new memory
        ([0, 0], 2),
        ([5000, 10, 5000, 10, 10], 5),
        ([5000] * 8, 8),  # not for ever, where freed memory is not kept
    ],
)
def test_things_are_warm_when_their_calls_take_no_new_memory(pages, calls, monkeypatch):
    total, made = [0], []

    def call():
        total[0] += pages[len(made)]
        made.append(None)

    monkeypatch.setattr(timing, "_page_faults", lambda: total[0])
    warm(call, most=8)
    assert len(made) == calls


def test_warming_ends_when_its_time_is_over(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "_page_faults", lambda: 10_000 * len(calls))
    warm(lambda: calls.append(None), seconds=0)
    assert len(calls) == 1


def test_a_compiled_program_is_counted():
    a, b = jnp.ones((8, 16)), jnp.ones((16, 4))
    program = programs.compiled(lambda: jax.jit(jnp.matmul).trace(a, b))
    assert program.run(a, b).shape == (8, 4)
    assert program.flops == 2 * 8 * 16 * 4
    assert program.arguments == 4 * (8 * 16 + 16 * 4)
    assert program.memory >= program.arguments + 4 * 8 * 4
    assert program.seconds > 0


class Device:
    """A device that keeps account of its memory; `stats` are what it says, one after the other."""

    def __init__(self, *stats):
        self._stats = iter(stats)

    def memory_stats(self):
        held, peak = next(self._stats)
        return {"bytes_in_use": held, "peak_bytes_in_use": peak}


@pytest.mark.parametrize(
    ("stats", "expected"),
    [
        ([((100, 150), (100, 400))], 400 - 100 + 30),  # 30 bytes of arguments were there before
        ([((100, 500), (100, 500))], None),  # it was fuller before, so nothing can be told
        ([((100, 150), (100, 400)), ((100, 150), (100, 450))], 380),  # the fullest device counts
    ],
)
def test_the_peak_of_a_device_is_that_of_the_call(stats, expected):
    program = types.SimpleNamespace(arguments=30)
    calls = []
    devices = [Device(*pair) for pair in stats]
    assert programs.device_peak(program, lambda: calls.append(1), devices) == expected
    assert calls == [1]


def test_cpus_keep_no_account():
    program = types.SimpleNamespace(arguments=30)
    assert programs.device_peak(program, lambda: None, jax.devices("cpu")) is None


def test_what_does_not_fit_is_left_out_at_all_longer_lengths():
    traced = []

    def job(tokens, attention, mode):
        def trace():
            traced.append((tokens, attention))
            size = tokens**2 if attention == "square" else tokens
            return jax.jit(lambda x: x + 1).trace(jax.ShapeDtypeStruct((size,), jnp.float32))

        return Job(trace, lambda program: lambda: program(jnp.zeros(trace().args_info[0][0].shape)))

    turns = []
    points = [
        point
        for found in sweep(
            [256, 16, 64],
            job,
            attentions=("linear", "square"),
            modes=("forward",),
            calls=2,
            seconds=0,
            limit=2**14,  # bytes: 64 * 64 floats are too many, with as many results
            after_turn=lambda: turns.append(1),
        )
        for point in found
    ]
    assert [(p.tokens, p.attention, p.timing is not None) for p in points] == [
        (16, "linear", True),
        (16, "square", True),
        (64, "linear", True),
        (64, "square", False),
        (256, "linear", True),
        (256, "square", False),
    ]
    assert (256, "square") not in traced
    assert len(turns) == 6 * 2  # so that a progress bar reaches its end


def test_what_does_not_fit_though_the_compiler_said_so_is_an_error():
    def start(program):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    def job(tokens, attention, mode):
        return Job(lambda: jax.jit(jnp.sin).trace(jnp.zeros(tokens)), start)

    with pytest.raises(UserError, match="1,024 tokens, a forward: .* do not fit: lower --max-memory-gib"):
        list(sweep([1024], job, attentions=("a",), modes=("forward",), calls=1, seconds=0, limit=1e9))


def test_a_table_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="table '.*/file/table.csv' cannot be written"):
        tables.write_csv(str(tmp_path / "file" / "table.csv"), [{"a": 1}])


def test_a_dash_and_an_empty_cell_stand_for_what_is_not_known(tmp_path):
    assert (tables.number(None, ".1f"), tables.number(0.25, ".1%")) == ("-", "25.0%")
    tables.write_csv(str(tmp_path / "table.csv"), [{"a": 1, "b": None}])
    assert (tmp_path / "table.csv").read_text() == "a,b\n1,\n"
