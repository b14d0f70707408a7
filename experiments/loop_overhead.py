"""Measures how much time a training run spends outside its training steps: data, records and checkpoints.

A run with its usual records, test losses and checkpoints pauses regularly. In each pause, the same compiled call is
made alone, on one batch, as often as in the part of the run before. The overhead is the time of the part divided by the
time of the calls alone, minus 1. Test losses do not count as overhead, so their time is subtracted and printed
separately. Times are printed for the clock and for the processor; other programs on the machine disturb processor time
less. Processor time is meaningful only if steps run on the CPU. Choose the number of parts so that they contain whole
intervals between checkpoints; by default, ten parts contain one.

    python -m experiments.loop_overhead
    python -m experiments.loop_overhead --parts=4 --config.training.score_matching_order=3
    python -m experiments.loop_overhead --config=configs/ve/cifar10_ncsnpp_continuous.py
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

import run_lib
from configs.default import Config
from experiments.main_calls import parsed_config
from experiments.toy_step import Seconds, now
from infra.console import one_line_errors, text_table
from infra.metrics import MetricsWriter
from infra.startup import use_fast_convolutions
from infra.training_loop import Call, Callback, Training, record_test_loss, training_loop

Test = Callable[[Any], Mapping[str, float] | None]


class Clock:
    """Times the parts of a run and the calls alone, in seconds of the clock and of the processor."""

    def __init__(self) -> None:
        self.in_run: list[Seconds] = []
        self.alone: list[Seconds] = []
        self.tests: list[Seconds] = []
        self._since, self._testing = now(), Seconds(0.0, 0.0)

    def timed_test(self, test: Test) -> Test:
        """Returns the test with its time measured."""

        def timed(params: Any) -> Mapping[str, float] | None:
            start = now()
            means = test(params)
            self._testing = _sum(self._testing, _difference(now(), start))
            return means

        return timed

    def pause(self, call: Call, training: Training, calls: int, *, first: bool) -> None:
        """Ends a part of the run, times `calls` calls alone, and starts the next part. The first part is left out."""
        jax.block_until_ready(call.metrics)
        part = _difference(_difference(now(), self._since), self._testing)
        alone = _alone(call, training, calls)
        if not first:
            self.in_run.append(part)
            self.alone.append(alone)
            self.tests.append(self._testing)
        self._since, self._testing = now(), Seconds(0.0, 0.0)


def _alone(call: Call, training: Training, calls: int) -> Seconds:
    """Times compiled calls on the batches of this call, from a copy of its state, because the state is donated."""
    state = jax.block_until_ready(jax.tree.map(lambda a: a.copy(), call.state))
    start, metrics = now(), None
    for _ in range(calls):
        state, metrics = training.update(state, call.batches)
    jax.block_until_ready((state, metrics))
    return _difference(now(), start)


def _sum(a: Seconds, b: Seconds) -> Seconds:
    return Seconds(a.wall + b.wall, a.processor + b.processor)


def _difference(a: Seconds, b: Seconds) -> Seconds:
    return Seconds(a.wall - b.wall, a.processor - b.processor)


def measure(config: Config, parts: int, steps: int, workdir: Path) -> Clock:
    """Trains for `parts` parts of `steps` steps, after a first one that is not measured.

    Raises:
        ValueError: if the middle of a part is not the end of a compiled call.
    """
    per_call = config.training.n_jitted_steps
    if steps % (2 * per_call):
        raise ValueError(f"--steps={steps} must be a multiple of {2 * per_call}, twice training.n_jitted_steps")
    config.training.n_iters = steps * (parts + 1)
    clock = Clock()

    def paused_loop(training: Training, state: Any, training_config: Config, callbacks: Sequence[Callback]) -> Any:
        def pause(call: Call) -> None:
            if call.step % steps == steps // 2:
                clock.pause(call, training, steps // per_call, first=call.step < steps)

        return training_loop(training, state, training_config, [*callbacks, pause])

    def timed_test_loss(test: Test, writer: MetricsWriter, order: int) -> Callback:
        return record_test_loss(clock.timed_test(test), writer, order)

    with (
        mock.patch.object(run_lib, "training_loop", paused_loop),
        mock.patch.object(run_lib, "record_test_loss", timed_test_loss),
    ):
        run_lib.train(config, workdir)
    return clock


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Flags that begin with --config choose the configuration, as for main.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--parts", type=int, default=10, help="parts of the run that are measured")
    parser.add_argument("--steps", type=int, default=200, help="training steps of a part")
    arguments, others = parser.parse_known_args()
    use_fast_convolutions()  # as main.py does
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        config = parsed_config(others, default="configs/digits/ncsnpp.py")
        steps = arguments.steps
        clock = measure(config, arguments.parts, steps, Path(folder) / "run")
    in_run, alone, tests = (np.array(each) for each in (clock.in_run, clock.alone, clock.tests))
    print(
        "overhead of each part, processor:",
        *(f"{100 * (a / b - 1):.1f} %" for a, b in zip(in_run[:, 1], alone[:, 1], strict=True)),
    )
    rows = []
    for name, part, calls, test in zip(("clock", "processor"), in_run.T, alone.T, tests.T, strict=True):
        overhead = 100 * (part / calls - 1)
        error = np.std(overhead, ddof=1) / np.sqrt(len(overhead))
        per_step = (f"{1e3 * np.mean(seconds) / steps:.2f}" for seconds in (part, calls, test))
        rows.append((name, *per_step, f"{np.mean(overhead):.1f} ± {error:.1f} %"))
    training = config.training
    print(f"{config.data.dataset}, order {training.score_matching_order}, batch {training.batch_size}")
    print(f"{arguments.parts} parts of {steps} steps, {training.n_jitted_steps} in a call")
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores, possibly shared")
    print(text_table(("seconds of", "ms a step in the run", "alone", "of test losses", "overhead"), rows))


if __name__ == "__main__":
    main()
