"""Calls of main.py, and what they have left in the folder of a run."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from infra.files import write_atomic
from infra.workdir import Workdir

RESULTS = "step_*[0-9].json"
"""The names of result files. Those of their times, *_seconds.json, are not among them."""


def call_main(*arguments: str) -> None:
    """Prints the command, and runs it in another process.

    Raises:
        subprocess.CalledProcessError: if main.py fails.
    """
    print("python", shlex.join(["main.py", *arguments]), flush=True)
    subprocess.run([sys.executable, "main.py", *arguments], check=True)


def is_trained(workdir: Path, step: int) -> bool:
    """Returns whether the run has the checkpoint of this step."""
    return (Workdir(workdir).checkpoints / str(step)).is_dir()


def evaluate_once(workdir: Path, folder: str, *arguments: str) -> None:
    """Calls main.py to evaluate the newest checkpoint of a run, unless the same call has succeeded for it.

    Args:
        folder: the name of the evaluation's folder in the workdir.
        arguments: of main.py; they include the workdir and the folder.
    """
    call = json.dumps({"step": newest_step(workdir), "arguments": arguments})
    path = last_call(workdir / folder)
    if not path.exists() or path.read_text() != call:
        call_main(*arguments)
        write_atomic(path, call)


def is_evaluated(folder: Path) -> bool:
    """Returns whether the last call of `evaluate_once` for this folder of an evaluation has succeeded."""
    return last_call(folder).exists()


def last_call(folder: Path) -> Path:
    """Returns the file with the last call that has succeeded for this folder of an evaluation."""
    return folder / "last_call.txt"


def newest_step(workdir: Path) -> int:
    """Returns the step of the newest checkpoint of a run; 0 if there is none."""
    return max((int(path.name) for path in Workdir(workdir).checkpoints.glob("*") if path.name.isdigit()), default=0)
