"""The pages of docs/results/ that scripts write keep the text that is written by hand."""

import ast
import re
from pathlib import Path

import pytest

from experiments.pages import Page, begin, end, with_parts, wrapped

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "experiments").glob("*.py"))
MARK = re.compile(r"<!-- (.+): (begin|end) -->")


def page_of(script: Path) -> Page | None:
    """The page that a script declares as `PAGE`, if any. The script itself is not run."""
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PAGE":
            assert isinstance(node.value, ast.Call)
            path, parts = node.value.args
            assert isinstance(path, ast.Call)
            return Page(Path(ast.literal_eval(path.args[0])), ast.literal_eval(parts))
    return None


PAGES = [page for script in SCRIPTS if (page := page_of(script))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path.stem)


def test_every_page_with_marks_has_its_script() -> None:
    marked = {path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md") if MARK.search(path.read_text())}
    assert marked == {page.path for page in PAGES}
    assert len(PAGES) > 8


@each_page
def test_a_page_has_the_marks_of_its_parts(page: Page) -> None:
    marks = MARK.findall((ROOT / page.path).read_text())
    assert marks == [(name, place) for name in page.parts for place in ("begin", "end")]


@each_page
def test_text_by_hand_stays(page: Page, tmp_path: Path) -> None:
    copy, before = tmp_path / "page.md", (ROOT / page.path).read_text()
    copy.write_text(before)
    page.write({name: f"New text of {name}." for name in page.parts}, copy)
    after = copy.read_text()
    for name in page.parts:
        assert re.findall(f"{begin(name)}\n\n(.*)\n\n{end(name)}", after, re.DOTALL) == [f"New text of {name}."]
    part = re.compile(r"<!-- (.+): begin -->.*?<!-- \1: end -->", re.DOTALL)
    assert part.split(after) == part.split(before)


@each_page
def test_lines_of_a_page_are_wrapped_as_its_script_does(page: Page) -> None:
    """So that the same numbers give the same page."""
    text = (ROOT / page.path).read_text()
    parts = {name: text.partition(begin(name))[2].partition(end(name))[0] for name in page.parts}
    assert with_parts(text, {name: wrapped(part) for name, part in parts.items()}) == text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_scripts_name_no_page_but_their_own(script: Path) -> None:
    """A script that writes a page in another way would overwrite the text by hand."""
    tree = ast.parse(script.read_text())
    in_pages = {id(text) for node in ast.walk(tree) if ast.unparse(node).startswith("Page(") for text in ast.walk(node)}
    named = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in in_pages
    ]
    assert [text for text in named if text.endswith(".md")] == []


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks the line '<!-- table: begin -->'"):
        with_parts("Text by hand.", {"table": "new"})


def test_parts_that_the_page_does_not_declare_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"are \('table',\), but \('rows',\) were computed"):
        Page(tmp_path / "page.md", ("table",)).write({"rows": ""})


def test_a_new_page_has_the_parts_only(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    Page(path, ("a", "b")).write({"a": "One.", "b": "Two."})
    assert [line for line in path.read_text().splitlines() if line] == [
        *(begin("a"), "One.", end("a")),
        *(begin("b"), "Two.", end("b")),
    ]


def test_wrapping_keeps_tables_code_and_items() -> None:
    table, code = "| a | b |\n|---|---|\n| 1 | 2 |", "```\n  x\n    y\n```"
    words = " ".join(["word"] * 40)
    text = wrapped(f"# Title\n\n{words} `make a page` {words}\n\n{table}\n\n{code}\n\n- one\n  item\n- {words}")
    assert "# Title\n\n" in text
    assert "`make a page`" in text
    assert f"\n\n{table}\n\n{code}\n\n- one item\n- word" in text
    assert max(map(len, text.splitlines())) <= 120
    assert wrapped(text) == text


@pytest.mark.parametrize("beginning", ["-", "+", "*", "##", "12."])
def test_no_line_begins_with_what_would_be_a_list_or_a_heading(beginning: str) -> None:
    lines = [wrapped(f"{'x' * length} {beginning} (+800) is paired").splitlines() for length in range(95, 125)]
    assert all(len(each) == 1 or not each[1].startswith(f"{beginning} ") for each in lines)
    assert any(len(each) == 2 for each in lines)
