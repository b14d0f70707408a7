"""Calls of main.py, their configurations, and what they have left in the folder of a run."""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from configs.default import Config
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


def parsed_config(arguments: Sequence[str], default: str) -> Config:
    """Returns the configuration that these flags of main.py choose.

    Args:
        arguments: --config and --config.FIELD.
        default: the file that is used without --config.

    Raises:
        ValueError: for other arguments, or a value that does not fit its field.
    """
    values, argv = flags.FlagValues(), ["main.py", *arguments]
    try:
        config = config_flags.DEFINE_config_file("config", default, flag_values=values, sys_argv=argv)
        unknown = values(argv)[1:]
    except flags.Error as error:
        raise ValueError(str(error)) from error
    except AttributeError as error:
        raise ValueError(f"the configuration has no field {error}") from error
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]}")
    return config.value


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
