"""Runs main.py with several lists of arguments, each in a process of its own.

A refused command spends most of its time on imports. So one process imports everything, and forks for each list of
arguments. It forks before JAX has looked at its devices.
"""

import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    said: list[str]
    """The lines on standard error, except the log lines of JAX and absl."""


def run_main(cases: Mapping[str, Sequence[str]]) -> dict[str, Ended]:
    """Runs main.py with the arguments of each case, one after another."""
    arguments = json.dumps([list(each) for each in cases.values()])
    forks = subprocess.run(
        [sys.executable, "-m", "tests.forked_main"], input=arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    ended = [Ended(code, _without_log_lines(text)) for code, text in json.loads(forks.stdout)]
    return dict(zip(cases, ended, strict=True))


def _without_log_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if not re.match(r"[IW]\d{4} ", line)]


def _fork(arguments: list[str]) -> tuple[int, str]:
    """Returns the exit code of a fork that becomes `python main.py`, and what it wrote to standard error."""
    with tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if child == 0:
            os.dup2(errors.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            _be_main(arguments)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        errors.seek(0)
        return code, errors.read()


def _be_main(arguments: list[str]) -> None:
    """Runs main.py and ends the process, without freeing its memory, which would have to be copied first."""
    import main

    sys.argv, code = ["main.py", *arguments], 1  # where ml_collections looks for the fields
    try:
        main.app.run(main.main, flags_parser=main._parse_flags)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    import run_lib  # noqa: F401  # main.py imports it only when it runs a mode

    gc.freeze()  # a garbage collection in a fork would copy this process's memory
    print(json.dumps([_fork(arguments) for arguments in json.load(sys.stdin)]))
