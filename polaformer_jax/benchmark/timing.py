"""Timing for comparisons: calls take turns, so that a slow phase of a shared machine affects all alike."""

import resource
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax

Name = TypeVar("Name", bound=Hashable)

_FEW_PAGES = 1024  # of 4 KiB each


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


def warm(call: Callable[[], object], *, most: int = 30, seconds: float = 20.0) -> None:
    """Calls it until two calls in a row take no new memory from the system, at most `most` times or for `seconds`.

    Where freed memory is kept (`host_memory.keep_freed_memory`) the heap grows for some ten calls until the blocks of a
    program fit in, and they take up to a third longer than those that follow.
    """
    began, settled = time.perf_counter(), 0
    for _ in range(most):
        before = _page_faults()
        jax.block_until_ready(call())
        settled = settled + 1 if _page_faults() - before < _FEW_PAGES else 0
        if settled == 2 or (settled == 0 and time.perf_counter() - began > seconds):
            return


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


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
