"""A part of `python -m tests.fuzz`: bad input of every kind gives exit code 2 and one line that names the culprit."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_random_bad_input_is_one_line():
    command = [sys.executable, "-m", "tests.fuzz", "--cases=40", "--seed=5", "--processes=1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "40 of 40 cases" in result.stdout
