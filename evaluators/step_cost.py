"""The cost of a training step of a run, on the devices of this machine or on GPUs that it does not have."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from build import TRAIN_KEY, Run, build
from configs.default import Config
from infra import parallel
from infra.ahead_of_time import predicted_cost
from infra.cost import (
    NOT_COMPILED,
    OUT_OF_MEMORY,
    device_memory,
    error_text,
    peak_memory,
    program_cost,
    step_seconds,
    traced_cost,
)
from infra.gpus import gpu_by_name, mesh_of
from train_state import TrainState


def case_cost(run: Run, state: Callable[[], TrainState], measure_steps: int, limit: float = math.inf) -> dict[str, Any]:
    """Measures the cost of a training step of this run on random data, with `error` if it fails or does not fit.

    Args:
        state: returns the state to start from.
        measure_steps: compiled calls that are timed; with 0, the program is only compiled.
        limit: seconds that the compilation may take; see `program_cost`.
    """
    steps, size = run.config.training.n_jitted_steps, run.config.training.batch_size
    rows = (steps, size // jax.process_count(), *run.data_shape)
    random = np.random.default_rng(0)
    images = random.integers(run.config.data.levels, size=rows, dtype=np.uint8)
    local = images if run.density is None else random.standard_normal(rows, np.float32)
    batches, key, cost = parallel.global_array(run.mesh, local, axis=1), run.key(TRAIN_KEY), {}
    try:
        cost, train_steps = program_cost(run.train_steps(), (run.training_state(), batches, key), steps, limit)
        if not math.isinf(limit) and parallel.any_host(train_steps is None):
            return cost | {"error": NOT_COMPILED}
        if measure_steps and cost["total_gb"] > device_memory():
            return cost | {"error": OUT_OF_MEMORY}
        if measure_steps:
            first = jax.device_put(state(), run.state_shardings())
            cost |= step_seconds(lambda state: train_steps(state, batches, key)[0], first, measure_steps, steps)
            cost |= {"images_per_second": size / cost["step_seconds"], "peak_gb": peak_memory()}
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        return cost | {"error": error_text(error)}
    return cost


def cost_without_device(run: Run) -> dict[str, Any]:
    """Returns the cost of a training step on the GPUs that cost.device names."""
    _ = run.trainer  # The other process reads the fields of the trainer; here, they must count as read.
    return predicted_cost(_lowered, run.config.to_dict())


def traced_step(run: Run) -> tuple[dict[str, Any], jax.stages.Lowered]:
    """Traces the training steps of a run, without a compilation. Returns what `traced_cost` knows, and the program."""
    steps = run.config.training.n_jitted_steps
    cost, _, lowered = traced_cost(run.train_steps(), run.step_shapes(steps), steps, run.mesh.size)
    return cost, lowered


def _lowered(fields: dict[str, Any]) -> tuple[dict[str, Any], jax.stages.Lowered]:
    """Traces the training steps of the configuration with these fields, for the GPUs that cost.device names."""
    config: Config = ConfigDict(fields)
    return traced_step(build(config, mesh_of(gpu_by_name(config.cost.device), config.cost.num_devices)))
