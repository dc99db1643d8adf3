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
    if not _only_cpu():
        return False
    try:
        libc = ctypes.CDLL(None)
        mallopt, heaps = libc.mallopt, _heaps(libc)
    except (AttributeError, OSError):  # another C library: macOS, musl
        return False
    # One heap for all threads, which grows and never shrinks, with no block outside it.
    settings = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1}
    return all([mallopt(parameter, value) == 1 for parameter, value in settings.items()]) and heaps == 1


def _heaps(libc: ctypes.CDLL) -> int:
    """How many heaps this process has: one for the main thread, and those of other threads."""
    text, size = ctypes.c_void_p(), ctypes.c_size_t()
    libc.open_memstream.restype = ctypes.c_void_p
    stream = ctypes.c_void_p(libc.open_memstream(ctypes.byref(text), ctypes.byref(size)))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    try:
        return ctypes.string_at(text, size.value).count(b"<heap nr=")
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
