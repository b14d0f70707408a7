"""What a run writes down while it works: metrics, the log, and progress for whoever watches."""

import contextlib
import json
import logging
import math
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TextIO

import jax
import numpy as np
from absl import logging as absl_logging
from jaxtyping import Array
from tensorboardX import SummaryWriter
from tqdm import tqdm

import parallel


class MetricsWriter:
    """Appends metrics to JSON lines (the record) and TensorBoard files (for looking); silent on hosts but the first.

    Metrics of single steps are collected as they come from the devices and written as means when a record is due. To
    collect waits for the step before: the devices always have one step in hand, and time is not counted ahead of them.
    """

    def __init__(self, folder: Path):
        self.active = jax.process_index() == 0
        self.pending: list[Mapping[str, Array]] = []
        self.pending_steps: list[int] = []
        self.started = self.recorded = time.monotonic()
        self.elapsed_before = 0.0
        if self.active:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "metrics.jsonl"
            self.elapsed_before = _last_seconds(path)
            self.lines = _open_for_lines(path)
            self.board = SummaryWriter(str(folder / "tensorboard"))

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.active:
            self.lines.close()
            self.board.close()

    def collect(self, metrics: Mapping[str, Array], steps: int) -> None:
        """Takes the means over as many steps."""
        if self.pending:
            jax.block_until_ready(self.pending[-1])
        self.pending.append(metrics)
        self.pending_steps.append(steps)

    def record_train(self, step: int, order: int) -> dict[str, float]:
        """Writes the means over the steps collected since the last record, and returns them.

        Raises:
            FloatingPointError: if one is not finite.
        """
        collected, steps = jax.device_get(self.pending), self.pending_steps
        now = time.monotonic()
        rate = sum(steps) / max(now - self.recorded, 1e-9)
        self.pending, self.pending_steps, self.recorded = [], [], now
        means = {name: float(np.average([c[name] for c in collected], weights=steps)) for name in collected[0]}
        self.write(step, "train", order=order, **means, steps_per_second=rate)
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(
                f"{', '.join(bad)} not finite between steps {step - sum(steps)} and {step}; the last checkpoint is "
                "from before: lower optim.lr or optim.grad_clip, or raise training.smallest_time, and start again"
            )
        return means

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """For work between steps whose time does not count as theirs."""
        if self.pending:
            jax.block_until_ready(self.pending[-1])
        started = time.monotonic()
        yield
        self.recorded += time.monotonic() - started

    def write(self, step: int, split: str, **values: float | int) -> None:
        """Writes one record; `seconds` counts the time of training, interruptions left out."""
        if not self.active:
            return
        seconds = round(self.elapsed_before + time.monotonic() - self.started, 3)
        self.lines.write(json.dumps({"step": step, "split": split, **values, "seconds": seconds}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(f"{split}/{name}", value, step)


def _open_for_lines(path: Path) -> TextIO:
    """Opens for appending lines; a line that a kill cut short is ended first, so it spoils no other."""
    cut_short = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    lines = path.open("a", buffering=1)
    if cut_short:
        lines.write("\n")
    return lines


def _last_seconds(path: Path) -> float:
    """The run's time as of its last complete record."""
    if not path.exists():
        return 0.0
    for line in reversed(path.read_text().splitlines()):
        with contextlib.suppress(json.JSONDecodeError, KeyError):
            return float(json.loads(line)["seconds"])
    return 0.0


def progress(total: int, description: str, unit: str, initial: int = 0) -> tqdm:
    """A progress bar on standard error: what is done, the rate, and the time left; on the first host only.

    Where nobody sees it redrawn it writes a line now and then.
    """
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 15.0,
        miniters=0,  # only the interval counts, so that update(0) shows what else is new
        disable=jax.process_index() != 0,
        file=sys.stderr,
    )


def log_to_file(path: Path) -> None:
    """Appends what is logged to a file, beside standard error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s"))
    handler.addFilter(_of_interest)
    absl_logging.get_absl_logger().addHandler(handler)
    quiet_libraries()


class _LogFile(logging.FileHandler):
    """Says nothing of lines that a full disk does not take: what stops the run is said elsewhere."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


def quiet_libraries() -> None:
    """Leaves on standard error what this project logs, and of libraries what is wrong."""
    absl_logging.get_absl_handler().addFilter(_of_interest)


def _of_interest(record: logging.LogRecord) -> bool:
    if "orbax" in record.pathname:  # warns of every folder that it is to leave as it is
        return record.levelno >= logging.ERROR
    return record.levelno >= logging.WARNING or "-packages" not in record.pathname


class StopRequest:
    """Whether someone asked to stop: SIGTERM, or a first Ctrl-C. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.requested = False

    def now(self, may_wait: bool = True) -> bool:
        """Whether to stop here: if any host was asked to, the same on all hosts, which have to call this together.

        Several hosts wait for each other to agree; where they should not, the answer is no.
        """
        if jax.process_count() > 1:
            if not may_wait:
                return False
            self.requested = parallel.any_host(self.requested)
        return self.requested

    def handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        sys.stderr.write("\nstopping after this step; the state is saved first\n")


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turns signals to stop into a request, which the loop looks at between steps."""
    request = StopRequest()
    previous = {number: signal.signal(number, request.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
