"""The cost of a training step: arithmetic, memory, compile time and, if the devices exist, seconds.

A case is an order, a batch size and a memory setting. `--mode=cost` writes and prints one row for each case.
"""

import ast
import hashlib
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.sharding import Mesh

from configs.default import Config
from infra import stop
from infra.waiting import within

Row: TypeAlias = Mapping[str, Any]
"""The cost of one case, by the names that `program_cost` and `step_seconds` describe; `error` if it cannot run."""

UNCHANGED = "none"
"""The memory setting that leaves the configuration as it is."""

MEMORY_FIELDS = (
    "training.accumulation_steps",
    "training.high_order_fraction",
    "training.residual_first",
    "training.shard_state",
    "model.remat",
    "model.dtype",
)
"""Fields of the configuration that a memory setting may change. They change the cost of a step, but not its state."""

OUT_OF_MEMORY, NOT_COMPILED = "out of memory", "not compiled in time"
"""Values of `error` in a row."""

GIGA = 1e9


class Case(NamedTuple):
    """An order of score matching, a batch size, and a memory setting such as "training.accumulation_steps=2"."""

    order: int
    batch_size: int
    memory: str

    def changes(self) -> dict[str, Any]:
        """Returns the fields of the configuration that the case sets, under their dotted names.

        Raises:
            ValueError: if the memory setting is not "none" and not FIELD=VALUE, separated by spaces.
        """
        changes = {"training.score_matching_order": self.order, "training.batch_size": self.batch_size}
        for part in () if self.memory == UNCHANGED else self.memory.split():
            field, equals, value = part.partition("=")
            if not equals or field not in MEMORY_FIELDS:
                raise ValueError(
                    f"cost.memory has the setting {self.memory!r}; a setting is {UNCHANGED!r}, or FIELD=VALUE with "
                    f"spaces between several, for the fields {', '.join(MEMORY_FIELDS)}"
                )
            changes[field] = _literal(value)
        return changes

    def memory_fields(self) -> set[str]:
        """Returns the fields that the memory setting sets."""
        return set(self.changes()) & set(MEMORY_FIELDS)

    def applied_to(self, config: Config) -> Config:
        """A copy of the configuration with the fields that the case sets.

        Raises:
            ValueError: as for `changes`, or if a value has another type than its field.
        """
        changed = config.copy_and_resolve_references()
        try:
            changed.update_from_flattened_dict(self.changes())
        except TypeError as error:
            raise ValueError(f"cost.memory has the setting {self.memory!r}: {error}") from error
        return changed


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def all_cases(orders: Sequence[int], batch_sizes: Sequence[int], memory: Sequence[str]) -> list[Case]:
    """Returns the cases of every memory setting of every batch size of every order.

    Raises:
        ValueError: if one of the lists is empty, or has an entry twice.
    """
    for name, values in {"orders": orders, "batch_sizes": batch_sizes, "memory": memory}.items():
        if not values or len(set(values)) < len(values):
            raise ValueError(f"cost.{name} is {tuple(values)}; it must have at least one entry, and none twice")
    return [Case(order, size, setting) for order in orders for size in batch_sizes for setting in memory]


def program_identity(config: Config, mesh: Mesh, measure_steps: int) -> dict[str, Any]:
    """Everything that a row depends on, besides the code: configuration, devices, version and settings of JAX."""
    fields = json.loads(config.to_json_best_effort())
    relevant = json.dumps({part: fields[part] for part in ("model", "training", "data", "optim")}, sort_keys=True)
    settings = {  # Rows of older versions do not have them.
        "matmul_precision": jax.config.values["jax_default_matmul_precision"],
        "xla_flags": os.environ.get("XLA_FLAGS"),
        "processes": jax.process_count() if jax.process_count() > 1 else None,
    }
    return {
        "configuration": hashlib.sha256(relevant.encode()).hexdigest()[:16],
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "jax": jax.__version__,
        "measure_steps": measure_steps,
        **{name: value for name, value in settings.items() if value},
    }


def contraction_flop(jaxpr: Any, *, repeat_loops: bool = True) -> float:
    """Counts the floating-point operations, multiplications and additions, of convolutions and matrix products.

    The count includes operations on the zeros of padding and dilation, which a device also computes. XLA's own count
    includes the body of a loop only once, and omits library calls, such as the convolutions on GPUs. On CPUs the two
    counts agree within 3 %.

    Args:
        repeat_loops: count the body of a loop as often as it runs, instead of once.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        shapes = [variable.aval.shape for variable in (*equation.invars, *equation.outvars[:1])]
        name, params = equation.primitive.name, equation.params
        if name == "conv_general_dilated":
            features = shapes[1][params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * math.prod(shapes[-1]) * math.prod(shapes[1]) / features
        elif name == "dot_general":
            contracted = params["dimension_numbers"][0][0]
            total += 2.0 * math.prod(shapes[-1]) * math.prod(shapes[0][axis] for axis in contracted)
        repeats = params["length"] if name == "scan" and repeat_loops else 1
        inner = (contraction_flop(part, repeat_loops=repeat_loops) for part in _inner_programs(params))
        total += repeats * sum(inner)
    return total


def _inner_programs(params: Mapping[str, Any]) -> Iterator[Any]:
    """Yields the traced programs among the parameters of an operation: bodies of loops and of calls."""
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            program = getattr(part, "jaxpr", part)
            if hasattr(program, "eqns"):
                yield program


def peak_bytes(jaxpr: Any) -> int:
    """Estimates the memory of a traced program: arguments, and the results of operations from their first to last use.

    A compiler does not store the results of operations that it fuses, and may reorder operations. So this is
    mostly more than the compiled program needs.
    """
    last_use = {
        variable: number
        for number, equation in enumerate(jaxpr.eqns)
        for variable in equation.invars
        if not hasattr(variable, "val")  # Constants have a `val`, and are not counted.
    }
    given = {*jaxpr.invars, *jaxpr.constvars}
    kept = given | {variable for variable in jaxpr.outvars if not hasattr(variable, "val")}
    live = peak = sum(map(_bytes, given))
    for number, equation in enumerate(jaxpr.eqns):
        inside = [peak_bytes(part) for part in _inner_programs(equation.params)]
        arguments = sum(_bytes(variable) for variable in equation.invars)
        results = sum(_bytes(variable) for variable in equation.outvars)
        peak = max(peak, live + max([results, *(whole - arguments for whole in inside)]))
        live += results
        ended = {v for v in (*equation.invars, *equation.outvars) if not hasattr(v, "val") and v not in kept}
        live -= sum(_bytes(variable) for variable in ended if last_use.get(variable, number) == number)
    return peak


def _per_device(jaxpr: Any, devices: int) -> float:
    """Estimates the memory of one device. It holds all arguments, and its share of all other values.

    For small batches on several devices this is too low, because each device also holds the whole gradients.
    """
    arguments = sum(map(_bytes, jaxpr.invars))
    return arguments + (peak_bytes(jaxpr) - arguments) / devices


def _bytes(variable: Any) -> int:
    shape, dtype = getattr(variable.aval, "shape", ()), getattr(variable.aval, "dtype", None)
    return math.prod(shape) * getattr(dtype, "itemsize", 4)


def traced_cost(
    train_steps: Any, arguments: Sequence[Any], steps: int, devices: int
) -> tuple[dict[str, Any], Any, jax.stages.Lowered]:
    """Traces the training steps and returns what is known before the compilation, with the traced and lowered program.

    The cost of one step has these values:

    - `gflop`: operations of convolutions and matrix products, on all devices together.
    - `estimated_gb`: memory per device, by `peak_bytes`.
    - `trace_seconds`.

    Args:
        train_steps: the jitted function.
        arguments: arrays or their shapes.
        steps: the number of training steps of one call.
        devices: the number of devices that share the batch.
    """
    start = time.perf_counter()
    traced = train_steps.trace(*arguments)
    lowered = traced.lower()
    cost = {
        "gflop": contraction_flop(traced.jaxpr) / steps / GIGA,
        "estimated_gb": _per_device(traced.jaxpr.jaxpr, devices) / GIGA,
        "trace_seconds": time.perf_counter() - start,
    }
    return cost, traced, lowered


def program_cost(
    train_steps: Any, arguments: Sequence[Any], steps: int, limit: float = math.inf
) -> tuple[dict[str, Any], Any]:
    """Compiles the training steps and returns their cost for one step, with the compiled program.

    The cost has the values of `traced_cost`, and these:

    - `xla_gflop`, `gb_accessed`: counted by XLA for one device. None if the program has loops, because XLA
      counts their bodies once.
    - `temporary_gb`, `total_gb`: memory per device; the total includes arguments and results.
    - `compile_seconds`.

    If the compilation takes longer than the limit, the compiled program is None, and the cost has only the values that
    are known from the traced program.

    Args:
        train_steps, arguments, steps: as in `traced_cost`.
        limit: seconds that the compilation may take. If it takes longer, the process must end by `waiting.leave`.

    Raises:
        KeyboardInterrupt: after a request to stop, also while the program is compiled. The process must end in the
            same way.
    """
    known, traced, lowered = traced_cost(train_steps, arguments, steps, jax.device_count())
    start = time.perf_counter()
    try:
        compiled = within(limit, "the compilation", lowered.compile)
    except TimeoutError:
        return known, None
    end = time.perf_counter()
    flop = contraction_flop(traced.jaxpr)
    in_loops = flop > contraction_flop(traced.jaxpr, repeat_loops=False)
    counted = {} if in_loops else compiled.cost_analysis() or {}
    cost = {
        **known,
        "xla_gflop": _giga(counted.get("flops"), steps),
        "gb_accessed": _giga(counted.get("bytes accessed"), steps),
        **memory_gb(compiled),
        "compile_seconds": end - start,
    }
    return cost, compiled


def memory_gb(compiled: Any) -> dict[str, float]:
    """Returns `temporary_gb` and `total_gb` of a compiled program."""
    memory = compiled.memory_analysis()
    resident = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = memory.temp_size_in_bytes + resident + memory.generated_code_size_in_bytes
    return {"temporary_gb": memory.temp_size_in_bytes / GIGA, "total_gb": total / GIGA}


def _giga(value: float | None, steps: int) -> float | None:
    return None if value is None else value / steps / GIGA


def step_seconds(call: Callable[[Any], tuple[Any, Any]], state: Any, num_calls: int, steps: int) -> dict[str, float]:
    """Times calls as training makes them, after one that is not timed. Returns median and extremes for one step.

    Training issues a call while the one before is running, so the time to issue it does not count unless it is longer.

    Args:
        call: maps a state, which it may donate, to the next state and to other results.
        num_calls: the number of timed calls, at least 1.
        steps: the number of training steps of one call.

    Raises:
        KeyboardInterrupt: between two calls, after a request to stop. With several processes, all take all calls.
    """
    state, running = call(state)
    ends = []
    for _ in range(num_calls):
        if jax.process_count() == 1:
            stop.check()
        state, issued = call(state)
        jax.block_until_ready(running)
        ends.append(time.perf_counter())
        running = issued
    jax.block_until_ready(running)
    ends.append(time.perf_counter())
    seconds = [(end - start) / steps for start, end in itertools.pairwise(ends)]
    return {
        "step_seconds": statistics.median(seconds),
        "least_step_seconds": min(seconds),
        "most_step_seconds": max(seconds),
    }


def device_memory() -> float:
    """Returns the memory in GB that JAX may use on the first device. For a CPU, the memory of the machine."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] / GIGA
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIGA


def peak_memory() -> float | None:
    """Returns the peak memory in GB on the first device since this process started, or None if it is not known."""
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else peak / GIGA


def error_text(error: Exception) -> str:
    """Returns `OUT_OF_MEMORY`, or the first line of another error."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error) or OUT_OF_MEMORY in str(error).lower():
        return OUT_OF_MEMORY
    return f"failed: {(str(error).splitlines() or [type(error).__name__])[0]}"


HEADERS = (
    "order",
    "batch",
    "memory setting",
    "GFLOP",
    "GB accessed",
    "temporary GB",
    "total GB",
    "peak GB",
    "compile s",
    "s/step",
    "images/s",
)


def cells(row: Row) -> list[str]:
    """Returns the row as text, under `HEADERS`. An error replaces the seconds of a step."""

    def text(name: str) -> str:
        return "-" if row.get(name) is None else f"{row[name]:.4g}"

    memory = ("temporary_gb", "total_gb", "peak_gb")
    costs = [text(name) for name in ("gflop", "gb_accessed", *memory, "compile_seconds")]
    speed = [row.get("error") or text("step_seconds"), text("images_per_second")]
    return [str(row["order"]), str(row["batch_size"]), row["memory"], *costs, *speed]


def largest_fitting(rows: Iterable[Row], memory_gb: float) -> Row | None:
    """Returns the row of the largest batch that fits the memory, with its fastest setting; None if no batch fits.

    Without measured seconds, the setting with the least arithmetic counts as the fastest.
    """
    fitting = [row for row in rows if "error" not in row and row["total_gb"] <= memory_gb]

    def rank(row: Row) -> tuple[int, float, float]:
        return row["batch_size"], -(row.get("step_seconds") or 0.0), -row["gflop"]

    return max(fitting, key=rank, default=None)


def fitting_text(order: int, rows: Sequence[Row], memory_gb: float) -> str:
    """Names the largest batch of the order's rows that fits the memory, the setting that makes it fit, and the flags
    with which --mode=train uses both."""
    best = largest_fitting((row for row in rows if row["order"] == order), memory_gb)
    if best is None:
        return f"order {order}: no batch without an error fits {memory_gb:.3g} GB"
    setting = "no memory setting" if best["memory"] == UNCHANGED else best["memory"]
    needed = f"{best['total_gb']:.3g} of {memory_gb:.3g} GB"
    changes = Case(order, best["batch_size"], best["memory"]).changes()
    flags = " ".join(f"--config.{field}={value}" for field, value in changes.items())
    return f"order {order}: batch {best['batch_size']} fits with {setting} and needs {needed}: {flags}"
