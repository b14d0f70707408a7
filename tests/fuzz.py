"""Random bad input: each must give exit code 2 and one line that names the culprit, before anything is written.

    python -m tests.fuzz --cases=300 --seed=0

A case is a command line with one thing wrong: a field, a combination of fields, a flag, or a file. It runs main.py in a
child of this process, which has imported everything, so that 300 cases take a minute or two. With --processes=N, the
first N cases run in new processes instead. The exit status is 1 if the answer to a case is wrong. A case
depends only on the seed and its number; --only=NUMBER repeats it.
"""

import argparse
import logging
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.fuzz_cases import KINDS, Case

ROOT = Path(__file__).parent.parent
MOST_SECONDS = 60.0
BAD_INPUT = 2
LEAST_SECONDS = 1.0
"""Only networks take longer to compile. Other programs are single operations on small arrays."""


class Outcome(NamedTuple):
    """The outcome of a command."""

    status: int
    stderr: str
    compiled: int
    """Programs that took more than `LEAST_SECONDS` to compile; -1 if that is not known."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300, help="number of cases")
    parser.add_argument("--seed", type=int, default=0, help="seed of the cases")
    parser.add_argument("--processes", type=int, default=0, help="how many of the cases run in new processes")
    parser.add_argument("--only", type=int, help="run this case alone, and print what it does")
    arguments = parser.parse_args()
    numbers = range(arguments.cases) if arguments.only is None else [arguments.only]
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    import main  # noqa: F401
    import run_lib  # noqa: F401

    wrong, kinds = 0, dict.fromkeys((kind.__name__ for kind in KINDS), 0)
    for number in numbers:
        kind, case, outcome, problems = answer(arguments.seed, number, in_child=number >= arguments.processes)
        kinds[kind] += 1
        if problems or arguments.only is not None:
            wrong += bool(problems)
            print(f"case {number} ({kind}): {' '.join(case.arguments)}\n  {'; '.join(problems)}")
            print(f"  status {outcome.status}, stderr: {outcome.stderr[-600:]!r}", flush=True)
    print(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in kinds.items()))
    print(f"{len(numbers) - wrong} of {len(numbers)} cases gave exit code {BAD_INPUT} and one line naming the culprit")
    return int(wrong > 0)


def answer(seed: int, number: int, in_child: bool) -> tuple[str, Case, Outcome, list[str]]:
    """Runs a case in its own folder. Returns its kind, the case, the outcome, and what was wrong with it."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz_"))
    try:
        chance = random.Random(f"{seed} {number}")
        kind = KINDS[number % len(KINDS)]
        case = kind(chance, folder)
        before = contents(folder)
        outcome = run_in_child(case) if in_child else run_in_process(case)
        problems = list(complaints(case, outcome))
        if contents(folder) != before:
            problems.append(f"wrote {sorted(contents(folder) ^ before)[:3]}")
        return kind.__name__, case, outcome, problems
    finally:
        shutil.rmtree(folder)


def complaints(case: Case, outcome: Outcome) -> Iterator[str]:
    """Says what is wrong with the answer to a case."""
    if outcome.status != BAD_INPUT:
        yield f"exit status {outcome.status}"
    lines = [line for line in outcome.stderr.splitlines() if line.strip() and "%|" not in line]  # no progress bars
    if len(lines) != 1:
        yield f"{len(lines)} lines"
    if not any(culprit in outcome.stderr for culprit in case.culprits):
        yield f"none of {case.culprits} is named"
    if outcome.compiled > 0:
        yield f"{outcome.compiled} programs were compiled"


def contents(folder: Path) -> set[tuple[str, int, int]]:
    """Returns the names, sizes and times of all files below the folder."""
    stats = {path: path.lstat() for path in folder.rglob("*")}
    return {(str(path), stat.st_size, stat.st_mtime_ns if path.is_file() else 0) for path, stat in stats.items()}


def run_in_process(case: Case) -> Outcome:
    """Runs main.py in a new process."""
    command = [sys.executable, "main.py", *case.arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=MOST_SECONDS)
    return Outcome(result.returncode, result.stderr, -1)


def run_in_child(case: Case) -> Outcome:
    """Runs main.py in a fork of this process, in which JAX has not looked at its devices yet."""
    errors, counts = os.pipe(), os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(errors[0])
        _be_main(case.arguments, errors[1], counts[1])
    os.close(errors[1])
    os.close(counts[1])
    said = _read_until(child, errors[0], time.monotonic() + MOST_SECONDS)
    compiled = os.read(counts[0], 100)
    os.close(errors[0])
    os.close(counts[0])
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Outcome(status, said.decode(errors="replace"), int(compiled or b"0"))


def _be_main(arguments: list[str], errors: int, counts: int) -> None:
    """The child: becomes `python main.py`, and reports how many programs were compiled."""
    import jax
    from absl import app

    import main as program

    compiled: list[str] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if "backend_compile" in event and duration_secs > LEAST_SECONDS:
            compiled.append(event)

    status = 1
    try:
        os.dup2(errors, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        jax.monitoring.register_event_duration_secs_listener(note)
        logging.root.handlers.clear()  # Python's own handler, which app.run removes in a new process
        sys.argv = ["main.py", *arguments]  # where ml_collections looks for the fields
        try:
            app.run(program.main, flags_parser=program._parse_flags)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        os.write(counts, str(len(compiled)).encode())
        sys.stderr.flush()
        os._exit(status)


def _read_until(child: int, pipe: int, deadline: float) -> bytes:
    """Reads everything that the child writes, and kills the child at the deadline."""
    said = b""
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            os.kill(child, 9)
            return said + b"\nno answer in time\n"
        part = os.read(pipe, 65536)
        if not part:
            return said
        said += part


if __name__ == "__main__":
    sys.exit(main())
