"""Connects the processes of a run before JAX does, to find out which ones are missing.

JAX ends a process with a stack trace if another one does not connect, and does not say which one. So the processes
connect here first, at the same address. Each process sends its number to the first one. The first one then tells all
of them that the run is complete, or which processes are missing.
"""

import contextlib
import json
import socket
import time
from collections.abc import Iterable
from typing import Any

from infra import stop

_POLL = 0.2


def meet(address: str, num_processes: int, process_id: int, seconds: float) -> None:
    """Waits until all processes have connected.

    Args:
        address: host:port of the first process.
        seconds: how long to wait.

    Raises:
        KeyboardInterrupt: after a request to stop this process.
        OSError: if the port is not free, or processes are missing. The message names them.
        ValueError: if two processes have the same number, or disagree about how many there are.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    if process_id == 0:
        _receive(int(port), num_processes, deadline, seconds)
    else:
        _report(host.strip("[]"), int(port), num_processes, process_id, deadline, seconds)


def _receive(port: int, num_processes: int, deadline: float, seconds: float) -> None:
    """Runs in the first process: collects the numbers of the others, and answers them."""
    others: dict[int, socket.socket] = {}
    problem: OSError | ValueError | None = None
    with contextlib.ExitStack() as connections:
        server = connections.enter_context(_server(port))
        server.settimeout(_POLL)
        while problem is None and len(others) < num_processes - 1:
            stop.check()
            if time.monotonic() > deadline:
                missing = sorted(set(range(1, num_processes)) - others.keys())
                problem = TimeoutError(f"{_numbered(missing)} of {num_processes} did not connect within {seconds:g} s")
                break
            with contextlib.suppress(TimeoutError):
                connection = connections.enter_context(server.accept()[0])
                problem = _introduce(connection, num_processes, others)
        for connection in others.values():
            with contextlib.suppress(OSError):
                _send(connection, {"problem": "" if problem is None else str(problem)})
    if problem is not None:
        raise problem


def _server(port: int) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=1024
        )
    except OSError as error:
        raise OSError(f"cannot listen on port {port}: {error.strerror}; name a free port") from error


def _introduce(connection: socket.socket, total: int, others: dict[int, socket.socket]) -> ValueError | None:
    """Adds the process at the other end. Returns what is wrong with its number; ignores other programs."""
    said = _read(connection, time.monotonic() + 5)
    if not isinstance(said, dict) or "process" not in said:
        return None
    number, expected = said["process"], said.get("of")
    problem = None
    if expected != total:
        problem = ValueError(f"process {number} has --num_processes={expected}, but process 0 has {total}")
    elif number in others or number == 0:
        problem = ValueError(f"two processes have --process_id={number}; number them from 0 to {total - 1}")
    others[number if problem is None else -1] = connection
    return problem


def _report(host: str, port: int, num_processes: int, process_id: int, deadline: float, seconds: float) -> None:
    """Runs in the other processes: sends the number of the process to the first one, and waits for the answer."""
    reached = False
    while time.monotonic() < deadline:
        stop.check()
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                reached = True
                _send(connection, {"process": process_id, "of": num_processes})
                answer = _read(connection, deadline + 5)
        except socket.gaierror as error:
            raise OSError(f"there is no host {host}: {error.strerror}") from error
        except OSError:
            time.sleep(_POLL)
            continue
        if isinstance(answer, dict) and "problem" in answer:
            if answer["problem"]:
                raise OSError(str(answer["problem"]))
            return
        time.sleep(_POLL)
    problem = "stopped answering" if reached else "did not answer"
    raise TimeoutError(f"process 0 at {host}:{port} {problem} within {seconds:g} s")


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _read(connection: socket.socket, deadline: float) -> Any:
    """Reads one message. Returns None if the other end closes the connection, sends other data, or is too late."""
    connection.settimeout(_POLL)
    received = b""
    while time.monotonic() < deadline and len(received) < 4096:
        stop.check()
        try:
            part = connection.recv(4096)
        except TimeoutError:
            continue
        except OSError:
            return None
        received += part
        if not part or received.endswith(b"\n"):
            break
    try:
        return json.loads(received)
    except ValueError:
        return None


def _numbered(processes: Iterable[int]) -> str:
    names = [str(process) for process in processes]
    return f"process {names[0]}" if len(names) == 1 else f"processes {', '.join(names)}"
