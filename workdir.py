"""A run's folder: whether it can be written to, and what ran in it, on what."""

import contextlib
import fcntl
import importlib.metadata
import json
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import jax
from absl import logging

import parallel
from build import Run
from files import write_atomic
from records import log_to_file


def check_writable(workdir: Path) -> None:
    """Makes the folder, and logs to a file in it, of each host one: log.txt, log_1.txt, ...

    Raises:
        OSError: in one line, if nothing can be written there.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise OSError(f"cannot write to --workdir={workdir}: {error.strerror}") from error
    host = jax.process_index()
    log_to_file(workdir / (f"log_{host}.txt" if host else "log.txt"))


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps the folder for this training: two at once would mix their records and remove each other's checkpoints.

    Raises:
        OSError: if another process trains there.
    """
    with (folder / ".lock").open("a") as file:
        if parallel.any_host(not _lock(file)):
            raise OSError(f"another process is training in {folder}; wait for it to end, or choose another folder")
        yield


def _lock(file: IO[str]) -> bool:
    """Whether the first host, for all, has the file's lock, which ends with the process if not before."""
    if jax.process_index() == 0:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:  # of a file system that has no locks
            logging.warning("%s cannot be locked: %s", file.name, error)
    return True


def describe_run(run: Run, workdir: Path, num_parameters: int) -> None:
    """Writes config.json and environment.json, and logs which fields changed since the run was last started."""
    if jax.process_index() != 0:
        return
    config = json.loads(run.config.to_json_best_effort())
    path = workdir / "config.json"
    if path.exists():
        _log_changes(json.loads(path.read_text()), config)
    write_atomic(path, json.dumps(config, indent=1))
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "diffrax", "numpy", "scipy")
    environment = {
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "hosts": jax.process_count(),
        "matmul_precision": jax.config.values["jax_default_matmul_precision"] or "default",
        "num_parameters": num_parameters,
    }
    write_atomic(workdir / "environment.json", json.dumps(environment, indent=1))


def _log_changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> None:
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            _log_changes(old, new, f"{prefix}{name}.")
        elif old != new:
            logging.info("changed since the last start: %s%s was %r, is %r", prefix, name, old, new)
