"""Compiles programs for a GPU on a machine without one, to find out how much memory they need.

A compilation for a GPU takes minutes, but XLA assigns the buffers before it generates code, and can write the
assignment to a folder. So each compilation runs in a separate process, which is ended as soon as the assignment is
written.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax

from infra import stop
from infra.cost import GIGA, error_text, memory_gb

COMPILER_OPTIONS: dict[str, bool | str] = {
    # On a GPU, XLA times several kernels for each matrix product. Without a GPU, it takes its Triton kernels, and fails
    # for the products of the FIR filters in models/resample.py, because it finds no tiles for them.
    "xla_gpu_enable_triton_gemm": False,
}

ASSIGNMENT = "*-buffer-assignment.txt"
"""The name of the file with the buffers."""

QUIET_SECONDS = 2.0
"""Seconds without a write after which the file counts as complete. XLA may create it seconds before it writes, but then
writes without a pause. No other file shows that it is complete: XLA of jax 0.11 writes several at the same time.
"""

ENDED = "failed: the compiler ended, perhaps because the machine was out of memory"
"""The `error` if the other process ends without an answer. It does not mean that the program is too large."""

Lower = Callable[..., tuple[dict[str, Any], jax.stages.Lowered]]
"""A function of a module, called in the other process. Returns costs that are known already, and the program."""


def buffer_gb(assignment: str) -> dict[str, float]:
    """Returns `temporary_gb` and `total_gb` from XLA's text about buffers: the numbers of `memory_analysis`.

    The total includes arguments and results. A result in the memory of a donated argument counts once.

    Raises:
        ValueError: if the text names no buffer for temporary values.
    """
    temporary = total = None
    # XLA of jax 0.11 writes a page after the size.
    for size, kind in re.findall(r"^allocation \d+: size (\d+), (?:page \d+, )?(.*)", assignment, re.MULTILINE):
        if kind.startswith("preallocated-temp"):
            temporary = (temporary or 0) + int(size)
        elif "parameter" in kind or "maybe-live-out" in kind:
            total = (total or 0) + int(size)
    if temporary is None or total is None:
        raise ValueError("cannot read the buffers that XLA wrote; its format has changed")
    return {"temporary_gb": temporary / GIGA, "total_gb": (temporary + total) / GIGA}


def predicted_cost(lower: Lower, *arguments: Any) -> dict[str, Any]:
    """Returns the costs from `lower` and the memory of the program, as `infra.cost.program_cost` names them.

    `compile_seconds` is the time until the memory was known. A program that does not compile has an `error`.

    Args:
        arguments: of `lower`; values that pickle can copy.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="buffers-") as folder, _child(folder, lower, arguments) as receive:
        costs = _next(receive)
        if costs is None or "error" in costs:
            return costs or {"error": ENDED}
        while (memory := _assigned(Path(folder))) is None:
            stop.check()
            if receive.poll(0.2):
                memory = _next(receive) or {"error": ENDED}
                break
    return costs | memory | {"compile_seconds": time.perf_counter() - start - costs["trace_seconds"]}


def _assigned(folder: Path) -> dict[str, float] | None:
    """Returns the memory, or None if it is not known yet."""
    for path in folder.glob(ASSIGNMENT):
        state = path.stat()
        if state.st_size and time.time() - state.st_mtime > QUIET_SECONDS:
            return buffer_gb(path.read_text())
    return None


def _next(receive: Connection) -> dict[str, Any] | None:
    """Returns the next costs from the other process; None if it has ended."""
    while not receive.poll(0.2):
        stop.check()
    try:
        return receive.recv()
    except EOFError:
        stop.check()  # A request to stop may also have ended the other process.
        return None


@contextlib.contextmanager
def _child(folder: str, lower: Lower, arguments: tuple[Any, ...]) -> Iterator[Connection]:
    """A context with a process that runs `_compile`, and the pipe from it. The process is ended with the context."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_compile_for_parent, args=(send, folder, lower, arguments), daemon=True)
    # The process must not use GPUs of this machine, and must not print XLA's warnings about slow compilations.
    settings = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        process.start()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    send.close()  # The pipe must end with the process, not with this copy of its end.
    try:
        yield receive
    finally:
        process.kill()
        process.join()
        receive.close()


def _compile_for_parent(*arguments: Any) -> None:
    """Runs `_compile` in the other process, which leaves requests to stop to its parent."""
    for number in stop.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _compile(*arguments)


def _compile(send: Connection, folder: str, lower: Lower, arguments: tuple[Any, ...]) -> None:
    """Sends the costs from `lower`, and then the costs of the compiled program, unless the process is ended before."""
    try:
        costs, lowered = lower(*arguments)
        send.send(costs)
        compiled = lowered.compile(compiler_options=COMPILER_OPTIONS | {"xla_dump_to": folder})
        send.send(memory_gb(compiled))
    except MemoryError:  # of this machine, not of the GPU
        send.send({"error": ENDED})
    except (ValueError, RuntimeError) as error:
        send.send({"error": error_text(error)})
