"""Worker processes: none can make the run hang, and none outlives it. Real processes, real signals."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
import types

import grain
import numpy as np
import pytest

from polaformer_jax.data import workers
from polaformer_jax.data.workers import Stream
from polaformer_jax.errors import UserError


def value(index):
    return {"value": np.full((2, 3), index)}


def quiet_exit(index):
    if index == 5:
        os._exit(0)
    return value(index)


def sleeper(index):
    if index == 5:
        time.sleep(1000)
    return value(index)


def stream(function=value, **options):
    return Stream(grain.MapDataset.range(1000).map(function), **{"workers": 2} | options)


def drain(batches, limit=1000):
    for _ in range(limit):
        next(batches)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as status:
            return status.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=15):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_workers_are_deaf_to_signals_and_end_on_close():
    others = set(multiprocessing.active_children())
    batches = stream()
    assert wait_until(lambda: len(set(multiprocessing.active_children()) - others) == 2)
    pids = [process.pid for process in set(multiprocessing.active_children()) - others]
    for pid in pids:  # still starting: from their first moment
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    drain(batches, 10)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    drain(batches, 10)
    assert all(map(is_running, pids))
    batches.close()
    batches.close()
    assert not any(map(is_running, pids))


def test_memory_that_workers_will_not_have_is_named_before_they_start(monkeypatch):
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: types.SimpleNamespace(total=2**26, free=2**26))
    sizes = {"training": 19 * 2**20, "evaluation": 2**20}
    workers.check_shared_memory(0, 1, sizes)
    workers.check_shared_memory(1, 1, sizes)
    with pytest.raises(UserError) as error:
        workers.check_shared_memory(8, 1, sizes)
    assert "/dev/shm has 64 MiB free, but the data workers need at least 320 MiB there" in str(error.value)
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: types.SimpleNamespace(total=0, free=0))
    workers.check_shared_memory(8, 1, sizes)  # not limited
    assert "304 MiB for training, 16 MiB for evaluation" in str(error.value)
    assert "--shm-size" in str(error.value) and "data.workers=0" in str(error.value)


def kill_by_bus(index):
    if index == 3:
        os.kill(os.getpid(), signal.SIGBUS)  # as the system does where shared memory is full
    return value(index)


def test_a_worker_that_memory_fails_is_explained():
    with pytest.raises(RuntimeError, match="for want of shared memory .*--shm-size"):
        drain(stream(kill_by_bus))


def test_a_process_that_is_a_worker_starts_none(monkeypatch):
    monkeypatch.setattr(workers.multiprocessing, "current_process", lambda: types.SimpleNamespace(daemon=True))
    with pytest.raises(UserError, match='worker itself. .*under `if __name__ == "__main__":`'):
        stream()
    stream(workers=0).close()


def test_a_killed_worker_is_an_error():
    batches = stream()
    drain(batches, 2)  # one of each worker
    pids = batches._workers.pids()
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(RuntimeError, match="exit code -9"):
        drain(batches)
    assert len(pids) == 2 and not any(map(is_running, pids))


def test_a_worker_that_exits_quietly_is_an_error():
    batches = stream(quiet_exit, workers=1)
    with pytest.raises(RuntimeError, match="exit code 1"):
        drain(batches)


def test_a_worker_that_hangs_is_an_error_after_the_time_limit(monkeypatch):
    monkeypatch.setattr(workers, "_CLOSE_S", 0.2)
    batches = stream(sleeper, workers=1, timeout_s=60)
    drain(batches, 5)
    batches._timeout_s = 1.5  # not before: a worker's start may take longer
    (pid,) = batches._workers.pids()
    with pytest.raises(RuntimeError, match=rf"no batch in 1.5 s \(data workers: {pid} runs\)"):
        next(batches)
    assert not is_running(pid)


def test_only_the_workers_of_a_stream_end_with_it(monkeypatch):
    monkeypatch.setattr(workers, "_CLOSE_S", 0.2)
    context = multiprocessing.get_context("spawn")
    foreign = context.Process(target=time.sleep, args=(1000,), name="grain-process-prefetch-0", daemon=True)
    hanging, working = stream(sleeper, workers=1), stream(workers=1)
    foreign.start()  # among the others, under a name that Grain might give
    try:
        drain(hanging, 5)
        drain(working, 5)
        (pid,) = hanging._workers.pids()
        hanging.close()
        assert not is_running(pid)
        assert foreign.is_alive()
        drain(working, 5)
        working.close()
        assert foreign.is_alive()
    finally:
        foreign.kill()
        foreign.join()


def test_a_stream_may_be_closed_while_its_workers_start(monkeypatch):
    monkeypatch.setattr(workers, "_CLOSE_S", 0.01)
    others = set(multiprocessing.active_children())
    batches = stream(sleeper)
    assert wait_until(lambda: len(set(multiprocessing.active_children()) - others) == 2)
    started = set(multiprocessing.active_children()) - others
    batches.close()
    assert wait_until(lambda: not any(is_running(process.pid) for process in started))


SCRIPT = """
    import sys, time
    import grain
    from polaformer_jax.data.workers import Stream
    from tests.data.test_workers import value

    if __name__ == "__main__":  # workers import this file again
        batches = Stream(grain.MapDataset.range(1000).map(value), workers={workers})
        for _ in range({workers}):
            next(batches)
        print(*batches._workers.pids(), flush=True)
        {end}
"""


def start_script(tmp_path, end, workers):
    script = tmp_path / "main.py"
    script.write_text(textwrap.dedent(SCRIPT).format(end=end, workers=workers))
    process = subprocess.Popen(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return process, [int(pid) for pid in process.stdout.readline().split()]


@pytest.mark.slow
def test_no_worker_outlives_a_killed_main_process(tmp_path):
    process, pids = start_script(tmp_path, "time.sleep(1000)", workers=2)
    assert len(pids) == 2 and all(map(is_running, pids))
    process.kill()
    assert wait_until(lambda: not any(map(is_running, pids)))
    process.communicate(timeout=15)  # nobody holds its output open any more


@pytest.mark.slow
def test_a_program_that_forgets_to_close_ends_cleanly(tmp_path):
    process, pids = start_script(tmp_path, "sys.exit(0)", workers=1)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    assert not any(map(is_running, pids))
