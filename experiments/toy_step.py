"""Prints the cost of a training step on points for each order, and the share of a training run spent in its steps.

    python -m experiments.toy_step
    python -m experiments.toy_step --config=mixture_vp --set training.batch_size=1000

For each order, compiled calls of `training.n_jitted_steps` steps are timed alone, before and after a run of as many
calls by `run_lib.train`. The run also reads and copies the batches and records the losses. The share is the time of the
calls alone, divided by the time of the run. It is printed for the clock and for the processor; other programs on the
machine disturb processor time less. Processor time is meaningful only if the steps run on the CPU.
"""

import argparse
import ast
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np

import datasets
import run_lib
from build import TRAIN_KEY, Run, build
from configs.checks import flat, no_field
from configs.default import Config
from infra import parallel
from infra.console import text_table
from infra.metrics import MetricsWriter
from losses import ORDERS
from tests.golden_common import load_config


class Seconds(NamedTuple):
    """Seconds on the clock and of processor time."""

    wall: float
    processor: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="checkerboard_ve", help="a file of configs/toy")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="changes a field of the config"
    )
    parser.add_argument("--calls", type=int, default=10, help="number of compiled calls, alone and in a run")
    arguments = parser.parse_args()
    try:
        config = changed(load_config(f"toy.{arguments.config}"), arguments.set)
    except (KeyError, ValueError) as error:
        parser.error(f"{error.args[0]}")
    rows, first = [], None
    for order in ORDERS:
        config.training.score_matching_order = order
        alone, run = measure(config, arguments.calls)
        first = first or alone
        steps = arguments.calls * config.training.n_jitted_steps
        rows.append(
            (
                f"{order}",
                *(f"{1e3 * seconds / steps:.2f}" for seconds in (*alone, *run)),
                *(f"{a / b:.2f}" for a, b in zip(alone, first, strict=True)),
                *(f"{a / b:.0%}" for a, b in zip(alone, run, strict=True)),
            )
        )
    print(f"{arguments.config}, batch {config.training.batch_size}, {config.training.n_jitted_steps} steps a call,")
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores, possibly shared")
    headers = ("order", "ms a step", "of processor", "ms in a run", "of processor", "x order 1", "of processor")
    print(text_table((*headers, "share in step", "of processor"), rows))


def changed(config: Config, changes: Sequence[str]) -> Config:
    """Changes fields of a configuration and returns it. Each change has the form FIELD=VALUE.

    Raises:
        KeyError, ValueError: if the field does not exist or the value does not fit it.
    """
    known = flat(config)
    for change in changes:
        field, _, value = change.partition("=")
        if field not in known:
            raise KeyError(no_field(field, known))
        try:
            config.update_from_flattened_dict({field: ast.literal_eval(value)})
        except (TypeError, ValueError, SyntaxError) as error:
            raise ValueError(f"--set {change}: this is not a value of {field}, such as {known[field]!r}") from error
    return config


def measure(config: Config, calls: int) -> tuple[Seconds, Seconds]:
    """Returns the time of `calls` compiled calls alone, and in a run."""
    steps = config.training.n_jitted_steps
    config.training.n_iters = (calls + 1) * steps  # The first call compiles.
    config.training.log_freq = steps
    config.training.eval_freq = 2 * config.training.n_iters  # Test losses are not part of the time.
    config.training.snapshot_freq = config.training.snapshot_freq_for_preemption = config.training.n_iters
    run = build(config)
    repeat = repeated_call(run)
    before = timed(lambda: repeat(calls))
    with tempfile.TemporaryDirectory() as folder:
        in_run = run_seconds(config, Path(folder))
    after = timed(lambda: repeat(calls))
    return Seconds(*np.mean([before, after], axis=0)), in_run


def repeated_call(run: Run) -> Callable[[int], None]:
    """Returns a function of n that calls the compiled training steps n times on the same batches."""
    whole, along = parallel.replicated(run.mesh), parallel.along_batch(run.mesh, axis=1)
    train_steps = jax.jit(run.trainer.train_steps, in_shardings=(whole, along, whole), out_shardings=whole)
    state = jax.device_put(run.fresh_state(), whole)
    training = run_lib.score_training(run, datasets.source_from_config(run.config, "train"))
    (_, points), key = next(training.calls(0)), run.key(TRAIN_KEY)

    def repeat(n: int) -> None:
        after = state
        for _ in range(n):
            after, _ = train_steps(after, points, key)
        jax.block_until_ready(after)

    repeat(1)
    return repeat


class ClockedWriter(MetricsWriter):
    """Stores the time of each training record."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.moments: list[Seconds] = []

    def record_train(self, step: int, order: int) -> dict[str, float]:
        means = super().record_train(step, order)
        self.moments.append(now())
        return means


def run_seconds(config: Config, workdir: Path) -> Seconds:
    """Returns the time of training from its first record to its last: reading, copying, stepping and recording."""
    writer = ClockedWriter(workdir / "train")
    with mock.patch.object(run_lib, "MetricsWriter", return_value=writer):
        run_lib.train(config, workdir)
    return Seconds(*np.subtract(writer.moments[-1], writer.moments[0]))


def timed(call: Callable[[], None]) -> Seconds:
    start = now()
    call()
    return Seconds(*np.subtract(now(), start))


def now() -> Seconds:
    return Seconds(time.monotonic(), time.process_time())


if __name__ == "__main__":
    main()
