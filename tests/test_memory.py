"""Freed memory is used again. The settings are those of a process, so each case is a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys, threading
import numpy as np
from infra.memory import reuse_freed_memory
if sys.argv[1] == "reuse":
    reuse_freed_memory()
faults = []
def fill():
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(10_000_000, np.float32)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=fill)
thread.start()
thread.join()
print(*faults)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are those of glibc")
@pytest.mark.parametrize("mode", ["reuse", "default"])
def test_a_freed_array_is_cleared_by_the_system_only_with_the_usual_settings(mode):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROGRAM, mode]
    said = subprocess.run(
        command, capture_output=True, text=True, check=True, env=clean, cwd=Path(__file__).parent.parent
    )
    first, second = map(int, said.stdout.split())
    pages = 40_000_000 // (os.sysconf("SC_PAGE_SIZE") * 512)  # if the system uses huge pages
    assert first >= pages
    assert (second < pages) == (mode == "reuse")
