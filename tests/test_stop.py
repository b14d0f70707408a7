"""Requests to stop: every signal sets the flag, wherever it arrives, and loops look at the flag."""

import gc
import os
import signal
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import datasets
from build import build
from configs.toy.smoke import get_config
from evaluators.classifier import ClassifierRecipe, LabelledImages, trained_classifier
from evaluators.loss import LossEvaluator
from infra import stop
from infra.metrics import MetricsWriter
from infra.training_loop import Call, record_test_loss
from infra.workdir import EvaluationFolder, Workdir


def wait_for_request() -> None:
    deadline = time.monotonic() + 10
    while not stop.requested() and time.monotonic() < deadline:
        time.sleep(0.001)


@pytest.fixture
def unignored():
    """Stops ignoring signals. A shell ignores SIGINT in the background, and nohup ignores SIGHUP."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in stop.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", stop.SIGNALS)
def test_every_signal_is_a_request_and_raises_nothing(number, unignored, capsys):
    handlers = [signal.getsignal(each) for each in stop.SIGNALS]
    with stop.on_signals(), stop.on_signals():  # main.py and a mode may both ask for it
        assert not stop.requested()
        os.kill(os.getpid(), number)
        wait_for_request()
        assert stop.requested()
        with pytest.raises(KeyboardInterrupt):
            stop.check()
    assert not stop.requested()
    assert [signal.getsignal(each) for each in stop.SIGNALS] == handlers
    assert "Stopping after this step" in capsys.readouterr().err


def test_a_signal_in_a_callback_of_the_garbage_collector_is_not_lost():
    """Where JAX has a callback of its own, an exception from a handler would be printed and forgotten."""

    def kill(phase, _):
        if phase == "start":
            os.kill(os.getpid(), signal.SIGTERM)

    with stop.on_signals():
        gc.callbacks.append(kill)
        try:
            gc.collect()
        finally:
            gc.callbacks.remove(kill)
        wait_for_request()
        assert stop.requested()


def test_a_hangup_that_is_ignored_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop.on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert not stop.requested()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("numbers", "ended"),
    [
        ((signal.SIGINT,), []),
        ((signal.SIGINT, signal.SIGINT), [130]),
        ((signal.SIGTERM, signal.SIGINT), [130]),
        ((signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1), []),
        ((signal.SIGCHLD,), []),
    ],
)
def test_only_a_second_ctrl_c_ends_the_process_at_once(numbers, ended, monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    reading, writing = os.pipe()
    os.write(writing, bytes(numbers))
    os.close(writing)
    stop._listen(reading)
    os.close(reading)
    assert codes == ended
    assert stop.requested() == (numbers != (signal.SIGCHLD,))
    stop.clear()


def test_training_the_classifier_can_be_stopped(tmp_path, stop_requested):
    data = LabelledImages(np.zeros((8, 4, 4, 1), np.uint8), np.arange(8) % 2)
    with pytest.raises(KeyboardInterrupt):
        trained_classifier(data, data, levels=2, cache_dir=tmp_path, recipe=ClassifierRecipe(num_epochs=1))
    assert not list(tmp_path.iterdir())


def test_a_test_loss_can_be_stopped(tmp_path, stop_requested):
    """An evaluation raises. Training records nothing and does not raise, so that the state is saved."""
    config = get_config()
    evaluator = LossEvaluator(build(config), datasets.source_from_config(config, "test"))
    with pytest.raises(KeyboardInterrupt):
        evaluator({}, EvaluationFolder(Workdir(tmp_path), "eval", "step_1", 1))
    state: Any = SimpleNamespace(ema_params={})
    call = Call(0, 1, None, state, {}, recording=False, testing=True, saving=False, last=False)
    with MetricsWriter(tmp_path) as metrics:
        record_test_loss(evaluator.first_batches, metrics, 1)(call)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
