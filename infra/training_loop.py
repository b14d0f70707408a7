"""The training loop, for score models and dequantizers alike: update, then let callbacks record, test and save."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from configs.default import Config
from infra import parallel
from infra.checkpoints import Checkpoints
from infra.console import progress
from infra.files import write_npz
from infra.metrics import FAILED, MetricsWriter
from infra.startup import Startup
from infra.workdir import Workdir
from models.score import Params
from train_state import TrainState

Metrics = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Training:
    """A model to train, as the loop needs it."""

    name: str
    """The label of the progress bar."""
    last_step: int
    calls: Callable[[int], Iterator[tuple[int, Any]]]
    """calls(first): yields, for each compiled call from step `first` on, the step at its end, and its batches."""
    update: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    """update(state, batches): returns the state and the mean metrics after a call. It may donate the state."""


class Call(NamedTuple):
    """A compiled call that has been made, as callbacks see it."""

    before: int
    """The step before the call."""
    step: int
    batches: Any
    """The batches of the call, on the devices."""
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

    After a request to stop, the loop ends with the compiled call that is running.

    Args:
        config: config.training, for the numbers of steps between records, tests and checkpoints.
    """
    first = step = int(state.step)
    with progress(training.last_step, training.name, "step", initial=step) as bar:
        for after, batches in training.calls(first):
            before, step = step, after
            state, metrics = training.update(state, batches)
            if before == first:
                bar.unpause()  # The rate of the bar must not include the compilation.
            recording = due(step, before, config.log_freq)
            # To agree on a stop, several hosts wait for each other. So they do this only at records.
            last = step >= training.last_step or parallel.stop_requested(may_wait=recording)
            saving = last or any(
                due(step, before, every) for every in (config.snapshot_freq, config.snapshot_freq_for_preemption)
            )
            testing = due(step, before, config.eval_freq)
            call = Call(before, step, batches, state, metrics, recording, testing, saving, last)
            for callback in callbacks:
                if (shown := callback(call)) is not None:
                    bar.set_postfix(shown, refresh=False)
            bar.update(step - before)
            if last or (saving and parallel.stop_requested()):
                break
    return state


def due(step: int, before: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, step]."""
    return step // every > before // every


def record_first_step(startup: Startup, writer: MetricsWriter) -> Callback:
    """Writes how long the run took to its first call, in a record with the split "start". It waits for that call."""
    waiting = [startup]

    def record(call: Call) -> None:
        if waiting:
            jax.block_until_ready(call.metrics)
            writer.write(call.step, "start", **waiting.pop().first_step())

    return record


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


def record_test_loss(
    test: Callable[[Params], Mapping[str, float] | None], writer: MetricsWriter, order: int
) -> Callback:
    """Writes the means that `test` computes from the averaged parameters, unless a request to stop interrupts it."""

    def record(call: Call) -> None:
        if call.testing:
            with writer.aside():
                means = test(parallel.whole(call.state.ema_params))
            if means is not None:
                writer.write(call.step, "test", order=order, **means)

    return record


def save_checkpoints(checkpoints: Checkpoints) -> Callback:
    """Saves the state after each call at whose end a checkpoint is due."""

    def save(call: Call) -> None:
        if call.saving:
            checkpoints.save(call.state)

    return save


def stop_after_failures(limit: int, workdir: Workdir) -> Callback:
    """Stops training after this many steps in a row whose loss or gradient is not finite, which change no parameters.

    Looks at a call when the next one has started, so that the devices do not wait. Saves the batches of the call that
    reaches the limit.

    Raises:
        FloatingPointError: from the callback; it names the step and the times of the largest losses.
    """
    waiting: list[Call] = []
    in_a_row = 0

    def check(call: Call) -> None:
        nonlocal in_a_row
        waiting.append(call._replace(state=None))
        while len(waiting) > 1 or (waiting and call.last):
            done = waiting.pop(0)
            for number, failed in enumerate(np.atleast_1d(jax.device_get(done.metrics[FAILED]))):
                in_a_row = in_a_row + 1 if failed else 0
                if in_a_row >= limit:
                    raise FloatingPointError(_explain(done, number, limit, workdir))

    return check


def _explain(call: Call, number: int, limit: int, workdir: Workdir) -> str:
    """Saves the batches of the call, whose step with this number failed. Returns the message for the user."""
    step = call.before + number + 1
    times = np.atleast_2d(jax.device_get(call.metrics.get("largest_times", np.empty(0))))
    times = times[min(number, len(times) - 1)]
    batches = parallel.fetch(call.batches)
    arrays = batches._asdict() if hasattr(batches, "_asdict") else {"batches": batches}
    if jax.process_index() == 0:
        write_npz(workdir.failed_batch, **arrays, first_step=call.before + 1, step=step, times=times)
    where = f"; the largest losses of this step are at t = {', '.join(f'{t:.3g}' for t in times)}" if len(times) else ""
    return (
        f"loss or gradient not finite in {limit} steps in a row, the last of which is step {step}{where}; its batch is "
        f"in {workdir.failed_batch}. Lower optim.lr or optim.grad_clip, or raise training.smallest_time, and run the "
        "command again to resume from the last checkpoint"
    )
