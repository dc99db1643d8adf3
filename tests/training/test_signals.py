"""Real signals to real processes: the first asks, the second ends, and where nothing could be lost one is enough."""

import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import contextlib, signal, sys, threading, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run below nohup
from polaformer_jax.errors import Interrupted
from polaformer_jax.training.signals import StopRequests

def busy(seconds):  # as in a compilation: no handler of Python's can run meanwhile
    end = time.monotonic() + seconds
    while time.monotonic() < end and not {stop_early}:
        pass

with StopRequests() as stop:
    with stop.deferred() if {deferred} else contextlib.nullcontext():
        print("ready", flush=True)
        busy(20)
    sys.exit(Interrupted.status if stop.requested else 0)
"""


def run(*signals, deferred, stop_early="stop.requested"):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(deferred=deferred, stop_early=stop_early)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    for number in signals:
        process.send_signal(number)
        time.sleep(0.2)  # two of a kind that wait for delivery are one
    _, errors = process.communicate(timeout=30)
    return process.returncode, errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_asks_for_a_stop(number):
    status, errors = run(number, deferred=True)
    assert status == 75
    assert f"{signal.Signals(number).name}: a checkpoint will be saved" in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(number):
    status, errors = run(signal.SIGTERM, number, deferred=True, stop_early="False")
    assert status == 128 + number
    assert "again: ending at once" in errors


def test_where_nothing_can_be_lost_the_first_signal_ends_with_the_same_status():
    status, errors = run(signal.SIGTERM, deferred=False, stop_early="False")
    assert status == 75 and "nothing to save" in errors


def test_the_end_of_a_terminal_that_is_to_be_ignored_is_ignored():
    """As `nohup` starts a command."""
    from polaformer_jax.training.signals import StopRequests

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequests() as stop:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_put_back():
    from polaformer_jax.training.signals import SIGNALS, StopRequests

    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequests():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


WATCHED = """
import time
from polaformer_jax.training.runtime import Watchdog

def hang_here():
    time.sleep(60)

with Watchdog(1.0) as watchdog:
    for _ in range(4):
        watchdog.alive("a step")
        time.sleep(0.5)
    watchdog.alive("step 7")
    hang_here()
"""


@pytest.mark.slow
def test_a_stuck_step_is_shown_and_ended_and_a_watchdog_that_is_left_lets_the_program_go_on():
    left = WATCHED.replace("    hang_here()", "") + "time.sleep(2)\n"
    stuck, free = (
        subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
        for script in (WATCHED, left)
    )
    _, said = stuck.communicate(timeout=30)
    assert stuck.returncode == 70
    assert "in: step 7" in said and "hang_here" in said and "latest checkpoint" in said
    free.communicate(timeout=30)
    assert free.returncode == 0
