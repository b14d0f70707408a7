"""Requests to stop: a flag that signals set, and that every loop looks at.

A signal handler that raises can lose its signal, for example inside a callback of the garbage collector. So handlers
here raise nothing. A thread receives the numbers of the signals, even while the main thread waits for compiled code.
Loops look at the flag between batches, and between the parts of a long computation: by `parallel.stop_requested` and
`parallel.check_stop` where all hosts work in step, and by `check` elsewhere.

This module does not import JAX, so that main.py can answer signals before the slow imports.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Ctrl-C, the request of most schedulers, a closed terminal, and the warning that SLURM's --signal=USR1 sends."""

STOPPED, KILLED = 75, 130
"""Exit codes: interrupted with everything saved (EX_TEMPFAIL of sysexits.h), and stopped at once by a second Ctrl-C."""

_requested = threading.Event()


def request() -> None:
    """Asks all loops of this process to stop."""
    _requested.set()


def clear() -> None:
    """Withdraws the request."""
    _requested.clear()


def requested() -> bool:
    """Whether this process was asked to stop."""
    return _requested.is_set()


def check() -> None:
    """Raises KeyboardInterrupt if this process was asked to stop. See `parallel.check_stop` for all processes."""
    if requested():
        raise KeyboardInterrupt


@contextlib.contextmanager
def on_signals() -> Iterator[None]:
    """Turns the signals in `SIGNALS` into requests to stop, until the end of the context. Contexts may be nested.

    A second Ctrl-C ends the process at once. A signal that the parent process ignores, as nohup ignores SIGHUP, stays
    ignored. Only the main thread can handle signals, so in other threads the context has no effect.
    """
    inside = signal.getsignal(signal.SIGTERM) is _ignore
    if inside or threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    listener = threading.Thread(target=_listen, args=(reading,), daemon=True, name="signals")
    listener.start()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    previous = {number: signal.signal(number, _ignore) for number in handled}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        os.close(writing)
        listener.join()
        os.close(reading)
        clear()


def _ignore(number: int, frame: FrameType | None) -> None:
    """Does nothing: Python writes the number of a signal to the pipe only if the signal has a handler."""
    del number, frame


def _listen(pipe: int) -> None:
    """Sets the flag for each signal, whose number is a byte in the pipe, until the pipe is closed."""
    while numbers := os.read(pipe, 1):
        if numbers[0] not in SIGNALS:
            continue
        if requested() and numbers[0] == signal.SIGINT:
            os._exit(KILLED)
        if not requested():
            request()
            sys.stderr.write("\nStopping after this step. Press Ctrl-C again to stop at once.\n")
