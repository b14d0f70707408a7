"""Huge pages for the memory that the C library allocates. This module does not import JAX."""

import os
import sys

TUNABLES = "GLIBC_TUNABLES"
"""The environment variable with the settings of glibc, which reads it only when a process starts."""


def use_huge_pages() -> None:
    """Starts this program again with huge pages, unless the environment has settings of glibc. Call it first.

    For each call of a program on CPUs, XLA allocates the memory for temporary values and frees it at the end. So the
    system has to clear all pages for the next call, which takes less time if the pages are huge. Has no effect on
    systems other than Linux, or without glibc. The new program replaces this one in the same process.
    """
    if sys.platform == "linux" and TUNABLES not in os.environ:
        os.environ[TUNABLES] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
