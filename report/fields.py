"""Fields of stored evaluations as columns of tables: a header, and a function from an evaluation to a cell."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from report.formatting import estimate, number

Result: TypeAlias = Mapping[str, Any]
"""A stored evaluation, or one part of it such as `bpd`."""


OTHER_CHECKPOINT = "checkpoint"
"""The field of an evaluation that names its checkpoint, if that is not the run's own (eval.checkpoint)."""


class Field(NamedTuple):
    """A column of a table of evaluations."""

    header: str
    show: Callable[[Result], str]


def field(header: str, *paths: str, show: Callable[..., str] = number) -> Field:
    """Makes a column that shows the values at these dotted paths. A missing value is None for `show`."""
    return Field(header, lambda result: show(*(lookup(result, path) for path in paths)))


def lookup(result: Result, path: str) -> Any:
    """Returns the value at a dotted path, or None if it does not exist."""
    value: Any = result
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def run_and_file(results: Sequence[Result], several_runs: bool) -> list[Field]:
    """Columns that tell evaluations apart: the run if there are several, and the file if the step does not tell."""
    several_files = len({(result.get("run"), result.get("checkpoint_step")) for result in results}) < len(results)
    needed = {"run": several_runs, "file": several_files or any(OTHER_CHECKPOINT in result for result in results)}
    return [field(name, name) for name, is_needed in needed.items() if is_needed]


def likelihood(part: Any) -> str:
    """Formats a likelihood, and says so if it is a bound."""
    return estimate(part) + bound_mark(part)


def bound_mark(part: Any) -> str:
    """Returns what marks a bound; nothing for the likelihood of the ODE."""
    return " (bound)" if isinstance(part, Mapping) and "bound" in part else ""
