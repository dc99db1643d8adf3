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


HEAPS_IN = """
import ctypes
from polaformer_jax.cli import {command}
from polaformer_jax.hardware import host_memory

def report(*_):
    print(host_memory._heaps(ctypes.CDLL(None)), file=output)
    raise SystemExit(0)

output = open({file!r}, "w")
{command}.{body} = report
{command}.main({words!r})
"""


@pytest.mark.parametrize(
    "command, body, words",
    [
        ("train", "_train", ["--config", "digits", "--workdir", "runs/none"]),
        ("eval", "_evaluate", ["--config", "digits", "--config.init.weights=none.safetensors"]),
    ],
)
def test_commands_have_one_heap_when_they_begin(command, body, words, tmp_path):
    # The thread that waits for signals had a heap of its own, and JAX's threads got their memory there.
    file = tmp_path / "heaps.txt"
    script = HEAPS_IN.format(command=command, body=body, words=words, file=str(file))
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert file.read_text() == "1\n"


SECOND_HEAP = """
import threading
from polaformer_jax.hardware.host_memory import keep_freed_memory

if {late}:
    threading.Thread(target=threading.Event().wait, daemon=True).start()
print(keep_freed_memory())
"""


@pytest.mark.parametrize("late", [False, True])
def test_memory_is_not_kept_where_a_thread_has_a_heap_already(late):
    script = SECOND_HEAP.format(late=late)
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout == f"{not late}\n"


@pytest.fixture
def called(monkeypatch):
    """The parameters of the calls of mallopt, which are not made."""
    calls = []

    def mallopt(parameter, value):
        calls.append(parameter)
        return 1

    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: types.SimpleNamespace(mallopt=mallopt))
    monkeypatch.setattr(host_memory, "_heaps", lambda libc: 1)
    return calls


def test_where_there_could_be_an_accelerator_nothing_changes(called, monkeypatch):
    assert host_memory.keep_freed_memory() and len(called) == 3  # the tests' jax_platforms is "cpu"
    called.clear()
    jax = types.SimpleNamespace(config=types.SimpleNamespace(jax_platforms="cuda,cpu"))
    monkeypatch.setitem(host_memory.sys.modules, "jax", jax)
    assert not host_memory.keep_freed_memory()
    jax.config.jax_platforms = None
    monkeypatch.setattr(host_memory.importlib.metadata, "entry_points", lambda group: ["cuda"])
    assert not host_memory.keep_freed_memory()
    monkeypatch.setattr(host_memory.importlib.metadata, "entry_points", lambda group: [])
    monkeypatch.setattr(host_memory.importlib.util, "find_spec", lambda name: name)
    assert not host_memory.keep_freed_memory()
    assert not called
    monkeypatch.setattr(host_memory.importlib.util, "find_spec", lambda name: None)
    assert host_memory.keep_freed_memory() and called


def test_before_jax_is_imported_its_variable_counts(called, monkeypatch):
    monkeypatch.delitem(host_memory.sys.modules, "jax")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert not host_memory.keep_freed_memory() and not called
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
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
