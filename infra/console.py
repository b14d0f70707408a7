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
