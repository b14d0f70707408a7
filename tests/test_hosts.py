"""Several processes run as one: two of two devices each against this one of four."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.host_process import run_modes

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def run_two(commands: list[list[str]]) -> list[tuple[int, str, str]]:
    """Exit codes, outputs and errors of two processes that run at the same time."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, *c], cwd=ROOT, env=ENVIRONMENT, **pipes) for c in commands]
    said = [process.communicate(timeout=900) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
    return [record["total" if "total" in record else "bpd"] for record in records if record["split"] == "train"]


def test_two_hosts_do_what_one_does(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run_modes(one)  # first, so that the others find its classifier
    address = free_address()
    finished = run_two([["-m", "tests.host_process", str(two), address, "2", str(k)] for k in range(2)])
    assert [status for status, _, _ in finished] == [0, 0], "\n".join(errors for _, _, errors in finished)
    for _, output, _ in finished:
        assert "the sum over 4 devices is right; all processes share the workdir" in output
        assert "in 2 processes" in output
    assert {path.name for path in two.glob("log*")} == {"log.txt", "log_1.txt"}, "each host has a log of its own"
    for folder in ("", "deq"):
        one_losses, two_losses = losses(one / folder), losses(two / folder)
        assert len(one_losses) >= 2
        np.testing.assert_allclose(one_losses, two_losses, rtol=1e-4)  # sums in another order
    results = [json.loads((workdir / "eval" / "step_6.json").read_text()) for workdir in (one, two)]
    assert [result["bpd"]["n"] for result in results] == [48, 48]
    assert results[0]["bpd"]["mean"] == pytest.approx(results[1]["bpd"]["mean"], rel=1e-4)
    assert results[0]["samples"]["fid"] == pytest.approx(results[1]["samples"]["fid"], rel=1e-2)


def main_command(workdir: Path, address: str, number: int, *fields: str) -> list[str]:
    flags = [f"--coordinator={address}", "--num_processes=2", f"--process_id={number}", f"--workdir={workdir}"]
    return ["main.py", "--config=configs/digits/smoke.py", "--mode=train", *flags, *fields]


def test_a_process_that_fails_alone_does_not_leave_the_other_waiting(tmp_path: Path) -> None:
    """The second process has other data, which only a comparison of all processes can find."""
    address, number = free_address(), "--config.data.levels=16"
    (first, _, first_says), (second, _, second_says) = run_two(
        [main_command(tmp_path / "run", address, 0), main_command(tmp_path / "run", address, 1, number)]
    )
    assert (first != 0, second) == (True, 2), first_says + second_says
    assert "data.levels is 16" in second_says.splitlines()[-1]


def test_processes_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    command = [sys.executable, *main_command(tmp_path, "localhost:1", 2)]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "--process_id below it, got 2 and 2" in result.stderr.splitlines()[-1]
