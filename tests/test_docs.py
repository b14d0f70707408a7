"""The documentation: its links, its commands, the functions that it names, and the pages generated from the code."""

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from configs import reference
from configs.default import get_config
from main import MODES

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGS = [*sorted((ROOT / "configs").glob("*/*.py")), ROOT / "configs" / "score_sde.py"]
SOURCES = [path for path in ROOT.rglob("*.py") if not any(part[0] == "." for part in path.relative_to(ROOT).parts)]

LONGEST_README = 130
PROGRAM = re.compile(r"(?:srun )?(?:\.venv/bin/)?(?:python (?:main\.py|-m [\w.]+)|make|pip install)(?= |$)")
LABEL = re.compile(r"\[([A-Z]+\d\d[a-z]?)\]")
FIELD = re.compile(
    rf"(?<![\w/.])((?:{'|'.join(key for key in get_config() if key != 'seed')})\.[a-z]\w*[a-z0-9])(?!\w)"
)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
# ml_collections loads files in a way that Python deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def code_of(page: Path) -> Iterator[str]:
    """The lines of code on a page or in the docstring of a file, with continued lines joined; and its inline code."""
    text = page.read_text()
    if page.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    text = re.sub(r"\\\n\s*", "", text)
    yield from (line.strip() for line in text.splitlines())
    yield from re.findall(r"`([^`\n]+)`", text)


def commands_of(page: Path) -> list[list[str]]:
    """The commands on a page, each as a list of words without its comment."""
    lines = [line for line in code_of(page) if PROGRAM.match(line) and "`" not in line]
    return [shlex.split(line.removeprefix("srun "), comments=True) for line in lines]


ALL_COMMANDS = [(path, words) for path in (*PAGES, *CONFIGS) for words in commands_of(path)]


def definitions(path: Path) -> set[str]:
    """The functions, classes, methods and constants that a file defines, methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        names |= _names(node)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for child in node.body for name in _names(child)}
    return names


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def flags_of(path: Path) -> set[str]:
    """The names of the flags that a program defines with absl or argparse."""
    names = {"help", "verbosity"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and (
                node.func.attr.startswith("DEFINE") or node.func.attr == "add_argument"
            ):
                names.add(str(first.value).removeprefix("--"))
    return names


def test_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= LONGEST_README


def test_numbers_of_the_readme_are_in_the_results() -> None:
    results = "".join(page.read_text() for page in (ROOT / "docs" / "results").glob("*.md"))
    numbers = re.findall(r"[\d.]+ ± [\d.]+\d", README.read_text())
    assert numbers
    assert [number for number in numbers if number not in results] == []


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


@each_page
def test_functions_exist(page: Path) -> None:
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", page.read_text())
    assert [f"{file}:{name}" for file, name in named if name not in definitions(ROOT / file)] == []


def test_method_names_functions() -> None:
    assert len(re.findall(r"`[\w/]+\.py:[\w.]+`", (ROOT / "docs" / "method.md").read_text())) > 50


@each_page
def test_files_and_folders_exist(page: Path) -> None:
    """Files of code that a page names in inline code are there, relative to the root."""
    named = re.findall(r"`((?:[\w-]+/)*[\w-]+\.py)`", page.read_text())
    assert [name for name in named if not ((ROOT / name).is_file() or (ROOT / "tests" / name).is_file())] == []


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS], ids=lambda page: str(page.relative_to(ROOT)))
def test_fields_exist(page: Path) -> None:
    known = {
        f"{section}.{field}"
        for section, fields in get_config().to_dict().items()
        if section != "seed"
        for field in fields
    }
    text = "\n".join(code_of(page))
    named = {name for name in FIELD.findall(text) if not name.endswith(".py") and not name.endswith(".md")}
    assert named - known - {"data.npz", "cost.json"} == set()


def test_pages_have_commands() -> None:
    assert len(ALL_COMMANDS) > 60


@pytest.mark.parametrize("words", [words for _, words in ALL_COMMANDS if words[1:2] == ["main.py"]], ids=" ".join)
def test_commands_of_main_parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags and fields exist, values have their type, the configuration exists, and the mode has what it needs."""
    argv = words[1:]
    monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for the overrides
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
    for name in flags_of(ROOT / "main.py") - {"config"}:
        flags.DEFINE_string(name, None, name, flag_values=values)
    if argv[1:] == ["--help"]:
        return
    assert values(argv)[1:] == []
    assert values["mode"].value in MODES
    assert values["workdir"].value or values["mode"].value in ("prepare", "stats")
    assert values["mode"].value == "report" or values["config"].value is not None


@pytest.mark.parametrize("words", [words for _, words in ALL_COMMANDS if words[1:2] == ["-m"]], ids=" ".join)
def test_commands_of_modules_parse(words: list[str]) -> None:
    """The module exists, and it has the flags."""
    module, arguments = words[2], words[3:]
    path = ROOT / f"{module.replace('.', '/')}.py"
    if not path.is_file():
        assert importlib.util.find_spec(module) is not None
        return
    known = flags_of(path)
    given = [argument.removeprefix("--").split("=")[0] for argument in arguments if argument.startswith("--")]
    assert [name for name in given if name not in known] == []
    files = [argument for argument in arguments if argument.endswith(".npz") and "=" not in argument]
    assert [file for file in files if not (ROOT / file).is_file()] == []


@pytest.mark.parametrize("words", [words for _, words in ALL_COMMANDS if words[0] in ("make", "pip")], ids=" ".join)
def test_targets_and_requirements_exist(words: list[str]) -> None:
    if words[0] == "pip":
        assert (ROOT / words[-1]).is_file()
    else:
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert [word for word in words[1:] if word not in targets] == []


def test_help_lists_the_modes() -> None:
    result = _run("main.py", "--help")
    assert result.returncode == 0
    assert all(mode in result.stdout for mode in MODES)


def test_golden_numbers_of_the_readme_agree() -> None:
    assert ["python", "-m", "tests.golden", "tests/golden/sde_vpsde.npz"] in commands_of(README)
    result = _run("-m", "tests.golden", "tests/golden/sde_vpsde.npz")
    assert result.returncode == 0
    assert "all within tolerance" in result.stdout


def test_configuration_page_is_up_to_date(tmp_path: Path) -> None:
    assert _run("-m", "configs.reference", f"--out={tmp_path / 'page.md'}").returncode == 0
    written = (ROOT / "docs" / "configuration.md").read_text()
    assert (tmp_path / "page.md").read_text() == written, "run python -m configs.reference"


def test_configuration_page_has_every_field() -> None:
    config, source = get_config(), reference.DEFAULT.read_text()
    found = {field.name for section in reference.sections(source) for field in section.fields}
    sections = {name: fields for name, fields in config.to_dict().items() if isinstance(fields, dict)}
    assert found == {"seed"} | {f"{name}.{field}" for name, fields in sections.items() for field in fields}


def test_a_field_without_a_comment_is_refused() -> None:
    source = "def _data():\n    data = ConfigDict()\n    data.levels = 256\n    return data\n"
    with pytest.raises(ValueError, match=r"data\.levels has no comment"):
        reference.sections(source)


def test_labels_have_references() -> None:
    listed = set(re.findall(r"\*\*\[(\w+)\]\*\*", (ROOT / "docs" / "references.md").read_text()))
    used = {label for path in (*SOURCES, *PAGES) for label in LABEL.findall(path.read_text())}
    assert {"L22", "S21a", "S21b"} <= used
    assert used - listed == set()


def _run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
