"""The processes of a run: how they join, agree on requests and end; watchdog, debugging switches and profiler."""

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from polaformer_jax.errors import Interrupted, UserError
from polaformer_jax.training import cluster, sharding
from polaformer_jax.training.progress import log

WATCHDOG_STATUS = 70  # "internal software error" of sysexits.h


@contextlib.contextmanager
def session(config) -> Iterator[None]:
    """Joins the other processes, if `distributed.*` or the environment indicates that there are any.

    Enter it before JAX initialises its devices. An error in one process ends that process at once, whatever the others
    wait for. They notice within `distributed.heartbeat_s` that it is gone, report it and end too: by an error of a
    collective operation, with status 1, or by JAX, which aborts a waiting process (SIGABRT).

    Args:
        config: the config's `distributed` part.

    Raises:
        UserError: the part is incomplete, or the other processes do not answer.
    """
    if not _joined(config):
        yield
        return
    log.info("process %d of %d", jax.process_index(), jax.process_count())
    if jax.process_index():
        log.setLevel(logging.WARNING)  # process 0 reports what all do
    try:
        yield
    except Interrupted:  # all processes agreed on it
        jax.distributed.shutdown()
        raise
    except BaseException as error:
        try:
            _report(error)
        finally:  # a normal exit would wait for the others, which wait for this process
            os._exit(getattr(error, "status", 1))
    jax.distributed.shutdown()


def _report(error: BaseException) -> None:
    which = f"process {jax.process_index()}"
    sys.stdout.flush()
    if isinstance(error, UserError):
        print(f"error: {which}: {error}", file=sys.stderr, flush=True)
        return
    traceback.print_exception(error)
    print(
        f"error: {which} of {jax.process_count()} ended with the exception above. If it is about a connection, a"
        " barrier or a collective operation, another process is gone, and its output says why. The same command for all"
        " processes resumes from the latest checkpoint",
        file=sys.stderr,
        flush=True,
    )


def _joined(config) -> bool:
    """Joins the other processes; false where there are none."""
    given = {name: config[name] for name in ("coordinator", "num_processes", "process_id")}
    explicit = [name for name, value in given.items() if value is not None]
    if explicit and len(explicit) < 3 and not os.environ.get("JAX_COORDINATOR_ADDRESS"):
        missing = ", ".join(f"distributed.{name}" for name in given if name not in explicit)
        raise UserError(f"distributed.{explicit[0]} is given without {missing}: give all three, or none")
    named = cluster.announced_by()
    if not explicit and named is None and not cluster.may_be_tpu_vm():
        return False
    source = "distributed.*" if explicit else f"the environment ({named or 'TPU VM'})"
    jax.config.update("jax_enable_preemption_service", False)  # see `signals`
    try:
        jax.distributed.initialize(
            coordinator_address=given["coordinator"],
            num_processes=given["num_processes"],
            process_id=given["process_id"],
            local_device_ids=cluster.local_gpus(),
            heartbeat_timeout_seconds=config.heartbeat_s,
        )
    except (RuntimeError, ValueError, OSError) as error:
        on_tpu_vm = not explicit and named is None
        if on_tpu_vm and "coordinator_address" in str(error):
            return False  # JAX, too, knows of no other process
        if on_tpu_vm and isinstance(error, OSError):  # of a request to the metadata server
            raise UserError(
                f"this TPU VM's metadata server does not say which hosts belong together: {error}. If it is a single"
                " host, set TPU_SKIP_MDS_QUERY=1"
            ) from error
        raise UserError(f"the processes that {source} names could not be joined: {error}") from error
    return jax.process_count() > 1


class RequestConsensus:
    """The largest request of all processes, so that all of them save or stop at the same step.

    Called by all processes alike, at each step. With several processes the requests are reduced on the devices, after
    the work that is already enqueued there; so that no process waits, the answer is that to the previous call. A single
    process gets its own request at once.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._largest = jax.jit(jnp.max, out_shardings=sharding.replicated(mesh))
        self._pending: list[jax.Array] = []

    def __call__(self, request: int) -> int:
        """Submits a request; with several processes, returns the answer to the previous one, at first 0."""
        if jax.process_count() == 1:
            return request
        self._pending.append(self._submit(request))
        return int(self._pending.pop(0)) if len(self._pending) > 1 else 0

    def now(self, request: int) -> int:
        """The answer to this request; all processes wait for each other."""
        return request if jax.process_count() == 1 else int(self._submit(request))

    def _submit(self, request: int) -> jax.Array:
        local = np.full(len(self._mesh.local_devices), request, np.int32)
        return self._largest(jax.make_array_from_process_local_data(sharding.batch_sharding(self._mesh), local))


class Watchdog:
    """A thread that ends the process if `alive` was not called for `seconds`. Use as a context manager.

    A step that hangs (a peer that is gone, a dead device, a deadlock) hangs in C++, where no exception can be raised.
    So the stacks of all threads are written to stderr and the process ends with status 70. Existing checkpoints are
    left unchanged.

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
        """Reports progress: the activity before is done, and `what` begins."""
        self._what, self._since = what, time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(min(self._seconds / 4, 5.0)):
            still = time.monotonic() - self._since
            if still > self._seconds:
                try:
                    print(
                        f"\nerror: stuck for {still:.0f} s in: {self._what} (watchdog.step_s={self._seconds:g}). The"
                        " stacks of all threads follow; the same command resumes from the latest checkpoint.",
                        file=sys.__stderr__,
                        flush=True,
                    )
                    faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
                finally:  # also where nobody reads it any more
                    os._exit(WATCHDOG_STATUS)


def checked(config) -> contextlib.AbstractContextManager:
    """The context of a training step under `debug.nans` and `debug.transfer_guard` (for implicit transfers)."""
    stack = contextlib.ExitStack()
    if config.nans:
        stack.enter_context(jax.debug_nans(True))
    if config.transfer_guard is not None:
        stack.enter_context(jax.transfer_guard(config.transfer_guard))
    return stack


def compiler_options(config) -> dict[str, bool]:
    """Options of `Lowered.compile` for `debug.deterministic` on this backend. CPUs and TPUs are deterministic."""
    if config.deterministic and jax.default_backend() == "gpu":
        return {"xla_gpu_deterministic_ops": True}
    return {}


class Profile:
    """A trace of the steps from `log.profile_start` to before `log.profile_stop`, in `WORKDIR/profile`."""

    def __init__(self, config, workdir: epath.Path):
        self._start, self._stop = config.profile_start, config.profile_stop
        self._directory = workdir / "profile"
        self._running = False

    def before(self, step: int) -> None:
        if self._start is None:
            return
        if step == self._start:
            jax.profiler.start_trace(self._directory)
            self._running = True
        elif step == self._stop:
            self.close()

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            log.info("the trace of steps %d to %d is in %s", self._start, self._stop - 1, self._directory)
