"""Writes docs/results/synthetic.md and its figures from the results of experiments/reproduce.py."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from analysis.score_distances import DistanceCurve, TimeNodes
from evaluation import MeanEstimate, mean_estimate
from evaluators.points import grid_points
from experiments.provenance import machine
from experiments.synthetic import (
    BRANCHES,
    ENTROPY_POINTS,
    NUM_TIMES,
    POINTS_AT_TIME,
    STARTING_POINTS,
    STARTS,
    TEST_POINTS,
    Problem,
)
from experiments.synthetic_figures import distance_figure, start_figure, trajectories
from infra.files import read_npz, write_atomic
from report.density_figures import density_curves, density_maps
from report.figures import figure_png
from sources.densities import DENSITIES

LABELS = {
    "order1": "order 1",
    "order2": "order 2",
    "order3": "order 3",
    "order1_long": "order 1, as long as order 3",
}

ACCOUNT = "## What it shows\n"
"""The first line of the hand-written part of the page, which is kept."""

Models = dict[str, list[dict[str, Any]]]
"""The results of each model for all seeds, by the name of the model."""


def write_page(problems: Sequence[Problem], runs: Path, docs: Path) -> None:
    """Writes the page and the figures for all complete comparisons."""
    sections, took = [], []
    for problem in problems:
        folders = [
            folder for folder in sorted((runs / problem.name).glob("seed*")) if (folder / "seconds.json").exists()
        ]
        if not folders:
            continue
        took += [json.loads((folder / "seconds.json").read_text()) for folder in folders]
        for kind, figure in problem_figures(problem, folders).items():
            write_atomic(docs / "images" / f"synthetic_{problem.name}_{kind}.png", figure_png(figure))
        sections.append(section(problem, folders))
    if (runs / "paths.npz").exists():
        write_atomic(docs / "images" / "synthetic_paths.png", figure_png(paths_figure(read_npz(runs / "paths.npz"))))
        sections.append(PATHS)
    path = docs / "results" / "synthetic.md"
    write_atomic(path, "\n".join([header(problems, took), *sections, account(path)]))


def account(path: Path) -> str:
    """Returns the hand-written part of an existing page, or an empty one."""
    text = path.read_text() if path.exists() else ""
    return ACCOUNT + text.split(ACCOUNT, 1)[1] if ACCOUNT in text else ACCOUNT


# --- text ---


def header(problems: Sequence[Problem], took: list[dict[str, Any]]) -> str:
    sizes = "\n".join(
        f"| {p.title} | {p.base:,} + {p.steps:,} | {p.batch_size} | {p.widths[0]}, {p.widths[0]} and {p.widths[1]}, "
        f"{p.widths[1]} | {DENSITIES[p.dataset].entropy:.3f} |"
        for p in problems
    )
    commits = ", ".join(sorted({t["commit"] for t in took}))
    minutes, cpu = (sum(t[kind] for t in took) / 60 for kind in ("wall", "cpu"))
    return HEADER.format(
        sizes=sizes,
        test=f"{TEST_POINTS:,}",
        times=NUM_TIMES,
        points=POINTS_AT_TIME,
        entropy_points=f"{ENTROPY_POINTS:,}",
        commits=commits,
        device=machine(),
        minutes=f"{minutes:.0f}",
        cpu=f"{cpu:.0f}",
    )


def section(problem: Problem, folders: Sequence[Path]) -> str:
    """Returns the section of one problem, with its table, comparisons and figures."""
    models = {name: [json.loads((f / f"{name}.json").read_text()) for f in folders] for name in BRANCHES}
    rows = "\n".join(table_row(name, models) for name in BRANCHES)
    lines = [comparison(models, worse, better) for worse, better in COMPARED]
    points = "; ".join(f"{LABELS[b]} against {LABELS[a]} {of_points(folders, a, b)}" for a, b in COMPARED)
    own = {
        term: np.mean([result[term]["se"] for results in models.values() for result in results])
        for term in ("cross", "entropy_score", "entropy_divergence")
    }
    seeds = ", ".join(folder.name.removeprefix("seed") for folder in folders)
    return SECTION.format(
        title=problem.title,
        seeds=seeds,
        rows=rows,
        lines="\n".join(f"- {line}" for line in lines),
        points=points,
        own=own,
        name=problem.name,
        starting=STARTING_POINTS,
    )


COMPARED = (("order1", "order2"), ("order2", "order3"), ("order1", "order3"), ("order1_long", "order3"))


def table_row(name: str, models: Models) -> str:
    results = models[name]
    steps = ", ".join(f"{step:,}" for step in sorted({r["step"] for r in results}))
    kl = np.array([r["kl"] for r in results])
    cells = [
        LABELS[name],
        steps,
        f"{1e3 * np.median([r['seconds_per_step'] for r in results]):.1f}",
        over_seeds([r["nll"] for r in results]),
        over_seeds(kl),
        over_seeds([r["score_matching"]["mean"] for r in results]),
        over_seeds([r["fisher"]["mean"] for r in results]),
        over_seeds([r["cross"]["mean"] for r in results]),
        over_seeds([r["entropy_score"]["mean"] for r in results]),
        over_seeds([r["entropy_divergence"]["mean"] for r in results]),
    ]
    return "| " + " | ".join(cells) + " |"


def over_seeds(values: Sequence[float] | np.ndarray, digits: int = 4) -> str:
    estimate = mean_estimate(np.array(values, np.float64))
    return plus_minus(estimate, digits)


def plus_minus(estimate: MeanEstimate, digits: int = 4, sign: str = "") -> str:
    error = f" ± {estimate.se:.{digits}f}" if estimate.n > 1 else " (one seed)"
    return f"{estimate.mean:{sign}.{digits}f}{error}"


def comparison(models: Models, worse: str, better: str) -> str:
    """States how much the KL divergence falls from one model to another, from the differences of the seeds."""
    fall = mean_estimate(np.array([a["kl"] - b["kl"] for a, b in zip(models[worse], models[better], strict=True)]))
    beyond = "" if fall.n == 1 else ", beyond" if abs(fall.mean) > 2 * fall.se else ", within"
    verdict = beyond and f"{beyond} two standard errors"
    return f"From {LABELS[worse]} to {LABELS[better]} the NLL falls by {plus_minus(fall, sign='+')} nats{verdict}."


def of_points(folders: Sequence[Path], worse: str, better: str) -> str:
    """Returns the fall of the KL divergence with a standard error over test points, each averaged over seeds."""
    by_point = [read_npz(f / f"{worse}.npz")["points_kl"] - read_npz(f / f"{better}.npz")["points_kl"] for f in folders]
    return plus_minus(mean_estimate(np.array(by_point)), sign="+")


# --- figures ---


def problem_figures(problem: Problem, folders: Sequence[Path]) -> dict[str, Figure]:
    arrays = {name: [read_npz(folder / f"{name}.npz") for folder in folders] for name in BRANCHES}
    curves = {LABELS[name]: averaged_curves(of_seeds) for name, of_seeds in arrays.items()}
    return {
        "density": density_figure(problem, arrays),
        "distances": distance_figure(curves),
        "starts": starts_figure(problem, folders),
    }


def starts_figure(problem: Problem, folders: Sequence[Path]) -> Figure:
    models = {}
    for name in BRANCHES:
        of_seeds = [read_npz(folder / f"{name}_starts.npz") for folder in folders]
        excess = np.array([arrays["excess"].mean(axis=1) for arrays in of_seeds])
        models[LABELS[name]] = excess.mean(0), excess.std(0, ddof=min(1, len(excess) - 1)) / np.sqrt(len(excess))
    return start_figure(STARTS, models)


def density_figure(problem: Problem, arrays: dict[str, list[dict[str, np.ndarray]]]) -> Figure:
    density = DENSITIES[problem.dataset]
    x = grid_points(problem.limit, problem.grid, density.dims)
    assert density.log_density_of_data is not None
    data = np.exp(np.asarray(density.log_density_of_data(jnp.asarray(x, jnp.float32)), np.float64))
    if density.dims == 1:
        models = {LABELS[name]: [of_seed["density"] for of_seed in of_seeds] for name, of_seeds in arrays.items()}
        return density_curves(x[:, 0], data, models)
    square = (problem.grid, problem.grid)
    maps = {LABELS[name]: of_seeds[0]["density"].reshape(square) for name, of_seeds in arrays.items()}
    return density_maps(problem.limit, data.reshape(square), maps)


def averaged_curves(of_seeds: Sequence[dict[str, np.ndarray]]) -> dict[str, DistanceCurve]:
    """Returns means over seeds. The standard error is over seeds, or over points if there is a single seed."""
    nodes, n = TimeNodes(of_seeds[0]["nodes_t"], of_seeds[0]["nodes_weight"]), len(of_seeds)
    curves = {}
    for name in ("score_matching", "fisher", "difference"):
        means = np.array([arrays[f"{name}_mean"] for arrays in of_seeds])
        se = means.std(0, ddof=1) / np.sqrt(n) if n > 1 else of_seeds[0][f"{name}_se"]
        curves[name] = DistanceCurve(nodes, means.mean(0), se, n)
    return curves


def paths_figure(arrays: dict[str, np.ndarray]) -> Figure:
    panels = {
        "SDE, from the data": arrays["sde_forward"],
        "ODE, from the data": arrays["ode_forward"],
        "SDE, from the prior": arrays["sde_reverse"],
        "ODE, from the prior": arrays["ode_reverse"],
    }
    return trajectories(arrays["t"], panels)


HEADER = """# The paper's synthetic experiments

Does a diffusion ODE get closer to the data when its score is trained with second and third-order denoising score
matching? A first-order model is trained. Training then continues from this model with orders 1, 2 and 3 (exact
derivatives, weights of the paper) for the same number of steps, and with order 1 for as long as order 3 took.
`make reproduce` runs all experiments.

**Smaller than published.** The paper trains each order for 50,000 to 100,000 steps of batch 5000, with widths 128 and
512. The experiments of this page have these sizes:

| problem | steps: first order + more | batch | widths: branches and trunk | entropy of the data, nats |
|---|---|---|---|---|
{sizes}

Time starts at 1e-5, as in the paper. All models are evaluated on the same {test} test points. NLL and KL (of the data
from the model) come from the exact likelihood of the ODE, in nats. The distances between scores ([L22] Fig. 3) are
integrated over time, also in nats, from {times} times with {points} points each. First-order training minimises l_SM.
l_Fisher is the distance between the score of the ODE's own density and the score of the data. The integral of Theorem
3.1 is a second estimate of the KL, from scores alone and on other points. Entropies of the data are estimated from the
model's score ([S21b] Theorem 4, {entropy_points} points). ± is the standard error over seeds.

Command `make reproduce`, commit {commits}, {device}: {minutes} minutes, {cpu} of CPU time. Other work shared the
machine, so only the ratios of ms/step are meaningful.
"""

PATHS = """## Paths

The figure shows paths of the mixture (VE) under a third-order model: Euler steps of the SDE and the ODE in both
directions, coloured by their position at t = 0.

![Paths](../images/synthetic_paths.png)
"""

SECTION = """## {title}

The seeds are {seeds}.

| model | steps | ms/step | NLL | KL | l_SM | l_Fisher | Theorem 3.1 | entropy, E\\|s\\|² | entropy, -E div s |
|---|---|---|---|---|---|---|---|---|---|
{rows}

{lines}

Paired by test point and averaged over seeds, these falls and their standard errors over points are: {points}.

For a single model, the standard error over points is {own[cross]:.3f} nats for the integral of Theorem 3.1, and
{own[entropy_score]:.3f} and {own[entropy_divergence]:.3f} nats for the entropies. All models share this error.

![Densities](../images/synthetic_{name}_density.png)
![Distances between scores](../images/synthetic_{name}_distances.png)

The last figure shows the NLL of {starting} data points, minus the NLL under the data's own density, against the start
time of the solve. The points are taken to be at this start time ([L22] Fig. 6). The shaded area is the standard error
over seeds.

![NLL against the start](../images/synthetic_{name}_starts.png)
"""
