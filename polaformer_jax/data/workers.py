"""Iterates over a Grain pipeline so that every failure is an error, never a hang, and no worker process is left over.

Problems of Grain (0.2) that are solved here:

- after an error, another `next` on its iterator waits forever: here the first error is final and is raised again;
- it waits forever for a worker that exits with status 0: here that status is changed, and a time limit catches every
  other stall;
- workers outlive a killed main process and keep its output open: here they watch their parent;
- Ctrl-C, a scheduler's SIGTERM and the SIGHUP of a closed terminal reach the whole process group: here workers ignore
  them, and the main process decides;
- closing waits forever for a worker that hangs: here it is killed.
"""

import contextlib
import functools
import multiprocessing
import os
import queue
import re
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from multiprocessing import resource_tracker, shared_memory
from multiprocessing.process import BaseProcess

import grain
import numpy as np
from absl import flags

from polaformer_jax.errors import UserError

_OF_THE_RUN = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}  # signals on which the main process decides
_POLL_S = 1.0  # how soon a dead parent, or a request to stop, is noticed
_START_S = 60.0  # workers start within seconds, however long the first batch takes
_CLOSE_S = 5.0  # a worker that has not finished its batch after this time is killed
_PID_BYTES = 8
_SHARED_MEMORY = "/dev/shm"
_MORE_SHARED_MEMORY = (
    "Give a container more (docker run --shm-size=8g; in Kubernetes an emptyDir with medium: Memory there), or have"
    " fewer data.workers, a smaller data.prefetch or a smaller batch; data.workers=0 needs none"
)
_IMPORTED_AGAIN = (
    "Each data worker imports the main script again: it must be a file, not standard input, and what it does must be"
    ' under `if __name__ == "__main__":`. data.workers=0 needs neither'
)


def check_start(workers: int) -> None:
    """Checks that this process can start data workers.

    Raises:
        UserError: it cannot, for it was started as a worker itself, as when a script has no main guard.
    """
    if workers and multiprocessing.current_process().daemon:
        raise UserError(f"data workers cannot be started by a process that is a worker itself. {_IMPORTED_AGAIN}")


def check_shared_memory(workers: int, prefetch: int, batches: Mapping[str, int]) -> None:
    """Checks that what workers keep ready fits into shared memory, before they are killed for it.

    Args:
        workers, prefetch: of each stream, see `Stream`.
        batches: the streams that are open at the same time, and the bytes of a batch of each.

    Raises:
        UserError: it does not fit; the message has the way out.
    """
    if not workers or not os.path.isdir(_SHARED_MEMORY):
        return
    needed = {name: workers * (prefetch + 1) * size for name, size in batches.items()}
    usage = shutil.disk_usage(_SHARED_MEMORY)
    if usage.total and sum(needed.values()) > usage.free:  # no size: it is not limited
        parts = ", ".join(f"{_mib(size)} for {name}" for name, size in needed.items())
        raise UserError(
            f"{_SHARED_MEMORY} has {usage.free >> 20:,} MiB free, but the data workers need at least"
            f" {_mib(sum(needed.values()))} there ({parts}: {workers} workers, each with {prefetch + 1} batches)."
            f" {_MORE_SHARED_MEMORY}"
        )


def _mib(size: int) -> str:
    return f"{-(-size // 2**20):,} MiB"


class Stream:
    """Batches of a Grain dataset: an iterator of dicts of NumPy arrays.

    Args:
        dataset: its elements are whole batches (dicts of arrays).
        workers: processes that compute batches; 0 computes each batch in the calling thread when it is requested.
        prefetch: batches that each worker keeps ready in shared memory; Grain keeps the same number in this process,
            and each side has one more in progress: at most `workers * (2 * prefetch + 2)` batches of memory.
        timeout_s: with workers, the longest wait for one batch; None waits as long as the workers are alive.

    `close()` ends the workers. After an error, and after `close()`, every further `next` raises.
    """

    def __init__(self, dataset: grain.MapDataset, *, workers: int, prefetch: int = 2, timeout_s: float | None = None):
        if workers < 0 or prefetch < 1:
            raise UserError(f"workers is {workers} and prefetch {prefetch}, expected at least 0 and at least 1")
        # The default options would buffer 500 batches; each worker has its own buffer, and without workers there is
        # none.
        batches = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        check_start(workers)
        self._error: Exception | None = None
        self._timeout_s = timeout_s
        self._queue: queue.Queue | None = None
        if not workers:
            self._batches = iter(batches)
            return
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads its debug flags, which raises in programs that parse no flags
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
        self._workers = _Workers(workers)
        guard = functools.partial(_guard_worker, self._workers.name)
        batches = iter(batches.mp_prefetch(options, worker_init_fn=guard))
        self._batches = None  # used only by the feeder
        self._queue = queue.Queue(maxsize=1)
        stop = threading.Event()
        # Grain's `next` may block forever; it is called in a thread, so that the main thread keeps its time limit and
        # its signals.
        feeder = threading.Thread(target=_feed, args=(batches, self._queue, stop), daemon=True)
        # Started now, because at the exit of the interpreter Python 3.12 starts no thread any more.
        closing = threading.Event()
        closer = threading.Thread(target=_close, args=(batches, closing), daemon=True)
        closer.start()
        resource_tracker.ensure_running()  # started later, it would undo the feeder's signal mask
        feeder.start()
        # Runs also when the stream is dropped without `close()`, and when the interpreter exits.
        threads = feeder, stop, closer, closing
        self._stop_workers = weakref.finalize(self, _shut_down, *threads, self._queue, self._workers)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch.

        Raises:
            UserError: raised by the dataset.
            RuntimeError: any other failure, a worker that died, or no batch in time.

        Every error is final: later calls raise it again.
        """
        if self._error:
            raise type(self._error)(*self._error.args)
        try:
            return next(self._batches) if self._queue is None else self._take()
        except Exception as error:
            # A StopIteration would end the run as if nothing had failed; the data here never ends.
            kind = UserError if isinstance(error, UserError) else RuntimeError
            self._error = kind(self._explained(error))
            self.close()
            raise kind(*self._error.args) from error

    def _explained(self, error: Exception) -> str:
        """The text of an error; where a worker of Grain's ended by itself, with the probable cause."""
        text = str(error) or f"the input ended with {type(error).__name__}"
        if self._queue is None or (ended := re.search(r"exit code (-?\d+)", text)) is None:
            return text
        if int(ended[1]) == -signal.SIGBUS:
            return f"a data worker ended for want of shared memory ({_SHARED_MEMORY} is full). {_MORE_SHARED_MEMORY}"
        return text if self._workers.pids() else f"{text}, before it began. {_IMPORTED_AGAIN}"

    def _take(self) -> dict[str, np.ndarray]:
        try:
            batch, error = self._queue.get(timeout=self._timeout_s)
        except queue.Empty:
            raise RuntimeError(f"no batch in {self._timeout_s} s (data workers: {self._workers.states()})") from None
        if error is not None:
            raise error
        return batch

    def close(self) -> None:
        """Stops the workers and waits for them. May be called more than once."""
        self._error = self._error or RuntimeError("the data stream is closed")
        self._batches = None
        if self._queue is not None:
            self._stop_workers()


def _feed(batches, out: queue.Queue, stop: threading.Event) -> None:
    """Moves batches from Grain to `out` as (batch, None), until an error, which becomes (None, error)."""
    # The threads and processes that Grain starts from here inherit this mask: workers block the signals meant for the
    # main process from the start, a second before `_guard_worker` runs in them.
    signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_RUN)
    error = None
    while error is None and not stop.is_set():
        batch = None
        try:
            # Worker batches are in shared memory, which is limited and freed with the last reference. JAX on a CPU may
            # keep such a reference for as long as its array lives, so they are copied (20 MB take 3 ms).
            batch = {name: np.array(value) for name, value in next(batches).items()}
        except BaseException as e:
            error = e
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                out.put((batch, error), timeout=_POLL_S)
                break


class _Workers:
    """The worker processes of a stream. Each enters its process id in shared memory as it starts.

    Only these are ever killed: other child processes of the program, and the workers of other streams, are not here.
    """

    def __init__(self, count: int):
        self._count = count
        self._memory = shared_memory.SharedMemory(create=True, size=count * _PID_BYTES)
        self._memory.buf[:] = bytes(self._memory.size)
        self._deadline = time.monotonic() + _START_S

    @property
    def name(self) -> str:
        """Of the shared memory, for `enter`."""
        return self._memory.name

    @staticmethod
    def enter(name: str, index: int) -> None:
        """Makes the calling process known as the worker of this index.

        Raises:
            FileNotFoundError: the stream has been closed.
        """
        memory = shared_memory.SharedMemory(name)
        memory.buf[index * _PID_BYTES : (index + 1) * _PID_BYTES] = os.getpid().to_bytes(_PID_BYTES, "little")
        memory.close()

    def pids(self) -> list[int]:
        """Of the workers that have started so far."""
        slots = bytes(self._memory.buf[: self._count * _PID_BYTES])
        found = (int.from_bytes(slots[i : i + _PID_BYTES], "little") for i in range(0, len(slots), _PID_BYTES))
        return [pid for pid in found if pid]

    def states(self) -> str:
        """For messages: which of them run."""
        running = {process.pid for process in self._running()}
        listed = [f"{pid} {'runs' if pid in running else 'has ended'}" for pid in self.pids()]
        return ", ".join(listed + ["not started"] * (self._count - len(listed)))

    def wait_for_start(self, needed: Callable[[], bool]) -> None:
        """Returns when all have started, as long as `needed` is true, or when they should have started long ago."""
        while len(self.pids()) < self._count and needed() and time.monotonic() < self._deadline:
            time.sleep(0.01)

    def kill(self) -> None:
        """Kills those that run, and waits for them."""
        for process in self._running():
            process.kill()  # SIGTERM would be ignored
            process.join()

    def free(self) -> None:
        """Gives the shared memory back; a worker that starts after this ends at once."""
        self._memory.close()
        self._memory.unlink()

    def _running(self) -> list[BaseProcess]:
        pids = set(self.pids())
        return [process for process in multiprocessing.active_children() if process.pid in pids]


def _close(batches, closing: threading.Event) -> None:
    """Closes Grain's iterator once `closing` is set, which waits for a batch from every worker."""
    closing.wait()
    batches.close()


def _shut_down(
    feeder: threading.Thread,
    stop: threading.Event,
    closer: threading.Thread,
    closing: threading.Event,
    out: queue.Queue,
    workers: _Workers,
) -> None:
    """Stops threads and workers; normally within the time of a batch, at most a few `_CLOSE_S`."""
    stop.set()
    with contextlib.suppress(queue.Empty):
        out.get_nowait()  # wakes the feeder
    feeder.join(_CLOSE_S)  # before Grain closes, which would leave a pending `next` waiting forever
    if feeder.is_alive():  # a worker hangs; once it is killed, Grain raises
        workers.wait_for_start(feeder.is_alive)
        workers.kill()
        feeder.join(_CLOSE_S)
    closing.set()
    closer.join(_CLOSE_S)
    workers.kill()
    workers.free()


def _guard_worker(known_as: str, index: int, count: int) -> None:
    """Runs first in every worker process; `known_as` is the name of its stream's `_Workers`."""
    del count
    for number in _OF_THE_RUN:
        signal.signal(number, signal.SIG_IGN)
    leave = os._exit
    # Grain takes status 0 for a normal exit and keeps waiting; only a worker's own code can end it in this way.
    os._exit = lambda status: leave(status or 1)
    parent = multiprocessing.parent_process().pid
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    try:
        _Workers.enter(known_as, index)
    except FileNotFoundError:  # closed meanwhile: nobody waits for this worker
        leave(1)


def _exit_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os._exit(1)  # no clean-up: the process at the other end of the queues is gone
