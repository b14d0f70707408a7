"""Waits are bounded and say what they wait for; processes that are missing are named."""

import os
import socket
import threading
import time

import jax
import pytest

from configs.digits.smoke import get_config as digits
from configs.toy.smoke import get_config as toy
from evaluators import selftest
from infra import machine_checks, stop, waiting
from infra.cost import NOT_COMPILED
from infra.rendezvous import meet
from infra.startup import EarlyProgram


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def meet_in_threads(address, numbers, total=3, seconds=2.0):
    """Returns the error of each process that takes part; None without an error."""
    outcomes: dict[int, str | None] = {}

    def come(position, number):
        try:
            meet(address, total, number, seconds)
            outcomes[position] = None
        except (OSError, ValueError) as error:
            outcomes[position] = str(error)

    threads = [threading.Thread(target=come, args=each) for each in enumerate(numbers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outcomes[position] for position in range(len(numbers))]


def test_processes_meet_in_any_order():
    assert meet_in_threads(free_address(), (2, 0, 1), seconds=20.0) == [None] * 3


def test_the_missing_process_is_named_to_all_that_came():
    assert meet_in_threads(free_address(), (0, 2), seconds=1.0) == ["process 1 of 3 did not connect within 1 s"] * 2
    (alone,) = meet_in_threads(free_address(), (1,), seconds=0.5)
    assert alone is not None
    assert alone.startswith("process 0 at localhost:")
    assert alone.endswith("did not answer within 0.5 s")


def test_two_processes_with_the_same_number_are_refused():
    said = meet_in_threads(free_address(), (0, 1, 1), seconds=20.0)
    assert said == ["two processes have --process_id=1; number them from 0 to 2"] * 3


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("", 0)) as taken, pytest.raises(OSError, match=r"cannot listen on port .* name a free"):
        meet(f"localhost:{taken.getsockname()[1]}", 2, 0, 1.0)


def test_a_request_to_stop_ends_the_wait(stop_requested):
    with pytest.raises(KeyboardInterrupt):
        meet(free_address(), 2, 0, 60.0)


def test_a_wait_ends_the_process_at_its_limit(monkeypatch):
    """The thread that watches calls `end_process`, which would end the process of the tests."""
    ended = threading.Event()
    messages = []
    monkeypatch.setattr(waiting, "end_process", lambda message: (messages.append(message), ended.set()))
    with waiting.waiting("a disk that does not answer", limit=0.1):
        assert ended.wait(10)
    assert messages[0].startswith("waited 0 s for a disk that does not answer")
    number = len(messages)
    with waiting.waiting("something quick", limit=0.1):
        pass
    time.sleep(2 * waiting._INTERVAL)
    assert len(messages) == number


def test_a_call_that_takes_too_long_is_left_behind(monkeypatch):
    ended = []
    assert waiting.within(10, "the sum", lambda: 1 + 1) == 2
    with pytest.raises(ZeroDivisionError):
        waiting.within(10, "the quotient", lambda: 1 / 0)
    assert waiting.leave(3) == 3
    release = threading.Event()
    with pytest.raises(TimeoutError, match=r"the release took longer than 0.2 s"):
        waiting.within(0.2, "the release", release.wait)
    monkeypatch.setattr(os, "_exit", ended.append)
    waiting.leave(3)
    assert ended == [3]
    release.set()


def test_a_program_is_compiled_while_the_caller_continues(monkeypatch):
    release, threads = threading.Event(), []

    def compiled(lowered):
        assert release.wait(10)
        threads.append(threading.current_thread())
        if len(threads) > 1:
            raise RuntimeError("no memory to compile")
        return lambda number: number + 1

    monkeypatch.setattr(jax.stages.Lowered, "compile", compiled)
    function = jax.jit(lambda number: number + 1)
    program = EarlyProgram(function, 0)
    assert threads == []
    release.set()
    assert program(1) == 2
    assert program(2) == 3
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()
    with pytest.raises(RuntimeError, match="no memory to compile"):
        EarlyProgram(function, 0)(1)


def test_a_collective_names_the_process_that_does_not_come(tmp_path, monkeypatch):
    """Of three processes, this one and the third came, and their sum never ends."""
    release = threading.Event()
    monkeypatch.setattr(machine_checks, "_sum_over_devices", release.wait)
    monkeypatch.setattr(machine_checks.jax, "process_count", lambda: 3)
    (tmp_path / ".selftest").mkdir()
    for number, age in ((1, 1000), (2, 0)):  # the mark of the second is from an earlier run
        mark = tmp_path / ".selftest" / str(number)
        mark.write_text("")
        os.utime(mark, (time.time() - age, time.time() - age))
    with pytest.raises(TimeoutError, match=r"the sum over 4 devices took longer than 0.5 s; no sign of process 1$"):
        machine_checks.collective(tmp_path, seconds=0.5)
    release.set()


def test_checks_of_this_machine(tmp_path):
    assert machine_checks.devices().startswith("4 x cpu, memory of ")
    assert "sum over 4 devices is right" in machine_checks.collective(tmp_path)
    assert "MB/s" in machine_checks.disk(tmp_path, 10**6)
    with pytest.raises(OSError, match=r"GB free; checkpoints need 1000000000.00 GB; free some space"):
        machine_checks.disk(tmp_path, 10**18)
    assert list(tmp_path.iterdir()) == [tmp_path / ".selftest"]
    assert not stop.requested()
    failed = machine_checks.check("disk", lambda: machine_checks.disk(tmp_path / "none", 1))
    assert not failed.passed
    assert failed.line.startswith("disk                  FAILED")


def test_the_self_test_prints_a_line_for_each_check(tmp_path, monkeypatch, capsys):
    """The cost of the training step is given here. tests/test_cost.py measures one."""
    costs = {"gflop": 2.0, "estimated_gb": 0.5, "total_gb": 0.4, "step_seconds": 0.1}
    monkeypatch.setattr(selftest, "case_cost", lambda *_: costs)
    config = toy()
    selftest.selftest(config, tmp_path / "good")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "devices",
        "collective",
        "disk",
        "train data",
        "test data",
        "step",
    ]
    assert all(" ok " in line for line in lines[1:])
    assert "0.1 s/step, 0.00167 h for 60 steps" in lines[-1]
    monkeypatch.setattr(selftest, "case_cost", lambda *_: {"gflop": 2.0, "estimated_gb": 0.5, "error": NOT_COMPILED})
    config = digits()
    config.data.dataset, config.data.path = "npz", str(tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"3 of 7 checks failed: train data, test data, features .classifier.; see"):
        selftest.selftest(config, tmp_path / "bad")
    said = capsys.readouterr().out
    assert "0.5 of" in said
    assert "not compiled within --config.cost.selftest_seconds=60" in said
    assert "which is not a file" in said
