"""Memory that is freed stays with the process, but for small pieces; and the most that it held."""

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


LEAVE_FRAGMENTS = """
import ctypes, re, sys
from polaformer_jax.hardware import host_memory

def free_blocks():
    found = re.findall(r'<size from="(\\d+)" to="\\d+" total="\\d+" count="(\\d+)"/>', host_memory._malloc_info(libc))
    return sum(int(count) for least, count in found if int(least) >= 4096)

def held():
    return 1024 * int(re.search(r"VmRSS:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
kept = sys.argv[1] == "keep" and host_memory.keep_freed_memory()
sizes = [5000 + 100 * i for i in range(1000)]  # 55 MB
blocks = [libc.malloc(size) for size in sizes]
for block, size in zip(blocks, sizes):
    ctypes.memset(block, size % 251, size)
for block in blocks[::2]:
    libc.free(block)
libc.free(libc.malloc(2**25))  # now they are sorted into the lists of free blocks
before, held_before = free_blocks(), held()
retired = host_memory.retire_fragments()
assert all(ctypes.string_at(b, s) == bytes([s % 251]) * s for b, s in zip(blocks[1::2], sizes[1::2]))
print(int(kept), before, free_blocks(), retired, held_before - held(), host_memory.retire_fragments())
"""


def fragments(mode: str) -> list[int]:
    """Whether memory is kept; free blocks before and after; bytes retired, given back, and retired the second time."""
    command = [sys.executable, "-c", LEAVE_FRAGMENTS, mode]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]


def test_small_free_blocks_are_retired_and_their_pages_go_back():
    kept, before, after, retired, returned, again = fragments("keep")
    assert kept and before >= 490 and after <= before / 20
    assert 25e6 < retired < 40e6 and returned > 0.8 * retired - 500 * 2 * 4096  # of each, whole pages
    assert again <= retired / 20


def test_without_keeping_memory_nothing_is_retired():
    kept, before, after, retired, _, again = fragments("not")
    assert not kept and before >= 490 and abs(after - before) < 5 and retired == again == 0


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

    monkeypatch.setattr(host_memory, "_keeps", False)  # is restored afterwards
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
