"""A map of the project: which part may import which, and how many parts and imports there are."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parent.parent

LAYERS = (
    ("examples", "experiments", "main"),  # programs
    ("run_lib",),  # the loops behind the modes of main.py
    ("evaluators", "report"),  # results of checkpoints; the page that shows them
    ("analysis", "dequantization"),  # diagnostics of score models; noise that turns levels into a density
    ("build",),  # a configuration to the objects of a run
    ("datasets",),  # batches
    ("sources",),  # images and points
    ("infra",),  # checkpoints, workdir, metrics, console, devices
    ("train_state",),  # one step of training
    ("bound_likelihood",),  # bounds on the SDE's likelihood
    ("likelihood", "sampling"),  # the ODE's likelihood; samplers by name
    ("losses", "samplers"),  # the three orders of score matching; the updates of samplers
    ("objectives",),  # other objectives, and the code that all objectives share
    ("coordinates", "evaluation", "models"),  # changes of variables; FID, IS, KID; networks
    ("derivatives", "sde_lib", "solvers"),  # exact and estimated derivatives; SDEs in closed form; ODEs
    ("linear_sde",),  # the base class of SDEs
    ("arrays", "configs"),
)
"""From the parts that know most to those that know least. A part imports only from lower layers."""

MOST_MODULES, MOST_PARTS, MOST_IMPORTS = 16, 28, 142
"""Limits for the root's modules, for its modules and folders together, and for the imports between these.

Parts and imports have exactly the limits' numbers, except for two imports: room for one extension.
"""


def imports(path: Path) -> set[str]:
    """The top-level names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def parts() -> dict[str, list[Path]]:
    """The modules of the root and its folders of modules, without the tests, each with its files."""
    modules = {path.stem: [path] for path in ROOT.glob("*.py")}
    folders = {path.parent.name: sorted(path.parent.rglob("*.py")) for path in ROOT.glob("*/__init__.py")}
    return modules | {name: files for name, files in folders.items() if name != "tests"}


def graph() -> dict[str, set[str]]:
    """The parts that each part imports."""
    names = parts().keys()
    return {part: set.union(*map(imports, files)) & names - {part} for part, files in parts().items()}


def imported_files(path: Path) -> set[Path]:
    """The files of this project that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = (ROOT / f"{name.replace('.', '/')}.py" for name in names)
    return {file for file in files if file.is_file()}


def test_every_part_has_its_layer():
    layered = [part for layer in LAYERS for part in layer]
    assert len(layered) == len(set(layered)), "LAYERS names a part twice"
    missing, gone = parts().keys() - set(layered), set(layered) - parts().keys()
    assert not missing, f"new parts {sorted(missing)}: add each to the layer of LAYERS above all parts that it imports"
    assert not gone, f"LAYERS names {sorted(gone)}, which do not exist: remove them there"


def test_imports_go_downward():
    depth = {part: number for number, layer in enumerate(LAYERS) for part in layer}
    upward = [
        f"{path.relative_to(ROOT)} imports {name}"
        for part, files in parts().items()
        for path in files
        for name in imports(path) & depth.keys() - {part}
        if depth[name] <= depth[part]
    ]
    assert upward == [], "move the code to a lower layer, or the importing code to a higher one; see LAYERS"


def test_the_structure_stays_small():
    edges = graph()
    numbers = {
        "MOST_MODULES": (len(list(ROOT.glob("*.py"))), MOST_MODULES, "put the new module into a folder"),
        "MOST_PARTS": (len(edges), MOST_PARTS, "put the new module into a folder that exists"),
        "MOST_IMPORTS": (
            sum(map(len, edges.values())),
            MOST_IMPORTS,
            "use parts that the importing part imports already",
        ),
    }
    for name, (number, most, advice) in numbers.items():
        assert number <= most, f"{name} is {most}, but there are {number}: {advice}, or raise the limit with a reason"
    graphlib.TopologicalSorter(edges).prepare()  # raises CycleError


def test_no_files_import_each_other_in_a_circle():
    files = [path for each in parts().values() for path in each]
    graphlib.TopologicalSorter({path: imported_files(path) for path in files}).prepare()  # raises CycleError


def test_no_file_imports_another_framework():
    for path in (path for files in parts().values() for path in files):
        if path.name != "convert_inception.py":  # the conversion of published weights needs torch
            assert imports(path) & {"tensorflow", "torch", "wandb", "clu"} == set(), path
