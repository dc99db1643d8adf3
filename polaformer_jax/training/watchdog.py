"""Ends a run that is stuck, after showing where."""

import faulthandler
import os
import sys
import threading
import time

STATUS = 70  # "internal software error" of sysexits.h


class Watchdog:
    """A thread that ends the process when no `alive()` came for `seconds`. Use as a context manager.

    A step that hangs (a peer that is gone, a dead device, a deadlock) hangs in C++: no exception can be raised there.
    So the stacks of all threads are written to stderr and the process ends with status 70. The checkpoints that there
    are stay as they are.

    Args:
        seconds: None watches nothing.
    """

    def __init__(self, seconds: float | None):
        self._seconds = seconds
        self._ended = threading.Event()
        self._what, self._since = "starting", time.monotonic()

    def __enter__(self) -> "Watchdog":
        self._since = time.monotonic()
        if self._seconds is not None:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._ended.set()

    def alive(self, what: str) -> None:
        """Something was done; `what` begins."""
        self._what, self._since = what, time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(min(self._seconds / 4, 5.0)):
            still = time.monotonic() - self._since
            if still > self._seconds:
                print(
                    f"\nerror: stuck for {still:.0f} s in: {self._what} (watchdog.step_s={self._seconds:g}). The stacks"
                    " of all threads follow; the same command goes on from the latest checkpoint.",
                    file=sys.__stderr__,
                    flush=True,
                )
                faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
                os._exit(STATUS)
