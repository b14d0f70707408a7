"""Settings of the C library's memory allocator. This module does not import JAX."""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
"""The options of glibc's `mallopt`, from malloc.h."""


def reuse_freed_memory() -> None:
    """Keeps freed memory for the next allocation, instead of returning it to the system. Call it before threads start.

    For each call of a program on CPUs, XLA allocates the memory for temporary values and frees it at the end. The
    system would have to clear all its pages again for the next call. The largest memory that a process has used stays
    with it. Does nothing without glibc, or if the environment has settings of glibc's allocator.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another system, or another C library
        return
    mallopt(_MMAP_MAX, 0)  # Memory from mmap returns to the system when it is freed.
    mallopt(_TRIM_THRESHOLD, -1)  # The heap never shrinks.
    mallopt(_ARENA_MAX, 1)  # The heaps of other arenas are too small for large arrays.
