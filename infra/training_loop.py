"""The training loop, for score models and dequantizers alike: update, then let callbacks record, test and save."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array

from configs.default import Config
from infra import stop
from infra.checkpoints import Checkpoints
from infra.console import progress
from infra.metrics import MetricsWriter
from models.score import Params
from train_state import TrainState

Metrics = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Training:
    """What the loop needs to know of the model that it trains."""

    name: str
    """Shown in the progress bar."""
    last_step: int
    calls: Callable[[int], Iterator[tuple[int, Any]]]
    """From a first step on, for each compiled call: the step that it leads to, and its batches."""
    update: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    """The state and the mean metrics after a call. It may donate the state."""


class Call(NamedTuple):
    """A compiled call that has been made, as callbacks see it."""

    before: int
    """The step before the call."""
    step: int
    state: TrainState
    metrics: Metrics
    """Means over the steps of the call, on the devices."""
    recording: bool
    """Whether metrics are due."""
    testing: bool
    """Whether the loss on test data is due."""
    saving: bool
    """Whether a checkpoint is due."""
    last: bool


Callback = Callable[[Call], Mapping[str, str] | None]
"""Called after each compiled call, in order. It may return text for the progress bar, by name."""


def training_loop(training: Training, state: TrainState, config: Config, callbacks: Sequence[Callback]) -> TrainState:
    """Updates the state until `training.last_step`, or until asked to stop. The last call is always recorded and saved.

    A request to stop is answered after the call that is running.

    Args:
        config: config.training, for the numbers of steps between records, tests and checkpoints.
    """
    first = step = int(state.step)
    with progress(training.last_step, training.name, "step", initial=step) as bar:
        for after, batches in training.calls(first):
            before, step = step, after
            state, metrics = training.update(state, batches)
            if before == first:
                bar.unpause()  # so that the rate is that of steps, without their compilation
            recording = due(step, before, config.log_freq)
            # Several hosts wait for each other here, so they ask each other at records only.
            last = step >= training.last_step or stop.now(may_wait=recording)
            saving = last or any(
                due(step, before, every) for every in (config.snapshot_freq, config.snapshot_freq_for_preemption)
            )
            testing = due(step, before, config.eval_freq)
            call = Call(before, step, state, metrics, recording, testing, saving, last)
            for callback in callbacks:
                if (shown := callback(call)) is not None:
                    bar.set_postfix(shown, refresh=False)
            bar.update(step - before)
            if last or (saving and stop.now()):
                break
    return state


def due(step: int, before: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, step]."""
    return step // every > before // every


def record_metrics(writer: MetricsWriter, order: int, shown: str = "loss") -> Callback:
    """Collects the metrics of every call and writes their means when a record or a checkpoint is due.

    Args:
        shown: the name of the total in the progress bar.
    """

    def record(call: Call) -> Mapping[str, str] | None:
        writer.collect(call.metrics, call.step - call.before)
        if not (call.recording or call.saving):
            return None
        return {shown: f"{writer.record_train(call.step, order)['total']:.4g}"}

    return record


def record_test_loss(test: Callable[[Params], Mapping[str, float]], writer: MetricsWriter, order: int) -> Callback:
    """Writes what `test` computes from the averaged parameters."""

    def record(call: Call) -> None:
        if call.testing:
            with writer.aside():
                means = test(call.state.ema_params)
            writer.write(call.step, "test", order=order, **means)

    return record


def save_checkpoints(checkpoints: Checkpoints) -> Callback:
    def save(call: Call) -> None:
        if call.saving:
            checkpoints.save(call.state)

    return save
