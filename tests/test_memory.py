"""main.py runs with huge pages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, os, sys
from infra.memory import use_huge_pages
print(os.getpid())
sys.stdout.flush()
use_huge_pages()
print(json.dumps([os.getpid(), os.environ["GLIBC_TUNABLES"], sys.argv, sys.flags.utf8_mode]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is one of glibc")
@pytest.mark.parametrize("given", [None, "glibc.malloc.hugetlb=0"])
def test_a_program_starts_again_once_with_the_same_arguments(given):
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {} if given is None else {"GLIBC_TUNABLES": given}
    command = [sys.executable, "-X", "utf8", "-c", PROGRAM, "--a=b c", ""]
    root = Path(__file__).parent.parent
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=root)
    *starts, end = said.stdout.splitlines()
    assert len(starts) == (2 if given is None else 1)
    expected = [int(starts[0]), given or "glibc.malloc.hugetlb=1", ["-c", "--a=b c", ""], 1]
    assert json.loads(end) == expected, "the same process, arguments and options of Python"
