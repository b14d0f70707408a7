"""Checks of the machine for --mode=selftest: devices, a collective over all of them, and the disk."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from infra import parallel
from infra.cost import GIGA, device_memory
from infra.waiting import within
from train_state import TrainState

COLLECTIVE_SECONDS = 60.0
"""Time limit in seconds of the collective over all devices, including its compilation."""

PROBE_BYTES = 2**26
"""The size of the file that measures the speed of the disk."""


class Check(NamedTuple):
    """The result of one check: a row of the self-test's table."""

    name: str
    passed: bool
    result: str
    seconds: float

    @property
    def line(self) -> str:
        """Returns the row as text, under `HEADER`."""
        status = "ok" if self.passed else "FAILED"
        return f"{self.name:<21} {status:<7} {self.seconds:>7.1f}  {' '.join(self.result.split())}"


HEADER = f"{'check':<29} {'seconds':>7}  result"


def check(name: str, measure: Callable[[], str]) -> Check:
    """Runs a check, which returns its result or raises. It catches bad input and failures, not programming errors."""
    started = time.monotonic()
    try:
        passed, result = True, measure()
    except (ValueError, OSError, RuntimeError) as error:
        passed, result = False, str(error)
    return Check(name, passed, result, time.monotonic() - started)


def devices() -> str:
    """Describes all devices of all processes."""
    kinds = sorted({device.device_kind for device in jax.devices()})
    count, processes = jax.device_count(), jax.process_count()
    each = "process" if processes == 1 else "processes"
    return f"{count} x {', '.join(kinds)}, memory of {device_memory():.1f} GB, in {processes} {each}"


def collective(folder: Path, seconds: float = COLLECTIVE_SECONDS) -> str:
    """Adds numbers over all devices, and checks that all processes see the same folder.

    Raises:
        TimeoutError: naming the processes that did not reach the collective, as far as the folder shows.
        OSError: if the processes do not share the folder.
        RuntimeError: for a wrong sum.
    """
    marks = folder / ".selftest"
    marks.mkdir(parents=True, exist_ok=True)
    mark = marks / str(jax.process_index())
    mark.write_text("")
    try:
        total = within(seconds, f"the sum over {jax.device_count()} devices", _sum_over_devices)
    except TimeoutError as error:
        missing = missing_processes(marks, jax.process_count(), mark.stat().st_mtime - seconds)
        who = f"; no sign of process {', '.join(map(str, missing))}" if missing else "; all processes have started it"
        raise TimeoutError(f"{error}{who}") from error
    missing = missing_processes(marks, jax.process_count(), 0.0)
    parallel.any_host(False)  # This waits until all processes have looked, before any mark is removed.
    mark.unlink()
    if missing:
        raise OSError(f"{folder} is not shared: process {jax.process_index()} does not see process {missing[0]} there")
    count = jax.device_count()
    if total != count * (count + 1) / 2:
        raise RuntimeError(f"the sum over {count} devices is {total}, but should be {count * (count + 1) // 2}")
    return f"the sum over {count} devices is right; all processes share the workdir"


def _sum_over_devices() -> float:
    mesh = parallel.device_mesh()
    first = jax.process_index() * jax.local_device_count()
    local = np.arange(first + 1, first + 1 + jax.local_device_count(), dtype=np.float32)
    return float(jax.jit(jnp.sum, out_shardings=parallel.replicated(mesh))(parallel.global_array(mesh, local)))


def missing_processes(marks: Path, count: int, since: float) -> list[int]:
    """Returns the processes that have left no mark in the folder at or after the time `since`."""
    return [
        number
        for number in range(count)
        if not (marks / str(number)).exists() or (marks / str(number)).stat().st_mtime < since
    ]


def disk(folder: Path, needed: int) -> str:
    """Measures how fast a file is written to the folder, and compares the free space with what a run needs.

    Args:
        needed: bytes.

    Raises:
        OSError: if there is too little space, or the file cannot be written.
    """
    path = folder / f".selftest_{jax.process_index()}"
    data = os.urandom(PROBE_BYTES)
    started = time.monotonic()
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    finally:
        written = time.monotonic() - started
        path.unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free
    text = f"{PROBE_BYTES / 1e6 / written:.0f} MB/s, {free / GIGA:.1f} GB free; checkpoints need {needed / GIGA:.2f} GB"
    if needed > free:
        raise OSError(f"{text}; free some space, raise training.snapshot_freq, or use another workdir")
    return text


def checkpoint_bytes(state: TrainState, n_iters: int, keep_every: int) -> int:
    """Returns the size of a run's checkpoints: the permanent ones, the newest, and one that is being written.

    Args:
        state: the shapes of the state.
    """
    return state_bytes(state) * (n_iters // keep_every + 2)


def state_bytes(state: TrainState) -> int:
    """Returns the size of a state in bytes, given the state or its shapes."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
