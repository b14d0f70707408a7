"""The compilation cache, and measurements of the start of a run: its time, and the programs that JAX compiles."""

import functools
import math
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging

from infra.waiting import Background

COMPILATION_CACHE = Path(__file__).parent.parent / ".cache" / "jax"
"""The compilation cache of all runs. JAX names its files by program, version and kind of device or processor."""

FALSE = ("n", "no", "f", "false", "off", "0")
"""The values of an environment variable that JAX reads as False."""


CONVOLUTION_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
"""XLA's flag for what its CPU compiler leaves to the library YNN."""


def set_up_compiler(cache: bool = True) -> None:
    """Chooses fast convolutions and the compilation cache. Call it before JAX first looks at its devices."""
    use_fast_convolutions()
    use_compilation_cache(cache)


def use_fast_convolutions() -> None:
    """Sets XLA_FLAGS so that convolutions on CPUs are not left to the library YNN, unless the user has set this flag.

    With XLA's own routine, a training step takes 0.75 to 0.86 of the time; see docs/results/cost.md. YNN is slow for
    gradients of kernels, and in jaxlib 0.10 it computes convolutions with one thread. GPUs are not affected.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if CONVOLUTION_FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {CONVOLUTION_FLAG}=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION".strip()


def use_compilation_cache(use: bool = True) -> None:
    """Keeps compiled programs in `COMPILATION_CACHE`, or in the folder that JAX_COMPILATION_CACHE_DIR names, or not.

    JAX_ENABLE_COMPILATION_CACHE=false turns the cache off. A folder that cannot be written is only read.
    """
    use = use and os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "").lower() not in FALSE
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(COMPILATION_CACHE))
    if use and folder and "://" not in folder and (problem := _unwritable(Path(folder))):
        logging.warning(
            "Cannot write the compilation cache: %s. Programs that it lacks are compiled again in each run. Set "
            "JAX_COMPILATION_CACHE_DIR to a folder that can be written",
            problem,
        )
        use = Path(folder).is_dir()
        jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)  # JAX would warn of each program.
    jax.config.update("jax_enable_compilation_cache", use)
    jax.config.update("jax_compilation_cache_dir", folder)


def _unwritable(folder: Path) -> OSError | None:
    """Creates a folder, unless it exists, and returns the error if no file can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error


def process_start() -> float:
    """Returns when this process started, by the clock `time.monotonic`; now, if the system does not record it."""
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        after_boot = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return time.monotonic()
    return time.monotonic() - max(uptime - after_boot, 0.0)


class EarlyProgram:
    """The program of a jitted function, which a thread compiles while the caller prepares the arguments.

    The first call waits for the program, and raises the exception of a compilation that failed.
    """

    def __init__(self, function: jax.stages.Wrapped, *shapes: Any):
        """Traces the function in the thread of the caller, and starts to compile it or to load it from the cache.

        Only one thread can run Python code at a time, so tracing in another thread would save no time.

        Args:
            shapes: the shapes, dtypes and shardings of the arguments. All calls must have arguments like these.
        """
        self._compiled = Background("compilation", function.lower(*shapes).compile)

    def __call__(self, *arguments: Any) -> Any:
        return self._compiled.result()(*arguments)


class Programs(NamedTuple):
    """Counts of the programs that JAX has prepared since `count_programs` was first called in this process.

    The seconds of all threads are added up. The programs of `EarlyProgram` are compiled while other work is done.
    """

    prepared: int
    """Programs compiled or loaded from the persistent compilation cache."""
    loaded: int
    """Programs among these that were loaded from the cache."""
    trace_seconds: float
    """Time to trace Python code and to lower it, for these programs."""
    prepare_seconds: float
    """Time to compile or load them."""

    def since(self, before: "Programs") -> "Programs":
        """The difference of the counts and times."""
        return Programs(
            prepared=self.prepared - before.prepared,
            loaded=self.loaded - before.loaded,
            trace_seconds=self.trace_seconds - before.trace_seconds,
            prepare_seconds=self.prepare_seconds - before.prepare_seconds,
        )


def count_programs() -> Programs:
    """Returns the programs that were prepared since the first call, which starts to count."""
    return _counter().programs


class _Counter:
    """Listens to the events that JAX reports."""

    def __init__(self) -> None:
        self.programs = Programs(0, 0, 0.0, 0.0)
        self._lock = threading.Lock()
        jax.monitoring.register_event_duration_secs_listener(self._took)
        jax.monitoring.register_event_listener(self._happened)

    def _took(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self._add(prepared=1, prepare_seconds=duration_secs)
        elif event in ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration"):
            self._add(trace_seconds=duration_secs)

    def _happened(self, event: str, **_: str | int) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            self._add(loaded=1)

    def _add(self, **amounts: float) -> None:
        """Adds amounts to the fields of the counts."""
        with self._lock:  # Programs are compiled in several threads.
            before = self.programs._asdict()
            self.programs = self.programs._replace(**{name: before[name] + amount for name, amount in amounts.items()})


@functools.cache
def _counter() -> _Counter:
    return _Counter()


class Startup:
    """Measures from the start of a run to its first training step."""

    def __init__(self, started: float | None = None):
        """Starts to count programs.

        Args:
            started: when the process started, as `time.monotonic` counts; None: count from now.
        """
        self.started = time.monotonic() if started is None else started
        self.processor_before = time.process_time() if started is None else 0.0
        self.before = count_programs()

    def first_step(self) -> dict[str, float]:
        """Logs and returns the seconds since the start, and what they were spent on. Call it after the first step."""
        seconds, programs = time.monotonic() - self.started, count_programs().since(self.before)
        processor = time.process_time() - self.processor_before
        logging.info(
            "First training step after %.1f s, %.1f s of processor time: %.1f s to trace, %.1f s for %d programs, "
            "%d of them from the compilation cache",
            seconds,
            processor,
            programs.trace_seconds,
            programs.prepare_seconds,
            programs.prepared,
            programs.loaded,
        )
        return {
            "first_step_seconds": round(seconds, 3),
            "processor_seconds": round(processor, 3),
            "trace_seconds": round(programs.trace_seconds, 3),
            "compile_seconds": round(programs.prepare_seconds, 3),
            "programs": programs.prepared,
            "programs_from_cache": programs.loaded,
        }
