"""Calls of main.py, and what they have left in the folder of a run."""

import shlex
import subprocess
import sys
from pathlib import Path

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


def is_evaluated(folder: Path) -> bool:
    """Returns whether the folder of an evaluation has a result."""
    return any(folder.glob(RESULTS))
