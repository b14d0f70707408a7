"""Data parallelism: one global batch, sharded over every device of every host.

The maths sees whole batches and no axis names: `jax.jit` over arrays with these shardings inserts the reductions, and
random numbers do not depend on the number of devices.
"""

import hashlib
import math
import os
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")


def device_mesh() -> Mesh:
    """All devices of all hosts along one axis, "data". Devices of a host are adjacent, as in `local_rows`."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def along_batch(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Shards the given axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "data"))


def global_array(mesh: Mesh, local: np.ndarray, axis: int = 0) -> jax.Array:
    """A global array, given each host's own rows along `axis`."""
    return jax.make_array_from_process_local_data(along_batch(mesh, axis), local)


def fetch(tree: Tree) -> Tree:
    """The global arrays as NumPy arrays, on every host."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)


def join_processes(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    """Joins this process with others into one run. It must be called before anything else asks for devices.

    Args:
        coordinator: address:port of the first process, or "auto" if the cluster provides it with both numbers (SLURM,
            Open MPI, Kubernetes, TPU pods).
        num_processes, process_id: the number of processes, and the number of this one, from 0.

    Raises:
        ValueError: if an argument is missing or the other processes do not connect.
    """
    given = coordinator != "auto"
    if given and not coordinator.rpartition(":")[2].isdigit():
        raise ValueError(
            f"--coordinator={coordinator} has no port; name address:port of the first process, as host0:1234"
        )
    if not given:
        _check_slurm_devices()
    if given and (num_processes is None or process_id is None or not 0 <= process_id < num_processes):
        raise ValueError(
            f"--coordinator={coordinator} needs --num_processes and a --process_id below it, got {num_processes} and "
            f"{process_id}; under SLURM, Open MPI, Kubernetes or on a TPU pod, --coordinator=auto needs neither"
        )
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM, which is a request to stop
    try:
        jax.distributed.initialize(coordinator if given else None, num_processes, process_id)
        # The devices connect now, before any process compiles, because they wait for each other for 30 s only.
        multihost_utils.sync_global_devices("joined")
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"--coordinator={coordinator}: cannot connect to the other processes: {error}") from error


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
            "--coordinator if there is one task only, which then uses all its GPUs"
        )


def check_devices() -> None:
    """Looks for the devices that the environment asks for.

    Raises:
        ValueError: if there are none, with what to do.
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
    return bool(np.any(multihost_utils.process_allgather(np.asarray(value)))) if jax.process_count() > 1 else value


def agree(value: bool) -> bool:
    """The first host's value, for decisions that all hosts must make alike. All hosts must call this together."""
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value))) if jax.process_count() > 1 else value


def require_same(text: str, what: str) -> None:
    """Checks that all hosts have the same text. All hosts must call this together.

    Args:
        what: the subject of the error message.

    Raises:
        ValueError: on every host, if the texts differ.
    """
    if jax.process_count() == 1:
        return
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


def divisible(batch_size: int, field: str, parts: int = 1) -> None:
    """Checks that a global batch splits evenly into `parts`, and each part over all devices.

    Args:
        field: the name of the batch size in the configuration.

    Raises:
        ValueError: if it does not. The message names the nearest sizes that do.
    """
    unit = jax.device_count() * parts
    if batch_size > 0 and batch_size % unit == 0:
        return
    below, above = unit * max(1, batch_size // unit), unit * max(1, math.ceil(batch_size / unit))
    nearest = f"{below}" if below == above else f"{below} or {above}"
    split = f"{jax.device_count()} devices" + (f" x {parts} parts" if parts > 1 else "")
    raise ValueError(f"{field} is {batch_size}, which is not divisible by {split}; use {nearest}")
