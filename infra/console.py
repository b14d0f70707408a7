"""The output of a running program: progress bars, log lines and tables."""

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from absl import logging as absl_logging
from tqdm import tqdm


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
        miniters=0,  # With only a time interval, update(0) can show a new postfix.
        disable=jax.process_index() != 0,
        file=sys.stderr,
    )


def text_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a table in plain ASCII, its columns aligned to the right."""
    cells = [[cell.replace("±", "+-").replace("\N{EN DASH}", "-") for cell in row] for row in (headers, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


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


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """A context for a script: bad input ends it with one line and exit code 2, as in main.py."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2)


def quiet_libraries() -> None:
    """Hides messages of libraries below warnings from standard error, and tracebacks of other threads.

    If a disk is full, the main thread fails, and so do several threads of orbax, tensorstore and TensorBoard. main.py
    prints the error of the main thread. The other errors are logged with --verbosity=1. Orbax also logs errors that it
    raises.
    """
    absl_logging.get_absl_logger().addFilter(_of_interest)  # A script without absl's app.run has other handlers.
    handler = absl_logging.get_absl_handler()
    handler.addFilter(_of_interest)
    handler.addFilter(_not_of_orbax)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    threading.excepthook = _log_thread_error
    sys.unraisablehook = _log_unraisable


def _log_thread_error(error: threading.ExceptHookArgs) -> None:
    absl_logging.debug("error in a thread", exc_info=error.exc_value)


def _log_unraisable(error: "sys.UnraisableHookArgs") -> None:
    absl_logging.debug("error in a callback", exc_info=error.exc_value)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname or absl_logging.level_debug()


def _of_interest(record: logging.LogRecord) -> bool:
    if "orbax" in record.pathname:  # orbax warns about every folder that it opens for reading only
        return record.levelno >= logging.ERROR
    return record.levelno >= logging.WARNING or "-packages" not in record.pathname
