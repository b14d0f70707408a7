"""Data parallelism: one global batch, sharded over every device of every host.

The maths sees whole batches and no axis names: `jax.jit` over arrays with these shardings inserts the reductions, and
random numbers do not depend on the number of devices.
"""

import contextlib
import hashlib
import math
import os
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from infra import stop
from infra.rendezvous import meet
from infra.waiting import leave, waiting, within

Tree = TypeVar("Tree")
Decision = TypeVar("Decision", bool, int)

JOIN_SECONDS = 300.0
"""Seconds that processes wait for each other at the start."""

LEAVE_SECONDS = 10.0
"""Seconds that a failed process waits for the others to fail, too."""

OTHERS = "all processes of the run"


def device_mesh() -> Mesh:
    """All devices of all hosts along one axis, "data". Devices of a host are adjacent, as in `local_rows`."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    """Copies an array to every device."""
    return NamedSharding(mesh, PartitionSpec())


def along_batch(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Shards the given axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "data"))


def along_largest_axis(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Shards the largest axis that the number of devices divides; without such an axis, replicates the array."""
    divisible = [axis for axis, length in enumerate(shape) if length and length % mesh.size == 0]
    return along_batch(mesh, max(divisible, key=lambda axis: shape[axis])) if divisible else replicated(mesh)


def global_array(mesh: Mesh, local: np.ndarray, axis: int = 0) -> jax.Array:
    """Makes a global array from each host's own rows along `axis`."""
    return jax.make_array_from_process_local_data(along_batch(mesh, axis), local)


def whole(tree: Tree) -> Tree:
    """Returns the arrays with a full copy on each device, also if they are divided among the devices."""

    def replicate(array: jax.Array) -> jax.Array:
        if not isinstance(array.sharding, NamedSharding):
            return array
        return jax.device_put(array, NamedSharding(array.sharding.mesh, PartitionSpec()))

    return jax.tree.map(replicate, tree)


def fetch(tree: Tree) -> Tree:
    """Returns the global arrays as NumPy arrays, on every host."""
    if jax.process_count() > 1:
        with waiting(f"{OTHERS} to send their part of an array"):
            return multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)


def join_processes(
    coordinator: str, num_processes: int | None, process_id: int | None, seconds: float = JOIN_SECONDS
) -> None:
    """Joins this process with others into one run. It must be called before anything else asks for devices.

    Args:
        coordinator: address:port of the first process, or "auto" if the cluster provides it with both numbers (SLURM,
            Open MPI, Kubernetes, TPU pods).
        num_processes, process_id: the number of processes, and the number of this one, from 0.
        seconds: how long to wait for the other processes. With "auto", the process ends with one line after that.

    Raises:
        ValueError: if an argument is missing or the other processes do not connect. With an address, the message names
            the processes that are missing.
    """
    given = coordinator != "auto"
    if given and not coordinator.rpartition(":")[2].isdigit():
        raise ValueError(
            f"--coordinator={coordinator} has no port; name address:port of the first process, as host0:1234"
        )
    if given and not 0 < int(coordinator.rpartition(":")[2]) < 2**16:
        raise ValueError(f"--coordinator={coordinator} has no port between 1 and 65535 after the colon")
    if not given:
        _check_slurm_devices()
    if given and (num_processes is None or process_id is None or not 0 <= process_id < num_processes):
        raise ValueError(
            f"--coordinator={coordinator} needs --num_processes and a --process_id below it, got {num_processes} and "
            f"{process_id}; under SLURM, Open MPI, Kubernetes or on a TPU pod, --coordinator=auto needs neither"
        )
    jax.config.update("jax_enable_preemption_service", False)  # This service would hide SIGTERM from infra/stop.py.
    try:
        if given and num_processes is not None and process_id is not None:
            with waiting(f"{num_processes} processes at {coordinator}", seconds + 60, notice=3.0):
                meet(coordinator, num_processes, process_id, seconds)
        with waiting(f"all processes of --coordinator={coordinator} to connect", seconds):
            # JAX's own limit comes later, because it ends the process with a stack trace.
            later = int(seconds) + 60
            address = coordinator if given else None
            jax.distributed.initialize(
                address,
                num_processes,
                process_id,
                initialization_timeout=later,
                cluster_detection_method="deactivate" if given and _alone_on_node() else None,
            )
            # Devices wait for each other for only 30 s, so they must connect before any process compiles.
            multihost_utils.sync_global_devices("joined")
    except (RuntimeError, ValueError, OSError) as error:
        if not given and "coordinator_address should be defined" in str(error):  # what JAX says without a cluster
            raise ValueError(
                "--coordinator=auto: no cluster was found (SLURM, Open MPI, Kubernetes or a TPU pod); for one process, "
                "leave the flag out, else use --coordinator=HOST:PORT with --num_processes and --process_id"
            ) from error
        raise ValueError(f"--coordinator={coordinator}: cannot connect to the other processes: {error}") from error


def _alone_on_node() -> bool:
    """Returns whether the process uses all GPUs of its machine: without SLURM, or if SLURM runs one task per node.

    Under SLURM, JAX would otherwise take one GPU for each task, even if there is one task with eight GPUs.
    """
    tasks, nodes = (os.environ.get(name, "") for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_NODES"))
    return not (tasks.isdigit() and nodes.isdigit() and int(tasks) > max(1, int(nodes)))


def leave_processes(code: int) -> int:
    """Returns the exit code of a failure, once the other processes of the run have failed, too.

    If only this process has failed, the others may wait for it. Then it ends at once, and they notice that.
    """
    if jax.distributed.is_initialized():
        with contextlib.suppress(TimeoutError, RuntimeError, KeyboardInterrupt):
            within(LEAVE_SECONDS, "the end of the other processes", jax.distributed.shutdown)
    return leave(code)


def _check_slurm_devices() -> None:
    """Raises ValueError if SLURM gives a task more GPUs than there are tasks on a node: JAX would use only one each."""
    names = ("SLURM_NTASKS", "SLURM_STEP_NUM_NODES", "CUDA_VISIBLE_DEVICES")
    tasks, nodes, visible = (os.environ.get(name, "") for name in names)
    if not tasks.isdigit() or not nodes.isdigit() or not visible:
        return
    on_node, gpus = math.ceil(int(tasks) / max(1, int(nodes))), len(visible.split(","))
    if gpus > on_node:
        raise ValueError(
            f"this SLURM task has {gpus} GPUs, but with --coordinator=auto each task uses one, and there are {on_node} "
            f"tasks on a node: start {gpus} tasks on each node (srun --ntasks-per-node={gpus}), or leave out "
            "--coordinator if there is one task only, which then uses all its GPUs. For several nodes with one task "
            "each, use --coordinator=HOST:PORT"
        )


def check_devices() -> None:
    """Checks that JAX finds devices of the platform in JAX_PLATFORMS.

    Raises:
        ValueError: if there are none. The message says what to do.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError if the plugin is not installed
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise ValueError(
            f"JAX_PLATFORMS={platforms}, but there is no such device, or JAX is installed without support for it: "
            f"unset JAX_PLATFORMS, or install requirements-gpu.txt on a machine with an NVIDIA driver"
        ) from error


def any_host(value: bool) -> bool:
    """Whether the value is true on any host. All hosts must call this together."""
    if jax.process_count() == 1:
        return value
    with waiting(f"{OTHERS} to agree"):
        return bool(np.any(multihost_utils.process_allgather(np.asarray(value))))


def stop_requested(may_wait: bool = True) -> bool:
    """Whether the process of any host was asked to stop. All hosts get the same answer and must call this together.

    Args:
        may_wait: whether hosts may wait for each other, which they must do to agree. If not, the answer with several
            hosts is no.
    """
    if jax.process_count() > 1:
        if not may_wait:
            return False
        if any_host(stop.requested()):
            stop.request()
    return stop.requested()


def check_stop() -> None:
    """Raises KeyboardInterrupt if any host was asked to stop. All hosts must call this together."""
    if stop_requested():
        raise KeyboardInterrupt


def agree(value: Decision) -> Decision:
    """The first host's value, for decisions that all hosts must make alike. All hosts must call this together."""
    if jax.process_count() == 1:
        return value
    with waiting("the first process to decide"):
        return type(value)(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def place(tree: Tree, shardings: Any) -> Tree:
    """Places arrays that every host has on the devices of all hosts.

    Args:
        shardings: of each array, as a tree of the same form, or one for all.
    """
    if jax.process_count() > 1:
        # If each host has one device, JAX cannot give out the parts of an array that it placed from a single device.
        tree = jax.tree.map(lambda a: np.array(a) if getattr(a, "is_fully_addressable", False) else a, tree)
    return jax.device_put(tree, shardings)


def require_same(text: str, what: str) -> None:
    """Checks that all hosts have the same text. All hosts must call this together.

    Args:
        what: the subject of the error message.

    Raises:
        ValueError: on every host, if the texts differ.
    """
    if jax.process_count() == 1:
        return
    with waiting(f"{OTHERS} to compare {what}"):
        digests = multihost_utils.process_allgather(np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8))
    if np.any(digests != digests[0]):
        raise ValueError(f"{what} differ between hosts; on host {jax.process_index()} they are {text}")


def local_rows(batch_size: int) -> slice:
    """The rows of a global batch that this host supplies."""
    rows = batch_size // jax.process_count()
    return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)


def pad_rows(batch_size: int, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Pads the last, shorter batch to `batch_size` rows with copies of its first row."""
    return tuple(np.concatenate([a, np.repeat(a[:1], batch_size - len(a), axis=0)]) for a in arrays)


def divisible(batch_size: int, field: str, parts: int = 1, devices: int | None = None) -> None:
    """Checks that a global batch splits evenly into `parts`, and each part over all devices.

    Args:
        field: the name of the batch size in the configuration.
        devices: the number of devices; None: all devices of all hosts.

    Raises:
        ValueError: if it does not. The message names the nearest sizes that do.
    """
    devices = devices or jax.device_count()
    unit = devices * parts
    if batch_size > 0 and batch_size % unit == 0:
        return
    below, above = unit * max(1, batch_size // unit), unit * max(1, math.ceil(batch_size / unit))
    nearest = f"{below}" if below == above else f"{below} or {above}"
    split = f"{devices} devices" + (f" x {parts} parts" if parts > 1 else "")
    raise ValueError(f"{field} is {batch_size}, which is not divisible by {split}; use {nearest}")
