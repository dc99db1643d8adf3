"""The memory of this process: how the C library allocates it, where the host computes, and the most that it held."""

import ctypes
import importlib.metadata
import importlib.util
import os
import re
import sys
from pathlib import Path

# From malloc.h: the parameters of glibc's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

_STATUS = Path("/proc/self/status")

_keeps = False  # whether this process keeps the memory that it frees
_FRAGMENTS = (1 << 12, 1 << 20)  # free blocks of these sizes, in bytes, are retired
_PASSES = 8  # at most, as other threads may free blocks all the time
_MADV_DONTNEED = 4
_RANGE = re.compile(r'<size from="(\d+)" to="(\d+)" total="\d+" count="(\d+)"/>')


def keep_freed_memory() -> bool:
    """Makes this process keep the memory that it frees, if JAX can only run on the CPU and the C library is glibc.

    XLA allocates the memory of a program again for every call. From the size of 32 MiB on, glibc gets such blocks from
    the system and returns them, and the system fills them with zeros page by page: a fifth to a third of the time of a
    model on a CPU. Once called, the process holds the largest amount that it has needed, until it ends; or up to three
    times as much, where what was freed is in pieces too small for the next call. Where there could be a GPU or TPU
    nothing changes.

    Call it before any thread is started, and before JAX has looked for devices: a thread that has a heap of its own
    keeps it, and later threads, JAX's own among them, share it. From such a heap large blocks go back to the system.

    Returns:
        Whether the process now keeps freed memory: all of it, not that of some threads alone.
    """
    global _keeps
    if not _only_cpu():
        return False
    try:
        libc = ctypes.CDLL(None)
        mallopt, heaps = libc.mallopt, _heaps(libc)
    except (AttributeError, OSError):  # another C library: macOS, musl
        return False
    # One heap for all threads, which grows and never shrinks, with no block outside it.
    settings = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1}
    _keeps = all([mallopt(parameter, value) == 1 for parameter, value in settings.items()]) and heaps == 1
    return _keeps


def retire_fragments() -> int:
    """Takes small free blocks out of the heap for good, if this process keeps freed memory; call it after compiling.

    The compiler leaves a hundred thousand free blocks behind, in lists that the C library searches while it holds the
    lock of the only heap. A program on a CPU allocates ten thousand times in a call, from all its threads, which wait
    for each other: a fifth of the time of a model with gradients. Blocks that are retired are in no list, and their
    pages go back to the system.

    Returns:
        Bytes that were retired; 0 where freed memory is not kept.
    """
    if not _keeps:
        return 0
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    retired = 0
    for _ in range(_PASSES):  # what is left of a block that was larger is found by the next pass
        ranges = [tuple(map(int, found)) for found in _RANGE.findall(_malloc_info(libc))]
        small = [(least, count) for least, most, count in ranges if _FRAGMENTS[0] <= least and most <= _FRAGMENTS[1]]
        if not small:
            break
        retired += sum(_retire(libc, (least & ~15) - 16, count) for least, count in small)  # without a block's header
    return retired


def _retire(libc: ctypes.CDLL, size: int, count: int) -> int:
    """Allocates blocks of `size` bytes, and returns their whole pages to the system; the bytes."""
    page = os.sysconf("SC_PAGE_SIZE")
    for done in range(count):
        address = libc.malloc(size)
        if address is None:
            return done * size
        begin, end = -(-address // page) * page, (address + size) // page * page
        if begin < end:
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)
    return count * size


def _heaps(libc: ctypes.CDLL) -> int:
    """How many heaps this process has: one for the main thread, and those of other threads."""
    return _malloc_info(libc).count("<heap nr=")


def _malloc_info(libc: ctypes.CDLL) -> str:
    """The C library's report about its heaps, in XML: for each, ranges of sizes and the free blocks of each."""
    text, size = ctypes.c_void_p(), ctypes.c_size_t()
    libc.open_memstream.restype = ctypes.c_void_p
    stream = ctypes.c_void_p(libc.open_memstream(ctypes.byref(text), ctypes.byref(size)))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    try:
        return ctypes.string_at(text, size.value).decode()
    finally:
        libc.free(text)


def _only_cpu() -> bool:
    jax = sys.modules.get("jax")  # not imported here, which would take a second
    if platforms := os.environ.get("JAX_PLATFORMS") if jax is None else jax.config.jax_platforms:
        return platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None


def peak() -> int | None:
    """The most memory that this process held at any time, in bytes; None where there is no Linux to say so.

    Unlike `getrusage`, this leaves out what the process was before it became this program: a copy of its parent.
    """
    if not _STATUS.exists():
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    return 1024 * int(found[1]) if found else None
