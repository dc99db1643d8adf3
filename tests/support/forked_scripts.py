"""Entry scripts as processes that work together, forked from one in which everything is imported: they start at once.

What a process compiles it finds again in JAX's cache, when it is started anew.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from tests.support import ROOT
from tests.support.clusters import Environment
from tests.support.quick import FLAGS

LIMIT_S = 400  # for a group to end, and for what is waited for in its midst
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["tensorflow", "clu.metric_writers", "grain", "orbax.checkpoint", "polaformer_jax.training.loop"]
)


class SlowFiles(NamedTuple):
    """Files below `folder` that are slow for some processes: each access takes so many seconds longer.

    An access is what Python tells its audit hooks of: opening, listing, renaming, removing, and making folders. Array
    files, which TensorStore opens, are not slower; their folders and all that surrounds them are.
    """

    folder: Path
    seconds: float
    processes: Collection[int]

    def enter(self) -> None:
        """Makes the files slow for the calling process."""
        folder = str(self.folder)

        def wait(event: str, arguments: tuple) -> None:
            if event in _FILE_EVENTS and str(arguments[0]).startswith(folder):
                time.sleep(self.seconds)

        sys.addaudithook(wait)


_FILE_EVENTS = {"open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


class Group:
    """`processes` times the same script, told of each other. Use as a context manager, which leaves none alive.

    Args:
      script: name of an entry script.
      arguments: its flags. The config's `distributed` part is added where there are several processes and no
        environment.
      logs: folder for what the processes print.
      devices: of each process.
      order: seed of a random order of all devices in the mesh; None: that of the processes.
      environment: that of a cluster, by which the processes find each other.
      late: seconds by which processes start later, by their index.
      slow_files: None: files take no longer than they do.
    """

    def __init__(
        self,
        script: str,
        arguments: list[str],
        *,
        processes: int,
        logs: Path,
        devices: int = 1,
        order: int | None = None,
        environment: Environment | None = None,
        late: Mapping[int, float] | None = None,
        slow_files: SlowFiles | None = None,
    ):
        self._logs, self._late = logs, late or {}
        logs.mkdir(exist_ok=True)
        together, port = [], _free_port()
        self.processes = []
        for index in range(processes):
            if processes > 1:
                together = ["--config.distributed.heartbeat_s=10"]
            if processes > 1 and environment is None:
                together += [
                    f"--config.distributed.coordinator=localhost:{port}",
                    f"--config.distributed.num_processes={processes}",
                    f"--config.distributed.process_id={index}",
                ]
            argv = [script, *arguments, *together]
            files = slow_files if slow_files and index in slow_files.processes else None
            options = (index, self._log(index), devices, order, environment, files)
            self.processes.append(_FORKS.Process(target=_run, args=(argv, *options), daemon=True))

    def _log(self, index: int) -> str:
        return str(self._logs / str(index))

    def __enter__(self) -> "Group":
        began = time.monotonic()
        for index in sorted(range(len(self.processes)), key=lambda index: self._late.get(index, 0)):
            time.sleep(max(0, began + self._late.get(index, 0) - time.monotonic()))
            self.processes[index].start()
        return self

    def __exit__(self, *exception) -> None:
        for process in self.processes:
            if process.pid is not None:
                process.kill()
                process.join()
            process.close()

    def wait_for(self, path: Path) -> None:
        """Until `path` exists."""
        deadline = time.monotonic() + LIMIT_S
        while not path.exists():
            assert time.monotonic() < deadline, f"{path} does not come: {self.errors()}"
            assert all(process.exitcode is None for process in self.processes), self.errors()
            time.sleep(0.01)

    def statuses(self) -> list[int]:
        """Those with which the processes end; negative: the signal that ended one."""
        deadline = time.monotonic() + LIMIT_S
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
            assert process.exitcode is not None, f"still running after {LIMIT_S} s: {self.errors()}"
        return [process.exitcode for process in self.processes]

    def output(self, index: int) -> str:
        return Path(f"{self._log(index)}.out").read_text()

    def error(self, index: int) -> str:
        return Path(f"{self._log(index)}.err").read_text()

    def errors(self) -> str:
        return "\n".join(f"-- process {i}:\n{self.error(i)[-3000:]}" for i in range(len(self.processes)))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def _run(
    argv: list[str],
    index: int,
    log: str,
    devices: int,
    order: int | None,
    environment: Environment | None,
    slow_files: SlowFiles | None,
) -> None:
    """In the forked process."""
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.argv = argv
    os.environ["XLA_FLAGS"] = FLAGS  # each program runs a few times only
    if environment is not None:
        environment.enter(index)
    if slow_files is not None:
        slow_files.enter()
    cache_all_programs()
    import jax

    from polaformer_jax.training import sharding
    from tests.support import dense_backbone, dense_model, small_models
    from tests.support.device_order import permuted

    jax.config.update("jax_num_cpu_devices", devices)
    arranged = sharding.arranged if order is None else permuted(order)
    with (
        dense_model.registered(),  # as in the tests of training
        dense_backbone.registered(),
        small_models.shallow(),
        mock.patch.object(sharding, "arranged", arranged),
    ):
        runpy.run_path(str(ROOT / argv[0]), run_name="__main__")


def cache_all_programs() -> None:
    """Without this, processes other than the first would compile anew at each start: JAX lets only that one write."""
    import jax
    from jax._src import compiler, distributed

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    write = compiler._cache_write

    def write_in_any_process(*arguments):
        with mock.patch.object(distributed.global_state, "process_id", 0):
            write(*arguments)

    compiler._cache_write = write_in_any_process
