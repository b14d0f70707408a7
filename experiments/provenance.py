"""The commit and the machine that the numbers of a page come from."""

import json
import platform
from collections.abc import Iterable
from pathlib import Path

import jax

from infra.commits import commit
from infra.files import write_atomic
from infra.workdir import Workdir


def machine() -> str:
    """Describes this machine by its kind of device and processor, and by the version of jax."""
    return f"{jax.devices()[0].device_kind} ({platform.machine()}), jax {jax.__version__}"


def note_commit(folder: Path) -> None:
    """Adds the current commit to the commits noted in a folder. Runs and evaluations record theirs."""
    write_atomic(folder / "commits.txt", "\n".join(sorted({*noted_commits([folder]), commit()})))


def noted_commits(folders: Iterable[Path]) -> set[str]:
    """Returns the commits of folders of runs or evaluations: the recorded ones, and those that `note_commit` added."""
    noted = set[str]()
    for folder in folders:
        file = folder / "commits.txt"
        noted.update(file.read_text().split() if file.exists() else (), Workdir(folder).commits())
        for record in (*folder.glob("*/commits.json"), *folder.glob("*/*/commits.json")):  # of evaluations
            noted.update(json.loads(record.read_text())["commits"])
    return noted


def origin(command: str, commits: Iterable[str]) -> str:
    """Returns the sentence on a page that says where its numbers come from.

    Args:
        commits: the commits of the runs, and the commit of the page if it computes numbers itself.
    """
    names = sorted(set(commits))
    return f"Command `{command}`, commit{'s' if len(names) > 1 else ''} {', '.join(names)}, {machine()}."
