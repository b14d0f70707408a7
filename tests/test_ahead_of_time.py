"""The memory of programs for a GPU that is not there. XLA's compiler for GPUs is not installed here."""

import multiprocessing
import os
import re

import jax
import jax.numpy as jnp
import pytest

from configs.toy.smoke import get_config
from evaluators import step_cost
from infra import ahead_of_time, gpus, parallel
from infra.ahead_of_time import buffer_gb, predicted_cost
from infra.cost import memory_gb


def lowered(size: int) -> jax.stages.Lowered:
    """A program with a donated argument, another argument, temporary values and a result."""

    def step(state, weight):
        return state + jnp.sum(jnp.sin(weight) @ weight), jnp.sum(weight, axis=0)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((size,), (size, size))]
    return jax.jit(step, donate_argnums=0).lower(*shapes)


def lower(size: int):
    return {"gflop": float(size), "trace_seconds": 0.0}, lowered(size)


def raise_memory_error():
    raise MemoryError


def lower_nothing(size: int):
    raise ValueError(f"size is {size}\nand more")


def test_another_process_finds_the_memory_of_the_compiled_program():
    cost = predicted_cost(lower, 300)
    assert cost["gflop"] == 300
    assert cost["compile_seconds"] > 0
    expected = memory_gb(lowered(300).compile())
    assert expected["temporary_gb"] >= 300 * 4 / 1e9  # jax 0.11 does not store sin(weight)
    assert {name: cost[name] for name in expected} == expected


def test_buffers_are_read_when_xla_has_written_all_of_them(tmp_path, monkeypatch):
    """XLA of jax 0.11 creates the file seconds before it writes. What it has just written may not be complete."""
    path = tmp_path / "module.gpu_after_optimizations-buffer-assignment.txt"
    assert ahead_of_time._assigned(tmp_path) is None
    path.touch()
    os.utime(path, (0, 0))
    assert ahead_of_time._assigned(tmp_path) is None
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")  # XLA writes nothing about a program from the cache
    with ahead_of_time._child(str(tmp_path / "dump"), lower, (300,)) as receive:
        memory = [receive.recv() for _ in range(2)][1]
    (written,) = (tmp_path / "dump").glob(ahead_of_time.ASSIGNMENT)
    path.write_text(written.read_text())
    assert ahead_of_time._assigned(tmp_path) is None
    os.utime(path, (0, 0))
    assert ahead_of_time._assigned(tmp_path) == memory


def test_an_error_in_the_other_process_is_a_row(tmp_path):
    receive, send = multiprocessing.Pipe(duplex=False)
    ahead_of_time._compile(send, str(tmp_path), lower_nothing, (3,))
    assert receive.recv() == {"error": "failed: size is 3"}


def test_a_process_that_ends_with_a_request_to_stop_is_not_a_row(stop_requested):
    """Signals often reach both processes, and the other one may end first."""
    receive, send = multiprocessing.Pipe(duplex=False)
    send.close()
    with pytest.raises(KeyboardInterrupt):
        ahead_of_time._next(receive)


def test_a_machine_without_memory_does_not_mean_that_the_gpu_has_too_little(tmp_path):
    receive, send = multiprocessing.Pipe(duplex=False)
    ahead_of_time._compile(send, str(tmp_path), raise_memory_error, ())
    assert receive.recv() == {"error": ahead_of_time.ENDED}


@pytest.mark.parametrize("page", ["", "page 0, "], ids=["jax 0.10", "jax 0.11"])
def test_buffers_of_arguments_and_results_count_once(page: str):
    text = """BufferAssignment:
allocation 0: size 4000, parameter 1, shape |f32[1000]| at ShapeIndex {}, maybe-live-out:
 value: <7 copy.2 @0> (size=4000,offset=0): f32[1000]{0}
allocation 1: size 500, parameter 0, shape |f32[125]| at ShapeIndex {}:
allocation 2: size 16, output shape is |(f32[1000], f32[4])|, maybe-live-out:
allocation 3: size 64, constant:
allocation 4: size 8, thread-local:
allocation 5: size 300000, preallocated-temp:
"""
    text = re.sub(r"(size \d+, )", rf"\1{page}", text)
    assert buffer_gb(text) == pytest.approx({"temporary_gb": 3e-4, "total_gb": 3.04516e-4})
    with pytest.raises(ValueError, match="format has changed"):
        buffer_gb("BufferAssignment:\nallocation 0: size 4000, parameter 1, shape |f32[1000]|:\n")


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(gpus, "PLUGINS", ("no_such_plugin",))
    config = get_config()
    config.cost.device = "h100"
    with pytest.raises(ValueError, match=r"needs JAX's packages for CUDA.*requirements-gpu\.txt"):
        step_cost.cost(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_compiler_is_told_what_the_table_says():
    a100 = gpus.gpu_by_name("a100")
    told = dict(line.strip().split(": ", 1) for line in a100.target().splitlines() if line.strip().count(":") == 1)
    assert told["core_count"] == "108"
    assert told["device_memory_size"] == str(a100.memory)
    assert told["shared_memory_per_block_optin"] == "166912"
    assert a100.usable_gb == pytest.approx(63.8, abs=0.1)
    assert all(gpu.memory > gpus.gpu_by_name("a100-40").memory - 1 for gpu in gpus.GPUS.values())


def test_rows_of_a_gpu_say_so_and_are_kept(monkeypatch, tmp_path, capsys):
    asked = []

    def predicted(lower, fields):
        asked.append(fields["training"]["score_matching_order"])
        if len(asked) == 1:
            return {"error": ahead_of_time.ENDED}
        return {"gflop": 2.0, "temporary_gb": 60.0, "total_gb": 65.0, "compile_seconds": 1.0}

    monkeypatch.setattr(step_cost, "predicted_cost", predicted)
    monkeypatch.setattr(step_cost, "mesh_of", lambda gpu, count: parallel.device_mesh())
    config = get_config()
    config.cost.device, config.cost.orders, config.cost.memory = "h100", (1, 3), ("none",)
    for _ in range(2):
        step_cost.cost(config, tmp_path)
    assert asked == [1, 3, 1]  # a row that the compiler gave no answer for is measured again
    assert "order 3: no batch without an error fits 63.7 GB" in capsys.readouterr().out
