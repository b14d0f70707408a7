"""--mode=cost: the cost of a training step, on the devices of this machine or on GPUs that it does not have."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from build import TRAIN_KEY, Run, build
from configs.default import Config
from configs.usage import record_reads
from datasets import LabelledBatch
from infra import parallel
from infra.ahead_of_time import ENDED, predicted_cost
from infra.console import text_table
from infra.cost import (
    HEADERS,
    NOT_COMPILED,
    OUT_OF_MEMORY,
    Case,
    Row,
    all_cases,
    cells,
    device_memory,
    error_text,
    fitting_text,
    peak_memory,
    program_cost,
    program_identity,
    step_seconds,
    traced_cost,
)
from infra.gpus import gpu_by_name, mesh_of
from infra.workdir import Workdir
from train_state import TrainState


def cost(config: Config, path: Path) -> None:
    """Measures the cost of a training step for each case in `cost`, prints a table, and writes it to the workdir.

    Each row is written as soon as it is known. Rows of the same program on the same devices are not measured again.
    The last lines name, for each order, the largest batch that fits `cost.memory_gb`. With `cost.device`, the programs
    are compiled for that GPU, but not run.

    Raises:
        ValueError, OSError: for bad input, before anything is measured or written.
        KeyboardInterrupt: after a request to stop. The same call resumes with the case that it was measuring.
    """
    fields = config.cost
    gpu = gpu_by_name(fields.device) if fields.device else None
    mesh = mesh_of(gpu, fields.num_devices) if gpu else None
    sizes = fields.batch_sizes or (config.training.batch_size,)
    _ = build(config, mesh, for_training=False)  # Raises for a field that is wrong in all cases.
    cases = all_cases(fields.orders, sizes, fields.memory)
    runs = {case: _built(case, config, mesh) for case in cases if _has_effect(case, config, mesh)}
    if not runs:
        raise ValueError(f"cost.memory is {tuple(fields.memory)}, but training reads none of these fields; add 'none'")
    workdir, rows = Workdir(path), []
    known = {json.dumps(row["program"]): row for row in workdir.read_costs()}
    workdir.prepare()
    # All cases start from the same state, so it is computed once. A copy on the host survives donation by the steps.
    state = functools.cache(lambda: jax.device_get(next(iter(runs.values())).fresh_state()))
    for case, run in runs.items():
        parallel.check_stop()
        program = program_identity(run.config, run.mesh, 0 if gpu else fields.measure_steps)
        row = known.get(json.dumps(program))
        if row is None or not _is_final(row):
            logging.info("Measuring order %d, batch size %d, memory setting %s", *case)
            measured = cost_without_device(run) if gpu else case_cost(run, state, fields.measure_steps)
            row = case._asdict() | {"program": program} | measured
            if row.get("error") != ENDED:
                known[json.dumps(program)] = row
            if jax.process_index() == 0:
                workdir.write_costs(list(known.values()))
        rows.append(row | case._asdict())  # A known row of the same program may have the name of another setting.
        logging.info("%s", ", ".join(f"{name} {cell}" for name, cell in zip(HEADERS, cells(rows[-1]), strict=True)))
    if jax.process_index() == 0:
        print(text_table(HEADERS, [cells(row) for row in rows]))
        limit = fields.memory_gb or (gpu.usable_gb if gpu else device_memory())
        for order in fields.orders:
            print(fitting_text(order, rows, limit))
        if gpu:
            print("Leave memory free: on an H200, programs needed up to 4 % more than predicted (docs/results/cost.md)")


def _built(case: Case, config: Config, mesh: Mesh | None) -> Run:
    """Builds the run of a case. An error names the case, whose fields the user has not set."""
    changed = case.applied_to(config)
    try:
        return build(changed, mesh)
    except ValueError as error:
        raise ValueError(
            f"cost.orders, cost.batch_sizes and cost.memory ask for order {case.order}, batch size {case.batch_size} "
            f"and memory setting {case.memory}, which cannot be built: {error}"
        ) from error


def _has_effect(case: Case, config: Config, mesh: Mesh | None) -> bool:
    """Returns whether training reads all fields of the memory setting. If not, the log names one."""
    if not case.memory_fields():
        return True
    fresh: Config = ConfigDict(config.to_dict())
    recorder = record_reads(fresh)
    _ = _built(case, fresh, mesh).trainer
    unread = sorted(case.memory_fields() - recorder.read)
    if unread:
        logging.info("Leaving out memory setting %s for order %d: %s has no effect", case.memory, case.order, unread[0])
    return not unread


def _is_final(row: Row) -> bool:
    """Returns whether a stored row need not be measured again: other errors pass, and the memory may be raised."""
    too_large = row.get("error") == OUT_OF_MEMORY and row.get("total_gb", 0.0) > device_memory()
    return "error" not in row or too_large


def case_cost(run: Run, state: Callable[[], TrainState], measure_steps: int, limit: float = math.inf) -> dict[str, Any]:
    """Measures the cost of a training step of this run on random data, with `error` if it fails or does not fit.

    Args:
        state: returns the state to start from.
        measure_steps: compiled calls that are timed; with 0, the program is only compiled.
        limit: seconds that the compilation may take; see `program_cost`.
    """
    steps, size = run.config.training.n_jitted_steps, run.config.training.batch_size
    state_shapes, batch_shapes, _ = run.step_shapes(steps)
    batches, key, cost = random_batches(run, batch_shapes), run.key(TRAIN_KEY), {}
    try:
        cost, train_steps = program_cost(run.train_steps(), (state_shapes, batches, key), steps, limit)
        if not math.isinf(limit) and parallel.any_host(train_steps is None):
            return cost | {"error": NOT_COMPILED}
        if measure_steps and cost["total_gb"] > device_memory():
            return cost | {"error": OUT_OF_MEMORY}
        if measure_steps:
            before = peak_memory()
            first = jax.device_put(state(), run.state_shardings())
            cost |= step_seconds(lambda state: train_steps(state, batches, key), first, measure_steps, steps)
            # The device counts the peak since the process started, so a smaller program after a larger one has none.
            peak = peak_memory()
            own_peak = peak if peak is not None and peak > (before or 0) else None
            cost |= {"images_per_second": size / cost["step_seconds"], "peak_gb": own_peak}
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        return cost | {"error": error_text(error)}
    return cost


def random_batches(run: Run, shapes: Any) -> Any:
    """Returns random training batches of these shapes: points, or images of all grey levels, perhaps with classes."""
    random, data = np.random.default_rng(0), run.config.data

    def placed(shape: jax.ShapeDtypeStruct, number: int) -> jax.Array:
        steps, size, *rest = shape.shape
        local = (steps, size // jax.process_count(), *rest)
        is_real = np.issubdtype(shape.dtype, np.floating)
        values = random.standard_normal(local) if is_real else random.integers(number, size=local)
        return parallel.global_array(run.mesh, values.astype(shape.dtype), axis=1)

    if isinstance(shapes, LabelledBatch):
        return LabelledBatch(placed(shapes.images, data.levels), placed(shapes.labels, data.num_classes))
    return placed(shapes, data.levels)


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
