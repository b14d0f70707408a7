"""What a run writes down of its training."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from records import MetricsWriter


def test_means_and_rates_count_steps_not_calls(tmp_path, monkeypatch):
    clock = iter([0.0, 4.0, 5.0])  # begun; record due; written
    monkeypatch.setattr("records.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with MetricsWriter(tmp_path) as metrics:
        metrics.collect({"total": jnp.asarray(1.0)}, steps=6)
        metrics.collect({"total": jnp.asarray(5.0)}, steps=2)  # a call cut short by a checkpoint
        assert metrics.record_train(8, order=1) == {"total": 2.0}
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert record["steps_per_second"] == 2.0


def test_what_is_not_finite_is_named_with_its_steps(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        metrics.collect({"total": jnp.asarray(1.0), "third": jnp.asarray(jnp.nan)}, steps=6)
        metrics.collect({"total": jnp.asarray(1.0), "third": jnp.asarray(1.0)}, steps=2)
        with pytest.raises(FloatingPointError, match="third not finite between steps 92 and 100"):
            metrics.record_train(100, order=3)
