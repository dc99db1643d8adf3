"""Entry scripts as processes that work together, forked from one in which everything is imported: they start at once.

What a process compiles it finds again in JAX's cache, when it is started anew.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from pathlib import Path
from unittest import mock

from tests.support import ROOT

LIMIT_S = 400  # for a group to end, and for what is waited for in its midst
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["tensorflow", "clu.metric_writers", "grain", "orbax.checkpoint", "polaformer_jax.training.loop"]
)


class Group:
    """`processes` times the same script, told of each other. Use as a context manager, which leaves none alive.

    Args:
      script: name of an entry script.
      arguments: its flags. The config's `distributed` part is added where there are several processes.
      logs: folder for what the processes print.
      devices: of each process.
      order: seed of a random order of all devices in the mesh; None: that of the processes.
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
    ):
        self._logs = logs
        logs.mkdir(exist_ok=True)
        together, port = [], _free_port()
        self.processes = []
        for index in range(processes):
            if processes > 1:
                together = [
                    f"--config.distributed.coordinator=localhost:{port}",
                    f"--config.distributed.num_processes={processes}",
                    f"--config.distributed.process_id={index}",
                    "--config.distributed.heartbeat_s=10",
                ]
            argv = [script, *arguments, *together]
            self.processes.append(
                _FORKS.Process(target=_run, args=(argv, self._log(index), devices, order), daemon=True)
            )

    def _log(self, index: int) -> str:
        return str(self._logs / str(index))

    def __enter__(self) -> "Group":
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *exception) -> None:
        for process in self.processes:
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


def _run(argv: list[str], log: str, devices: int, order: int | None) -> None:
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
    cache_all_programs()
    import jax

    from polaformer_jax.training import sharding
    from tests.support import dense_model, small_models
    from tests.support.device_order import permuted

    jax.config.update("jax_num_cpu_devices", devices)
    arranged = sharding.arranged if order is None else permuted(order)
    models = dense_model.registered(), small_models.shallow()  # as in the tests of training
    with models[0], models[1], mock.patch.object(sharding, "arranged", arranged):
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
