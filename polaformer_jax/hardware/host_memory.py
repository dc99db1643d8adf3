"""The memory of this process: how the C library allocates it, where the host computes, and the most that it held."""

import ctypes
import importlib.metadata
import importlib.util
import re
from pathlib import Path

import jax

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

    Call it before JAX has looked for devices, since JAX's threads keep the heaps that they have.

    Returns:
        Whether the process now keeps freed memory.
    """
    if not _only_cpu():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library: macOS, musl
        return False
    # One heap for all threads, which grows and never shrinks, with no block outside it.
    settings = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1}
    return all([mallopt(parameter, value) == 1 for parameter, value in settings.items()])


def _only_cpu() -> bool:
    if platforms := jax.config.jax_platforms:
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
