"""Numbers as text for people."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

MISSING = "\N{EN DASH}"
"""The cell of a table whose value is unknown."""

Row: TypeAlias = Sequence[str]


def number(value: Any, decimals: int = 3) -> str:
    """Formats integers with separators and other numbers with up to `decimals` decimals. Text stays as it is."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return "not finite"
    if decimals == 0 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:,.{decimals}f}" if abs(value) >= 10**-decimals else f"{value:.3g}"


whole_number = partial(number, decimals=0)
"""Formats a number rounded to an integer."""


def with_error(value: float | None, error: float | None) -> str:
    """Formats a value and its error with two digits of the error, within two to five decimals."""
    if value is None or error is None or not math.isfinite(value) or not math.isfinite(error) or error <= 0:
        return number(value)
    decimals = min(5, max(2, 1 - math.floor(math.log10(error))))
    return f"{value:,.{decimals}f} ± {error:,.{decimals}f}"


def estimate(value: Any) -> str:
    """Formats an estimate that is stored as a number, or as its `mean` and standard error `se`."""
    return with_error(value.get("mean"), value.get("se")) if isinstance(value, Mapping) else number(value)


def small_error(value: float | None) -> str:
    """Formats an error, which may be very small."""
    return MISSING if value is None else f"{value:.1e}" if abs(value) < 0.1 else f"{value:.2f}"


def duration(seconds: float | None) -> str:
    """Formats a time in seconds, minutes or hours."""
    if seconds is None:
        return MISSING
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
