"""What a run writes down of its training."""

import contextlib
import io
import json
import logging
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
from absl import logging as absl_logging

from infra.console import log_to_file, progress, quiet_libraries
from infra.metrics import MetricsWriter


def test_means_and_rates_count_steps_not_calls(tmp_path, monkeypatch):
    clock = iter([0.0, 4.0, 5.0])  # begun; record due; written
    monkeypatch.setattr("infra.metrics.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with MetricsWriter(tmp_path) as metrics:
        metrics.collect({"total": jnp.asarray(1.0)}, steps=6)
        metrics.collect({"total": jnp.asarray(5.0)}, steps=2)  # a call cut short by a checkpoint
        assert metrics.record_train(8, order=1) == {"total": 2.0}
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert record["steps_per_second"] == 2.0


def test_steps_that_failed_do_not_count(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        metrics.collect({"total": jnp.asarray(1.0), "failed": jnp.array([0, 1, 0])}, steps=3)
        metrics.collect({"total": jnp.asarray(jnp.nan), "failed": jnp.array([1])}, steps=1)
        metrics.collect({"total": jnp.asarray(4.0), "failed": jnp.asarray(0)}, steps=1)
        assert metrics.record_train(100, order=3) == {"total": 2.0}
        metrics.collect({"total": jnp.asarray(jnp.nan), "failed": jnp.asarray(1)}, steps=1)
        assert np.isnan(metrics.record_train(101, order=3)["total"])
    assert [json.loads(line)["skipped_steps"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        2,
        1,
    ]


def test_a_log_shows_a_bar_now_and_then_whatever_it_is_told(monkeypatch):
    """Without a terminal: what is new is shown when the interval has passed, even where no image is done."""
    drawn = io.StringIO()
    monkeypatch.setattr("infra.console.sys.stderr", drawn)
    with progress(100, "sampling", "image") as bar:
        bar.update(32)
        before = drawn.getvalue()
        for step in range(1, 21):
            bar.set_postfix(step=f"{step}/20", refresh=False)
            bar.update(0)
        assert drawn.getvalue() == before
        bar.last_print_t -= 16.0  # the interval has passed
        bar.update(0)
        assert drawn.getvalue()[len(before) :].count("step=20/20") == 1


def test_of_libraries_only_what_is_wrong_is_logged(tmp_path):
    logger, handlers = absl_logging.get_absl_logger(), list(absl_logging.get_absl_logger().handlers)
    log_to_file(tmp_path / "log.txt")
    try:
        for path in ("/lib/site-packages/orbax/manager.py", "/lib/site-packages/jax/bridge.py", "/project/run_lib.py"):
            for level in (logging.INFO, logging.WARNING, logging.ERROR):
                name = f"{Path(path).parent.name} {logging.getLevelName(level)}"
                logger.handle(logging.LogRecord("absl", level, path, 1, name, None, None))
    finally:
        (added,) = set(logger.handlers) - set(handlers)
        logger.removeHandler(added)
        added.close()
    said = [line.split(maxsplit=3)[3] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert said == ["orbax ERROR", "jax WARNING", "jax ERROR", "project INFO", "project WARNING", "project ERROR"]


def test_libraries_are_quiet_in_scripts_without_app_run(caplog):
    """Their handler is the one of Python's logging, which absl adds at the first message."""
    logger = absl_logging.get_absl_logger()
    quiet_libraries()
    for path in ("/lib/site-packages/orbax/manager.py", "/project/examples/sample_workdir.py"):
        logger.handle(logging.LogRecord("absl", logging.WARNING, path, 1, path, None, None))
    assert caplog.messages == ["/project/examples/sample_workdir.py"]


def test_a_log_on_a_full_disk_is_no_traceback(capsys):
    logger, handlers = absl_logging.get_absl_logger(), list(absl_logging.get_absl_logger().handlers)
    log_to_file(Path("/dev/full"))
    (added,) = set(logger.handlers) - set(handlers)
    try:
        added.handle(logging.LogRecord("absl", logging.INFO, "run_lib.py", 1, "going on", None, None))
    finally:
        logger.removeHandler(added)
        with contextlib.suppress(OSError):  # what could not be written is tried once more
            added.close()
    assert capsys.readouterr().err == ""


def test_tracebacks_of_other_threads_are_not_printed(capsys, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    handler = absl_logging.get_absl_handler()
    filters = list(handler.filters)
    quiet_libraries()
    try:
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()

        class Broken:
            def __del__(self):
                raise OSError

        Broken()
        record = logging.LogRecord("absl", logging.ERROR, "/lib/orbax/manager.py", 1, "failed", None, None)
        assert not handler.filter(record)
    finally:
        for added in set(handler.filters) - set(filters):
            handler.removeFilter(added)
    assert capsys.readouterr().err == ""
