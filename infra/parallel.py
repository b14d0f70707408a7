"""Data parallelism: one global batch, sharded over every device of every host.

The maths sees whole batches and no axis names: `jax.jit` over arrays with these shardings inserts the reductions, and
random numbers do not depend on the number of devices.
"""

import hashlib
import math
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")


def device_mesh() -> Mesh:
    """All devices of all hosts along one axis, "data"; each host's together, in the order of `local_rows`."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def along_batch(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Shards the given axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "data"))


def global_array(mesh: Mesh, local: np.ndarray, axis: int = 0) -> jax.Array:
    """One global array from each host's rows of it along `axis`."""
    return jax.make_array_from_process_local_data(along_batch(mesh, axis), local)


def fetch(tree: Tree) -> Tree:
    """The whole arrays as NumPy's, on every host."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)


def join_processes(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    """Makes this process one of several that run as one; before anything else asks for devices.

    Args:
        coordinator: address:port of the first process, or "auto" where a cluster says it and the numbers: SLURM, Open
            MPI, Kubernetes, TPU pods.
        num_processes, process_id: how many there are, and which of them this is, from 0.

    Raises:
        ValueError: if something is missing, or the others do not come.
    """
    given = coordinator != "auto"
    if given and (num_processes is None or process_id is None or not 0 <= process_id < num_processes):
        raise ValueError(
            f"--coordinator={coordinator} needs --num_processes and --process_id below it, got {num_processes} and "
            f"{process_id}; or --coordinator=auto, under SLURM, Open MPI, Kubernetes or on a TPU pod"
        )
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM, which asks us to stop
    try:
        jax.distributed.initialize(coordinator if given else None, num_processes, process_id)
        # Their devices connect now, while nobody compiles: they wait 30 s for each other, not longer.
        multihost_utils.sync_global_devices("joined")
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"--coordinator={coordinator}: the processes did not find each other: {error}") from error


def any_host(value: bool) -> bool:
    """Whether it is true on any host, on every host."""
    return bool(np.any(multihost_utils.process_allgather(np.asarray(value)))) if jax.process_count() > 1 else value


def agree(value: bool) -> bool:
    """The first host's value, on every host: for decisions that all must take alike."""
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value))) if jax.process_count() > 1 else value


def require_same(text: str, what: str) -> None:
    """Checks that all hosts have the same text; they call it together.

    Raises:
        ValueError: on every host, if they have not.
    """
    if jax.process_count() == 1:
        return
    digests = multihost_utils.process_allgather(np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8))
    if np.any(digests != digests[0]):
        raise ValueError(f"{what} are not the same on all hosts; on host {jax.process_index()} they are {text}")


def local_rows(batch_size: int) -> slice:
    """The rows of a global batch that this host supplies."""
    rows = batch_size // jax.process_count()
    return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)


def pad_rows(batch_size: int, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Fills the last, shorter batch up to `batch_size` rows with copies of its first row."""
    return tuple(np.concatenate([a, np.repeat(a[:1], batch_size - len(a), axis=0)]) for a in arrays)


def divisible(batch_size: int, field: str, parts: int = 1) -> None:
    """Checks that a global batch splits evenly over `parts` and, within each, over the devices.

    Raises:
        ValueError: if it does not; it names the nearest sizes that do.
    """
    unit = jax.device_count() * parts
    if batch_size > 0 and batch_size % unit == 0:
        return
    below, above = unit * max(1, batch_size // unit), unit * max(1, math.ceil(batch_size / unit))
    nearest = f"{below}" if below == above else f"{below} or {above}"
    split = f"{jax.device_count()} devices" + (f" x {parts} parts" if parts > 1 else "")
    raise ValueError(f"{field} is {batch_size}; {split} do not divide it: use {nearest}")
