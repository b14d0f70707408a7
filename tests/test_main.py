"""What the command says to flags and configurations that it cannot read."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

UNREADABLE = {
    "no Python": (["--config=README.md"], "cannot parse the configuration: unterminated string"),
    "unknown section": (
        ["--config=configs/digits/smoke.py", "--config.trainin.batch_size=3"],
        'no such field: trainin; did you mean "training"',
    ),
    "unknown field": (
        ["--config=configs/digits/smoke.py", "--config.training.batchsize=3"],
        'no such field: batchsize; did you mean "batch_size"',
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_one_line(name, tmp_path):
    arguments, message = UNREADABLE[name]
    command = [sys.executable, "main.py", *arguments, "--mode=train", f"--workdir={tmp_path / 'run'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


def test_where_an_error_comes_from_is_shown_on_demand(tmp_path):
    command = [sys.executable, "main.py", "--config=configs/toy/smoke.py", "--mode=train", f"--workdir={tmp_path}"]
    result = subprocess.run([*command, "--config.seed=-1", "--verbosity=1"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: seed is -1")
