"""Devices and processes that are not what the user thinks."""

import jax
import pytest
from jax._src.distributed import State

from infra import parallel


@pytest.mark.parametrize("address", ["localhost", "host:", "host:port"])
def test_a_coordinator_without_a_port_is_one_line(address):
    with pytest.raises(ValueError, match=f"--coordinator={address} has no port; name "):
        parallel.join_processes(address, 1, 0)


@pytest.mark.parametrize(
    ("tasks", "nodes", "visible", "refused"),
    [
        ("1", "1", "0,1,2,3", "has 4 GPUs, .* there are 1 tasks on a node: start 4 tasks"),
        ("2", "2", "0,1", "has 2 GPUs"),
        ("4", "2", "0,1,2,3", "start 4 tasks on each node"),
        ("4", "1", "0,1,2,3", ""),
        ("8", "2", "0", ""),
        ("1", "1", "", ""),
    ],
)
def test_gpus_that_no_task_would_use_are_named(tasks, nodes, visible, refused, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", tasks)
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", nodes)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if refused:
        with pytest.raises(ValueError, match=refused):
            parallel.join_processes("auto", None, None)
    else:
        parallel._check_slurm_devices()


@pytest.mark.parametrize("address", ["localhost:0", "localhost:65536", "localhost:10003796"])
def test_a_port_that_cannot_be_is_one_line(address):
    with pytest.raises(ValueError, match=f"--coordinator={address} has no port between 1 and 65535"):
        parallel.join_processes(address, 2, 0)


def test_auto_without_a_cluster_is_one_line(monkeypatch):
    def initialize(*arguments, **options):
        State().initialize(*arguments, **options | {"cluster_detection_method": "deactivate"})

    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match=r"no cluster was found .* for one process, leave the flag out"):
        parallel.join_processes("auto", None, None)


@pytest.mark.parametrize(
    ("tasks", "nodes", "detected"), [("2", "2", False), ("8", "2", True), ("1", "1", False), ("", "", False)]
)
def test_one_task_on_a_node_uses_all_its_gpus(tasks, nodes, detected, monkeypatch):
    """If JAX detects SLURM, it takes one GPU for each task. Several tasks on a node need that."""
    monkeypatch.setenv("SLURM_NTASKS", tasks)
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", nodes)
    given = {}
    monkeypatch.setattr(parallel, "meet", lambda *_: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **options: given.update(options))
    monkeypatch.setattr(parallel.multihost_utils, "sync_global_devices", lambda _: None)
    parallel.join_processes("localhost:1234", 2, 0)
    assert (given["cluster_detection_method"] is None) == detected


@pytest.mark.parametrize("error", [RuntimeError("no backend"), AssertionError()])
def test_a_platform_that_is_not_there_is_one_line(error, monkeypatch):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(ValueError, match=r"JAX_PLATFORMS=cuda, but there is no such device.*unset JAX_PLATFORMS"):
        parallel.check_devices()
