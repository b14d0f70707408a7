"""Writes docs/configuration.md from the comments in configs/default.py.

    python -m configs.reference [--out=docs/configuration.md]

Run it after every change of a field or of its comment; tests/test_docs.py checks that the page is up to date.
"""

import argparse
import ast
import io
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
DEFAULT = ROOT / "configs" / "default.py"
SCORE_SDE = ROOT / "configs" / "score_sde.py"

ABOUT_SCORE_SDE = """
[configs/score_sde.py](../configs/score_sde.py) has all configurations of score_sde with its own values. A colon and a
name choose one: `--config=configs/score_sde.py:vp/ddpm/cifar10`. If a file in the table above has the same name, that
file has the values of the paper. The names are
"""

INTRODUCTION = """\
# Configuration

`python -m configs.reference` generates this page from the comments in [configs/default.py](../configs/default.py).

A configuration file returns a locked `ConfigDict`: the defaults below, with the differences that the file states. Any
field can be set on the command line, and a field that does not exist is an error:

```
python main.py --config=configs/digits/ncsnpp.py --workdir=runs/digits --mode=train --config.training.batch_size=32
```

The whole configuration is checked before any work starts, and is written to `config.json` in the workdir. `build.py`
and the functions named `..._from_config` read it; all other functions take plain arguments.

## Configuration files
"""


class Field(NamedTuple):
    """A field of the configuration."""

    name: str
    default: str
    meaning: str


class Section(NamedTuple):
    """The fields that one function of configs/default.py sets, and the function's docstring."""

    name: str
    about: str
    fields: list[Field]


def sections(source: str) -> list[Section]:
    """The sections of configs/default.py, in its order.

    Raises:
        ValueError: if a field has no comment.
    """
    comments, lines = _comments(source), source.splitlines()
    found = []
    for function in ast.parse(source).body:
        if isinstance(function, ast.FunctionDef):
            top = function.name == "get_config"
            name = "" if top else function.name.removeprefix("_")
            fields = list(_fields(function, f"{name}." if name else "", source, comments, lines))
            found.append(Section(name, ast.get_docstring(function) or "", fields))
    return found


def _fields(
    function: ast.FunctionDef, prefix: str, source: str, comments: dict[int, str], lines: Sequence[str]
) -> Iterator[Field]:
    for statement in function.body:
        if not isinstance(statement, ast.Assign) or not isinstance(target := statement.targets[0], ast.Attribute):
            continue
        if isinstance(statement.value, ast.Call):  # config.training = _training(), a section of its own
            continue
        name = prefix + target.attr
        meaning = _meaning(statement.lineno, comments, lines)
        if not meaning:
            raise ValueError(f"{name} has no comment in {DEFAULT.name}; write one beside it or on the line above it")
        yield Field(name, ast.get_source_segment(source, statement.value) or "", meaning)


def _meaning(line: int, comments: dict[int, str], lines: Sequence[str]) -> str:
    """The comment lines directly above a line, and the comment at its end."""
    first = line
    while first - 1 in comments and lines[first - 2].lstrip().startswith("#"):
        first -= 1
    return " ".join(comments[number] for number in range(first, line + 1) if number in comments)


def _comments(source: str) -> dict[int, str]:
    """The text of the comment on each line that has one."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}


def page() -> str:
    """The text of docs/configuration.md."""
    parts = [INTRODUCTION, _file_table(), ABOUT_SCORE_SDE + ", ".join(f"`{name}`" for name in score_sde_names()) + "."]
    for section in sections(DEFAULT.read_text()):
        parts.append(f"\n## {section.name or 'Top level'}\n")
        if section.name:
            parts.append(f"{section.about}\n")
        rows = [(f"`{name}`", f"`{default}`", _sentence(meaning)) for name, default, meaning in section.fields]
        parts.append(_table(("field", "default", "meaning"), rows))
    return "\n".join(parts) + "\n"


def _file_table() -> str:
    """The configuration files, with the first line of their docstrings."""
    rows = []
    for path in sorted((ROOT / "configs").glob("*/*.py")):
        if path.name != "__init__.py":
            docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
            name = path.relative_to(ROOT)
            rows.append((f"[{name}](../{name})", docstring.split("\n")[0]))
    return _table(("file", "model and data"), rows)


def score_sde_names() -> list[str]:
    """Returns the names of the configurations in configs/score_sde.py, which this program does not import."""
    for statement in ast.parse(SCORE_SDE.read_text()).body:
        if isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target) == "CONFIGURATIONS":
            assert isinstance(statement.value, ast.Dict)
            return [str(key.value) for key in statement.value.keys if isinstance(key, ast.Constant)]
    raise ValueError(f"{SCORE_SDE.name} does not define CONFIGURATIONS")


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _sentence(text: str) -> str:
    """Returns the text with a capital letter at its beginning, unless it begins with the name of a choice."""
    first = text.split()[0].rstrip(",:")
    return text if "_" in first or first in ("pc", "mlp", "swish") else text[0].upper() + text[1:]


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the page to the file of the flag --out."""
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m configs.reference", description=description)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "configuration.md", help="the page to write")
    parser.parse_args(arguments).out.write_text(page())


if __name__ == "__main__":
    main()
