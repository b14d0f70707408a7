"""The pages of docs/results/ that scripts write.

A script writes the parts of its page between marks: what was done, tables, figures, and where the numbers come from.
All other text on the page is written by hand, and a script keeps it. Text by hand says what the numbers mean.
"""

import dataclasses
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path

from infra.files import write_atomic

WIDTH = 120
"""The longest line of prose."""

NOT_PROSE = ("#", "|", "!", "```", "    ")
"""The beginnings of headings, tables, pictures and code, whose lines are kept."""

_SPACE = "\0"
"""Stands for a space at which no line is broken."""


@dataclasses.dataclass(frozen=True)
class Page:
    """A page, and the names of the parts that a script writes."""

    path: Path
    parts: tuple[str, ...]

    def only(self, *parts: str) -> "Page":
        """Returns the page for a script that writes only these of its parts in one run."""
        return Page(self.path, parts)

    def write(self, texts: Mapping[str, str], path: Path | None = None) -> None:
        """Writes the parts into the page at `path`, by default the one in docs/, and prints them.

        If the page does not exist yet, a page with only these parts is written.

        Raises:
            ValueError: for other parts than `parts`, or if the page lacks the marks of a part.
        """
        if tuple(texts) != self.parts:
            raise ValueError(f"the parts of {self.path} are {self.parts}, but {tuple(texts)} were computed")
        path = path or self.path
        before = path.read_text() if path.exists() else "\n".join(f"{begin(name)}\n{end(name)}\n" for name in texts)
        after = with_parts(before, texts)
        write_atomic(path, after)
        for text in texts.values():
            print(text, flush=True)
        if after != before:
            print(f"{path}: check the text outside the marks, which is written by hand, against the new numbers")


def begin(name: str) -> str:
    """Returns the line before a part."""
    return f"<!-- {name}: begin -->"


def end(name: str) -> str:
    """Returns the line after a part."""
    return f"<!-- {name}: end -->"


def with_parts(page: str, texts: Mapping[str, str]) -> str:
    """Returns the page with new texts between the marks of parts, and all other text unchanged.

    Raises:
        ValueError: if the page lacks the marks of a part.
    """
    for name, text in texts.items():
        before, first, rest = page.partition(begin(name))
        _, last, after = rest.partition(end(name))
        if not first or not last:
            raise ValueError(f"the page lacks the line {begin(name)!r}, or {end(name)!r} after it")
        page = f"{before}{first}\n\n{text.strip()}\n\n{last}{after}"
    return page


def wrapped(text: str) -> str:
    """Returns the text with the lines of its paragraphs and lists broken at `WIDTH`."""
    return "\n\n".join(_wrapped_block(block) for block in text.strip().split("\n\n"))


def _wrapped_block(block: str) -> str:
    if block.startswith(NOT_PROSE):
        return block
    is_list = block.startswith("- ")
    items = re.split(r"\n(?=- )", block) if is_list else [block]
    return "\n".join(_wrapped_lines(" ".join(item.split()), indent="  " if is_list else "") for item in items)


def _wrapped_lines(line: str, indent: str) -> str:
    """Breaks a line, but not inside of code, and not before what would begin a list or a heading."""
    joined = re.sub(r"`[^`]+`", lambda code: code[0].replace(" ", _SPACE), line)
    joined = re.sub(r" (?=([-+*]|#+|\d+[.)]) )", _SPACE, joined)
    filled = textwrap.fill(joined, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return filled.replace(_SPACE, " ")
