"""Training metrics of a run, written and read: JSON lines, which are the record, and TensorBoard files to look at."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int
from tensorboardX import SummaryWriter

FILE = "metrics.jsonl"

FAILED = "failed"
"""The name of the metric that is 1 for each step whose loss or gradient is not finite."""


class MetricsWriter:
    """Appends metrics to JSON lines and TensorBoard files, on the first host only.

    Metrics of steps are collected on the devices and written as means when a record is due. Collecting waits until the
    previous step is done. So the devices always have one step queued, and the host, which measures the time, is at most
    one step ahead of them.
    """

    def __init__(self, folder: Path):
        self.active = jax.process_index() == 0
        self.pending: list[Mapping[str, Array]] = []
        self.pending_steps: list[int] = []
        self.started = self.recorded = time.monotonic()
        self.elapsed_before = 0.0
        if self.active:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / FILE
            self.elapsed_before = _last_seconds(path)
            self.lines = _open_for_lines(path)
            self.board = SummaryWriter(str(folder / "tensorboard"))

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self.active:
            # On a full disk, a write has failed already. Closing fails as well, and must not hide the first error.
            with contextlib.suppress(*([OSError] if kind else [])):
                self.lines.close()
            with contextlib.suppress(*([OSError] if kind else [])):
                self.board.close()

    def collect(self, metrics: Mapping[str, Array], steps: int) -> None:
        """Collects means over this number of steps."""
        if self.pending:
            jax.block_until_ready(self.pending[-1])
        self.pending.append(metrics)
        self.pending_steps.append(steps)

    def record_train(self, step: int, order: int) -> dict[str, float]:
        """Writes and returns the means over all steps since the last record, without those that failed.

        The number of failed steps is written as `skipped_steps` if it is not 0. If all steps failed, means are NaN.
        """
        collected, steps = jax.device_get(self.pending), self.pending_steps
        now = time.monotonic()
        rate = sum(steps) / max(now - self.recorded, 1e-9)
        self.pending, self.pending_steps, self.recorded = [], [], now
        failed = [int(np.sum(call.get(FAILED, 0))) for call in collected]
        weights = np.subtract(steps, failed)
        counted = [call for call, weight in zip(collected, weights, strict=True) if weight] or collected[:1]
        weights = weights[weights > 0] if weights.any() else None
        names = [name for name in collected[0] if np.ndim(collected[0][name]) == 0 and name != FAILED]
        means = {name: float(np.average([call[name] for call in counted], weights=weights)) for name in names}
        skipped = {"skipped_steps": sum(failed)} if any(failed) else {}
        self.write(step, "train", order=order, **means, **skipped, steps_per_second=rate)
        if skipped:
            logging.warning("%d steps up to %d were skipped: loss or gradient not finite", sum(failed), step)
        return means

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """A context for work between steps whose time must not count as training time."""
        if self.pending:
            jax.block_until_ready(self.pending[-1])
        started = time.monotonic()
        yield
        self.recorded += time.monotonic() - started

    def write(self, step: int, split: str, **values: float | int) -> None:
        """Writes one record. Its `seconds` are the run's total time without interruptions."""
        if not self.active:
            return
        seconds = round(self.elapsed_before + time.monotonic() - self.started, 3)
        self.lines.write(json.dumps({"step": step, "split": split, **values, "seconds": seconds}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(f"{split}/{name}", value, step)


def _open_for_lines(path: Path) -> TextIO:
    """Opens a file for appending. If a kill cut the last line short, it adds the missing line break."""
    cut_short = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    lines = path.open("a", buffering=1)
    if cut_short:
        lines.write("\n")
    return lines


def _last_seconds(path: Path) -> float:
    """The run's total time in the last complete record."""
    if not path.exists():
        return 0.0
    for line in reversed(path.read_text(errors="replace").splitlines()):
        with contextlib.suppress(KeyError, TypeError, ValueError):
            return float(json.loads(line)["seconds"])
    return 0.0


@dataclasses.dataclass(frozen=True)
class MetricCurve:
    """The values of one metric, and the steps that they were recorded at."""

    steps: Int[np.ndarray, " n"]
    values: Float[np.ndarray, " n"]

    def smoothed(self) -> Float[np.ndarray, " n"]:
        """Means over a window of a twentieth of the curve, narrower at its ends, of the values that are finite."""
        window = np.ones(2 * (len(self.values) // 40) + 1)
        known = np.isfinite(self.values)
        total = np.convolve(np.where(known, self.values, 0), window, mode="same")
        count = np.convolve(known, window, mode="same")
        return np.where(known, total / np.maximum(count, 1), np.nan)


RunCurves = Mapping[str, Mapping[str, MetricCurve]]
"""The curves of a run by split, "train", "test" or "start", and then by the name of the metric."""


def read_metrics(folder: Path) -> RunCurves:
    """The curves that a `MetricsWriter` wrote into the folder; none if it holds no metrics.

    If a resumed run went back to an earlier step, records of later steps that were written before count no longer: the
    parameters that they describe are lost. Lines that a kill cut short are left out.
    """
    path = folder / FILE
    by_step: dict[str, dict[int, dict[str, Any]]] = {}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            split, step = record["split"], int(record["step"])
        except (KeyError, TypeError, ValueError):
            continue
        by_step.setdefault(split, {})
        for other, records in by_step.items():
            # Other splits may have a record of the same step. The steps of each split ascend.
            while records and next(reversed(records)) >= step + (other != split):
                records.popitem()
        by_step[split][step] = record
    return {split: _curves(records) for split, records in by_step.items() if records}


def _curves(records: dict[int, dict[str, Any]]) -> dict[str, MetricCurve]:
    steps = sorted(records)
    names = {name for record in records.values() for name, value in record.items() if isinstance(value, int | float)}
    curves = {}
    for name in names - {"step"}:
        having = [step for step in steps if isinstance(records[step].get(name), int | float)]
        curves[name] = MetricCurve(np.array(having), np.array([records[step][name] for step in having], np.float64))
    return curves


def trained_order(folder: Path, step: int) -> int | None:
    """The order of the loss that the run was trained with at `step`; None before its first record."""
    order = value_at(read_metrics(folder), "order", step)
    return None if order is None else int(order)


def value_at(metrics: RunCurves, name: str, step: int) -> float | None:
    """The value of a training metric at `step`, or in the last record before it; None before the first record."""
    curve = metrics.get("train", {}).get(name)
    if curve is None or not (curve.steps <= step).any():
        return None
    return float(curve.values[curve.steps <= step][-1])
