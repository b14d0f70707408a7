"""Waits for other processes, disks and compilers. Each wait has a time limit, and names what it waits for.

A wait inside compiled code or a system call cannot be interrupted by an exception. So `waiting` watches the wait from a
thread, which ends the process at the limit. `Background` runs a call in a thread; `within` leaves it behind at a limit.

This module does not import JAX.
"""

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

from absl import logging

from infra import stop

Result = TypeVar("Result")

NOTICE, LIMIT = 60.0, 1800.0
"""Seconds after which a wait is announced in the log, and after which the process ends with one line and `FAILED`."""

FAILED = 1
"""The exit code of a process that waited too long."""

_INTERVAL = 0.5


class _Wait(NamedTuple):
    what: str
    since: float
    limit: float
    notice: float


_waits: dict[int, _Wait] = {}
_numbers = itertools.count()
_started = threading.Event()


@contextlib.contextmanager
def waiting(what: str, limit: float = LIMIT, notice: float = NOTICE) -> Iterator[None]:
    """Logs what the block waits for after `notice` seconds, and ends the process after `limit` seconds.

    Args:
        what: completes "waiting for ...".
        limit, notice: seconds.
    """
    if not _started.is_set():
        _started.set()
        threading.Thread(target=_watch, daemon=True, name="waits").start()
    number = next(_numbers)
    _waits[number] = _Wait(what, time.monotonic(), limit, notice)
    try:
        yield
    finally:
        del _waits[number]


def _watch() -> None:
    announced: set[int] = set()
    while True:
        time.sleep(_INTERVAL)
        for number, wait in list(_waits.items()):
            seconds = time.monotonic() - wait.since
            if seconds > wait.notice and number not in announced:
                announced.add(number)
                logging.info("Waiting for %s, for at most %.0f s", wait.what, wait.limit)
            if seconds > wait.limit:
                end_process(f"waited {wait.limit:.0f} s for {wait.what}; run the same command again to resume")


def end_process(message: str) -> None:
    """Ends the process at once with one line."""
    sys.stderr.write(f"error: {message}\n")
    sys.stderr.flush()
    os._exit(FAILED)


class Background(Generic[Result]):
    """A call that runs in a thread of its own, while the thread that started it continues.

    If an error ends the process before the call, `leave` does not wait for the call.
    """

    def __init__(self, what: str, call: Callable[[], Result], *, daemon: bool = False):
        """Starts the call.

        Args:
            what: the name of the thread.
            daemon: a process that does not end by `leave` abandons the call, too. Python may crash if the call runs
                compiled code at that moment.
        """
        self._outcome: list[tuple[bool, Result | BaseException]] = []

        def run() -> None:
            try:
                self._outcome.append((True, call()))
            except BaseException as error:
                self._outcome.append((False, error))

        self._thread = _CallThread(target=run, daemon=daemon, name=what)
        self._thread.start()

    def ended(self, seconds: float | None = None) -> bool:
        """Waits up to this many seconds, or without a limit, and returns whether the call has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> Result:
        """Waits for the end of the call. Returns its result, or raises its exception."""
        self.ended()
        succeeded, result = self._outcome[0]
        if not succeeded:
            assert isinstance(result, BaseException)
            raise result
        return result  # type: ignore[return-value]


class _CallThread(threading.Thread):
    """The thread of a `Background` call, so that `leave` finds those that still run."""


def within(seconds: float, what: str, call: Callable[[], Result]) -> Result:
    """Returns the result of the call, which runs in a thread, and raises its exceptions.

    Args:
        what: the subject of the error message.

    Raises:
        TimeoutError: at the limit. The call continues in its thread, so the process must end by `leave`.
        KeyboardInterrupt: after a request to stop, with the same consequence.
    """
    background = Background(what, call, daemon=True)
    deadline = time.monotonic() + seconds
    while not background.ended(min(0.1, max(0.0, deadline - time.monotonic()))):
        if stop.requested():
            raise KeyboardInterrupt
        if time.monotonic() >= deadline:
            raise TimeoutError(f"{what} took longer than {seconds:g} s")
    return background.result()


def leave(code: int) -> int:
    """Returns the exit code, or ends the process with it at once if a call of `Background` or `within` still runs."""
    if any(isinstance(thread, _CallThread) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
