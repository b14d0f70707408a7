"""Imports go downward only, and what trains and evaluates stays free of other frameworks."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent

LAYERS = (
    {"main"},
    {"run_lib"},
    {"deq_training"},
    {"passes", "stored_states", "report"},
    {"report_results"},
    {"build", "workdir", "tables", "comparison", "figures", "figures_density", "run_files", "results", "released"},
    {"checkpoints"},
    {
        "train_state",
        "evaluation",
        "sampling",
        "likelihood",
        "bounds",
        "dequantization",
        "variational",
        "score_ode",
        "score_distances",
        "entropy",
        "paths",
    },
    {"feature_statistics"},
    {"losses", "features", "coordinates", "fast_samplers", "predictor_corrector", "ode", "datasets", "models"},
    {"sources"},
    {"records"},
    {"marginals"},
    {"derivatives", "densities", "sde_lib", "parallel", "files"},
    {"arrays", "configs"},
)
"""The modules, from those that know most to those that know least; a module imports from its own layer or below."""


def imports(path: Path) -> set[str]:
    """The top-level names that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def files() -> dict[Path, str]:
    """The source files, with the name of the module or package each belongs to."""
    top = {path: path.stem for path in ROOT.glob("*.py")}
    return top | {
        path: name for name in ("models", "sources", "configs", "passes") for path in (ROOT / name).rglob("*.py")
    }


def test_every_module_has_its_layer():
    layers = [name for layer in LAYERS for name in layer]
    assert len(layers) == len(set(layers))
    assert set(files().values()) - set(layers) == set()


def test_imports_go_downward():
    depth = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    upward = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, module in files().items()
        for name in imports(path) & depth.keys()
        if depth[name] < depth[module]
    ]
    assert upward == []


def test_no_file_imports_another_framework():
    for path in files():
        assert imports(path) & {"tensorflow", "torch", "wandb", "clu"} == set(), path
