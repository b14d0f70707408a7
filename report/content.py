"""The blocks that a page consists of, as plain data. Each kind of block has a macro in templates/blocks.html."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, TypeAlias

from report.formatting import MISSING, Row


@dataclasses.dataclass(frozen=True)
class Note:
    """A paragraph of text, in the style "note" or "warning"."""

    macro: ClassVar[str] = "note"
    text: str
    style: str = "note"


class Column(NamedTuple):
    """A column that a table shows: its header, its position in the rows, and whether its cells are numbers."""

    header: str
    position: int
    is_number: bool


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text. With `folded`, the table is hidden until the reader clicks on this text."""

    macro: ClassVar[str] = "table"
    headers: Row
    rows: Sequence[Row]
    title: str = ""
    folded: str = ""

    @property
    def columns(self) -> list[Column]:
        """The columns that have content."""
        columns = enumerate(zip(self.headers, *self.rows, strict=True))
        return [
            Column(header, position, all(map(_is_number, cells)))
            for position, (header, *cells) in columns
            if any(cell != MISSING for cell in cells)
        ]


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure as a PNG file, shown at a width in pixels. A copy is written to figures/NAME.png."""

    macro: ClassVar[str] = "plot"
    name: str
    copy: bytes
    description: str
    width: int


@dataclasses.dataclass(frozen=True)
class Gallery:
    """PNG files side by side, by their captions. A copy, one PNG file of all, is written to figures/NAME.png."""

    macro: ClassVar[str] = "gallery"
    name: str
    copy: bytes
    pictures: Mapping[str, bytes]
    title: str = ""


Block: TypeAlias = Note | Table | Plot | Gallery

_NUMBER = r"-?\d[\d,]*(\.\d+)?(e[+-]?\d+)?"


def _is_number(cell: str) -> bool:
    """Whether a cell is a number, with an error or unit if any, or a dash."""
    return cell == MISSING or re.fullmatch(rf"{_NUMBER}( (±|to) {_NUMBER}| (s|min|h))?", cell) is not None
