"""Memory that is freed stays with the process: the system is not asked for it again; and the most that it held."""

import re
import subprocess
import sys
import types

import pytest

from polaformer_jax.hardware import host_memory

COUNT_FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from polaformer_jax.hardware.host_memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
arrays = jnp.ones((2048, 8)), jnp.ones((8, 8192)), jnp.ones((8192, 8))
program = jax.jit(lambda x, y, z: (x @ y) @ z).lower(*arrays).compile()  # 64 MiB between the two products
for _ in range(20):  # until the heap has stopped growing, which on many cores takes several calls
    program(*arrays).block_until_ready()
counts = []
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(*arrays).block_until_ready()
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(counts)[4])  # the median: now and then the heap grows once more
"""


def faults(mode: str) -> int:
    """Page faults of a call, in a new process."""
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS, mode], check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.slow
def test_calls_take_their_memory_from_what_the_process_has():
    without, kept = faults("not"), faults("keep")
    assert without > 64 * 2**20 // 4096 / 2  # pages of 4 KiB, 64 MiB a call, and half of them to spare
    assert kept < without / 4


@pytest.fixture
def called(monkeypatch):
    """The parameters of the calls of mallopt, which are not made."""
    calls = []

    def mallopt(parameter, value):
        calls.append(parameter)
        return 1

    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: types.SimpleNamespace(mallopt=mallopt))
    return calls


def test_where_there_could_be_an_accelerator_nothing_changes(called, monkeypatch):
    assert host_memory.keep_freed_memory() and len(called) == 3  # the tests' jax_platforms is "cpu"
    called.clear()
    monkeypatch.setattr(
        host_memory, "jax", types.SimpleNamespace(config=types.SimpleNamespace(jax_platforms="cuda,cpu"))
    )
    assert not host_memory.keep_freed_memory()
    monkeypatch.setattr(host_memory, "jax", types.SimpleNamespace(config=types.SimpleNamespace(jax_platforms=None)))
    monkeypatch.setattr(host_memory.importlib.metadata, "entry_points", lambda group: ["cuda"])
    assert not host_memory.keep_freed_memory()
    monkeypatch.setattr(host_memory.importlib.metadata, "entry_points", lambda group: [])
    monkeypatch.setattr(host_memory.importlib.util, "find_spec", lambda name: name)
    assert not host_memory.keep_freed_memory()
    assert not called
    monkeypatch.setattr(host_memory.importlib.util, "find_spec", lambda name: None)
    assert host_memory.keep_freed_memory() and called


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: object())
    assert not host_memory.keep_freed_memory()


def test_the_peak_is_what_the_system_says(monkeypatch, tmp_path):
    held = int(re.search(r"VmRSS:\s+(\d+) kB", host_memory.Path("/proc/self/status").read_text())[1])
    assert host_memory.peak() >= 1024 * held
    status = tmp_path / "status"
    monkeypatch.setattr(host_memory, "_STATUS", status)
    assert host_memory.peak() is None  # no Linux
    status.write_text("VmPeak:\t  900 kB\nVmHWM:\t  123 kB\nVmRSS:\t  100 kB\n")
    assert host_memory.peak() == 123 * 1024
