"""What a person sees of a running program: progress bars, log lines, and the answer to Ctrl-C."""

import contextlib
import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import jax
from absl import logging as absl_logging
from tqdm import tqdm

from infra import parallel


def progress(total: int, description: str, unit: str, initial: int = 0) -> tqdm:
    """A progress bar on standard error, on the first host only.

    If standard error is not a terminal, the bar writes a line every 15 seconds.
    """
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 15.0,
        miniters=0,  # only the interval counts, so that update(0) shows a new postfix
        disable=jax.process_index() != 0,
        file=sys.stderr,
    )


def log_to_file(path: Path) -> None:
    """Appends log messages to a file, in addition to standard error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s"))
    handler.addFilter(_of_interest)
    absl_logging.get_absl_logger().addHandler(handler)
    quiet_libraries()


class _LogFile(logging.FileHandler):
    """Ignores OSErrors such as a full disk: the error that stops the run is reported elsewhere."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


def quiet_libraries() -> None:
    """Hides messages of libraries below warnings from standard error."""
    absl_logging.get_absl_handler().addFilter(_of_interest)


def _of_interest(record: logging.LogRecord) -> bool:
    if "orbax" in record.pathname:  # orbax warns about every folder that it opens for reading only
        return record.levelno >= logging.ERROR
    return record.levelno >= logging.WARNING or "-packages" not in record.pathname


class StopRequest:
    """A request to stop, by SIGTERM or a first Ctrl-C. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.requested = False

    def now(self, may_wait: bool = True) -> bool:
        """Whether any host was asked to stop. All hosts get the same answer and must call this together.

        Args:
            may_wait: several hosts must wait for each other to agree; if they should not, the answer is no.
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
        sys.stderr.write("\nStopping after this step; saving the state first.\n")


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turns SIGINT and SIGTERM into a request that a loop checks between steps."""
    request = StopRequest()
    previous = {number: signal.signal(number, request.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
