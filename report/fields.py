"""Fields of stored evaluations as columns of tables: a header, and a function from an evaluation to a cell."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from report.formatting import number

Result: TypeAlias = Mapping[str, Any]
"""A stored evaluation, or one part of it such as `bpd`."""


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
    """Columns that tell evaluations apart: the run if there are several, and the file if a step has several files."""
    several_files = len({(result.get("run"), result.get("checkpoint_step")) for result in results}) < len(results)
    return [field(name, name) for name, needed in (("run", several_runs), ("file", several_files)) if needed]
