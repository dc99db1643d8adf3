"""Timing for comparisons: calls take turns, so that a slow phase of a shared machine affects all alike."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax

Name = TypeVar("Name", bound=Hashable)


class Timing(NamedTuple):
    """Seconds per call, over many calls of one function.

    Attributes:
        median, least, greatest: seconds.
        calls: number of calls.
    """

    median: float
    least: float
    greatest: float
    calls: int


def timing_of(times: Sequence[float]) -> Timing:
    """The timing of calls that took these seconds."""
    return Timing(statistics.median(times), min(times), max(times), len(times))


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds of one call, until all arrays that it returns are ready."""
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def take_turns(
    runs: Mapping[Name, Callable[[], float]],
    *,
    calls: int,
    seconds: float,
    after_turn: Callable[[], object] = lambda: None,
) -> dict[Name, Timing]:
    """Runs all functions in turn, round after round.

    There are `calls` rounds. A turn is one call, or as many as take a round's share of `seconds`: so each
    function is called at least `calls` times and for at least `seconds`, and none runs on after the others have ended.

    Args:
        runs: functions that do their work once and return its seconds. They are already warm.
        calls: least number of calls of each.
        seconds: least time of all calls of each.
        after_turn: called after every turn, to show progress.
    """
    found: dict[Name, list[float]] = {name: [] for name in runs}
    for _ in range(calls):
        for name, run in runs.items():
            spent = run()
            found[name].append(spent)
            while spent < seconds / calls:
                found[name].append(run())
                spent += found[name][-1]
            after_turn()
    return {name: timing_of(times) for name, times in found.items()}
