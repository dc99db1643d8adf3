"""Stop requests by signals: SIGTERM from a scheduler, Ctrl-C, or the end of a terminal (unless `nohup` ignores it).

The first signal requests a stop: the run saves a checkpoint and ends with status `Interrupted.status`, on which a
scheduler may queue it again. A second one ends the process at once. Before there is a state, and after the last
checkpoint, nothing can be lost: there the first signal ends the process at once, with the same status.

Signals are read from a pipe by a thread: Python's own handlers run only between two bytecode instructions, and an
instruction that compiles a step can take minutes. (JAX has a preemption service for SIGTERM only; it excludes other
handlers, so `runtime.session` turns it off.)

Imports nothing heavy: commands import this first, before anything that takes time.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator

from polaformer_jax.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequests:
    """Receives the signals within its context, if entered in the main thread; otherwise it receives none."""

    def __init__(self):
        self.requested = False
        self._deferred = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is not threading.main_thread():
            return self
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        threading.Thread(target=self._listen, args=(reader,), daemon=True).start()
        self._wakeup_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        # The interpreter writes a signal's number to the pipe only if the signal has a Python handler, whichever it is.
        self._before = {
            number: signal.signal(number, lambda *_: None)
            for number in SIGNALS
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *exception) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._writer.close()
        self._before = {}

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the context, where there is something to save, the first signal only sets `requested`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _listen(self, reader: socket.socket) -> None:
        with reader:
            while numbers := reader.recv(1):
                if numbers[0] in SIGNALS:
                    self._receive(signal.Signals(numbers[0]))

    def _receive(self, number: signal.Signals) -> None:
        if self.requested:
            _leave(128 + number, f"{number.name} again: ending at once")
        if not self._deferred:
            _leave(Interrupted.status, f"{number.name}: ending; there was nothing to save")
        _say(f"{number.name}: a checkpoint will be saved before the end (another signal ends at once)")
        self.requested = True  # last: on it the main thread may end the process


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # a closed terminal must not keep the run from saving
        os.write(2, f"\n{text}\n".encode())


def _leave(status: int, text: str) -> None:
    _say(text)
    os._exit(status)  # from a thread; the main one may be deep in a compilation. Data workers end with their parent.
