"""Numbers as people read them, and tables of them as plain text and as HTML."""

import html
import math
import re
from collections.abc import Sequence
from typing import Any

MISSING = "\N{EN DASH}"

Row = Sequence[str]


def number(value: Any, decimals: int = 3) -> str:
    """Whole numbers with separators, others with so many decimals; text as it is, None as a dash."""
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


def with_error(value: float | None, error: float | None) -> str:
    """A value and its error, with the decimals that give the error two digits; at least two and at most five."""
    if value is None or error is None or not math.isfinite(value) or not math.isfinite(error) or error <= 0:
        return number(value)
    decimals = min(5, max(2, 1 - math.floor(math.log10(error))))
    return f"{value:,.{decimals}f} ± {error:,.{decimals}f}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def text_table(headers: Row, rows: Sequence[Row]) -> str:
    """Columns aligned to the right, in plain ASCII."""
    cells = [[cell.replace("±", "+-").replace(MISSING, "-") for cell in row] for row in (headers, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def html_table(headers: Row, rows: Sequence[Row]) -> str:
    """A table whose text is escaped; columns of numbers are aligned to the right, columns without content left out."""
    columns = [
        (header, column)
        for header, column in zip(headers, zip(*rows, strict=True), strict=True)
        if any(cell != MISSING for cell in column)
    ]
    sides = [' class="n"' if all(_is_number(cell) for cell in column) else "" for _, column in columns]
    head = "".join(f"<th{side}>{html.escape(h)}</th>" for (h, _), side in zip(columns, sides, strict=True))
    body = ""
    for row in zip(*(column for _, column in columns), strict=True):
        cells = (f"<td{side}>{html.escape(cell)}</td>" for cell, side in zip(row, sides, strict=True))
        body += f"<tr>{''.join(cells)}</tr>\n"
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}</table></div>\n'


def paragraph(text: str, kind: str = "note") -> str:
    """Text for HTML, of a class that the page styles."""
    return f'<p class="{kind}">{html.escape(text)}</p>\n'


def _is_number(cell: str) -> bool:
    return cell == MISSING or re.match(r"-?\d[\d,]*(\.\d+)?(e-?\d+)?( |$)", cell) is not None
