"""Several processes run as one: two of two devices each against this one of four."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import run_lib
from configs.digits.smoke import get_config
from infra import parallel
from tests.tiny_network import tiny_flow, tiny_network

ROOT = Path(__file__).parent.parent
FIELDS: dict[str, Any] = {
    "training.n_iters": 6,
    "training.snapshot_freq": 4,
    "training.log_freq": 2,
    "data.random_flip": True,
    "eval.ode_steps": 2,
    "eval.num_repeats": 1,
    "sampling.num_steps": 2,
    "deq.n_iters": 4,
}
ALL_MODES = """
import main, run_lib
from tests.test_hosts import small_networks
evaluate = run_lib.evaluate
def all_modes(config, workdir, eval_folder, deq_folder):
    run_lib.train(config, workdir)
    run_lib.train_deq(config, workdir, deq_folder)
    evaluate(config, workdir, eval_folder, deq_folder)
run_lib.evaluate = all_modes
with small_networks():
    main.app.run(main.main, flags_parser=main._parse_flags)
"""
"""A program that trains the score model and the dequantizer before it evaluates: three modes for one start."""


@contextlib.contextmanager
def small_networks() -> Iterator[None]:
    """Puts networks that compile fast in the place of the score network and the dequantizer."""
    with tiny_network(), tiny_flow():
        yield


TRAIN = """
import main
from tests.test_hosts import small_networks
with small_networks():
    main.app.run(main.main, flags_parser=main._parse_flags)
"""


def start(program: Sequence[str], workdir: Path, mode: str, *flags: str, devices: int = 2) -> subprocess.Popen[str]:
    command = [sys.executable, *program, "--config=configs/digits/smoke.py", f"--workdir={workdir}", f"--mode={mode}"]
    fields = [f"--config.{name}={value}" for name, value in FIELDS.items()]
    xla_flags = os.environ["XLA_FLAGS"].replace("device_count=4", f"device_count={devices}")
    environment = {**os.environ, "XLA_FLAGS": xla_flags, "JAX_PLATFORMS": "cpu"}
    statistics = f"--config.eval.statistics_dir={workdir.parent}/stats"
    return subprocess.Popen(
        [*command, *fields, statistics, *flags], cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE
    )


def start_two(
    program: Sequence[str],
    workdir: Path,
    mode: str,
    *fields_of_second: str,
    fields: Sequence[str] = (),
    devices: int = 2,
) -> list[tuple[int, str]]:
    """Returns the exit codes and errors of two processes. The second one may have other fields than the `fields`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = (f"--coordinator=localhost:{port}", "--num_processes=2", *fields)
    others = [(), fields_of_second]
    processes = [
        start(program, workdir, mode, *flags, f"--process_id={k}", *others[k], devices=devices) for k in range(2)
    ]
    errors = [process.communicate(timeout=600)[1] for process in processes]
    return [(process.returncode, said) for process, said in zip(processes, errors, strict=True)]


def run_here(workdir: Path) -> None:
    config = get_config()
    config.update_from_flattened_dict({**FIELDS, "eval.statistics_dir": f"{workdir.parent}/stats"})
    with small_networks():
        run_lib.train(config, workdir)
        run_lib.train_deq(config, workdir, "deq")
        run_lib.evaluate(config, workdir, "eval")


def logged(workdir: Path) -> list[float]:
    """Returns the totals of the training losses that a training wrote."""
    lines = (workdir / "train" / "metrics.jsonl").read_text().splitlines()
    return [record["total"] for record in map(json.loads, lines) if record["split"] == "train"]


def test_two_hosts_do_what_one_does(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run_here(one)
    ended = start_two(["-c", ALL_MODES], two, "eval")
    assert [status for status, _ in ended] == [0, 0], "\n".join(said for _, said in ended)
    assert {path.name for path in two.glob("log*")} == {"log.txt", "log_1.txt"}, "each host has a log of its own"
    for folder, records in ((".", 3), ("deq", 2)):
        losses = [logged(workdir) for workdir in (one / folder, two / folder)]
        assert len(losses[0]) == records
        np.testing.assert_allclose(*losses, rtol=1e-5)  # sums in another order
    results = [json.loads((workdir / "eval" / "step_6.json").read_text()) for workdir in (one, two)]
    assert [result["bpd"]["n"] for result in results] == [48, 48]
    assert results[0]["bpd"]["mean"] == pytest.approx(results[1]["bpd"]["mean"], rel=1e-4)
    assert results[0]["samples"]["fid"] == pytest.approx(results[1]["samples"]["fid"], rel=1e-2)


def test_two_hosts_of_one_device_each_continue_another_run(tmp_path: Path) -> None:
    """The state has arrays that were restored to all devices, and new ones that each host has for itself."""
    config, base = get_config(), tmp_path / "base"
    config.update_from_flattened_dict({**FIELDS, "training.n_iters": 4})
    with small_networks():
        run_lib.train(config, base)
    fields = {"init_from": base, "init_reset": "opt", "n_iters_from_start": 3, "shard_state": True}
    flags = [f"--config.training.{name}={value}" for name, value in fields.items()]
    ended = start_two(["-c", TRAIN], tmp_path / "two", "train", fields=flags, devices=1)
    assert [status for status, _ in ended] == [0, 0], "\n".join(said for _, said in ended)
    assert {path.name for path in (tmp_path / "two" / "checkpoints").glob("[0-9]*")} == {"4", "7"}
    assert len(logged(tmp_path / "two")) == 2


def test_a_process_that_fails_alone_does_not_leave_the_other_waiting(tmp_path: Path) -> None:
    """The second process has data that do not fit its configuration."""
    (first, first_says), (second, second_says) = start_two(
        ["main.py"], tmp_path / "run", "train", "--config.data.levels=16"
    )
    assert (first != 0, second) == (True, 2), first_says + second_says
    assert "data.levels is 16" in second_says.splitlines()[-1]


def test_processes_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="--process_id below it, got 2 and 2"):
        parallel.join_processes("localhost:1", 2, 2)
