"""docs/results/synthetic.md and its figures, from what experiments/reproduce.py has left."""

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
"""From this heading on the page is written by hand, and kept."""

Models = dict[str, list[dict[str, Any]]]
"""Results of the seeds, by the name of the model."""


def write_page(problems: Sequence[Problem], runs: Path, docs: Path) -> None:
    """Writes the page and the figures of all comparisons that are complete."""
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
    """What was written by hand below the results."""
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
    """Table, comparisons and figures of one problem."""
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
    """By how much the divergence from the data falls from one model to another, from the differences of the seeds."""
    fall = mean_estimate(np.array([a["kl"] - b["kl"] for a, b in zip(models[worse], models[better], strict=True)]))
    beyond = "" if fall.n == 1 else ", beyond" if abs(fall.mean) > 2 * fall.se else ", within"
    verdict = beyond and f"{beyond} two standard errors"
    return f"From {LABELS[worse]} to {LABELS[better]} the NLL falls by {plus_minus(fall, sign='+')} nats{verdict}."


def of_points(folders: Sequence[Path], worse: str, better: str) -> str:
    """The same by test points, each averaged over seeds: the standard error is that of the points."""
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
    """Means over seeds; the standard error is that of the seeds, or of the points if there is one seed."""
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
matching? A first-order model is trained; from it training goes on with orders 1, 2 and 3 (exact derivatives, weights of
the paper) for the same number of steps, and with order 1 for as long as order 3 took. `make reproduce` runs all of it.

**Smaller than published.** The paper trains each order for 50,000 to 100,000 steps of batch 5000, with widths 128 and
512; here

| problem | steps: first order + more | batch | widths: branches and trunk | entropy of the data, nats |
|---|---|---|---|---|
{sizes}

Time starts at 1e-5, as in the paper. Evaluated on {test} test points, the same for all models; NLL and KL (of the data
from the model) by the ODE's exact likelihood, in nats. The distances between scores ([L22] Fig. 3), integrated over
time and in nats, too, are from {times} times with {points} points each: l_SM is what first-order training minimises,
l_Fisher the distance of the ODE's own score from the data's. The integral of Theorem 3.1 is the KL again, found from
scores alone, on other points. Entropies of the data are estimated from the model's score ([S21b] Theorem 4,
{entropy_points} points).
± is the standard error over seeds.

Command `make reproduce`, commit {commits}, {device}, a machine with other work: {minutes} minutes, {cpu} of CPU time.
ms/step are of that machine: only their ratios mean something.
"""

PATHS = """## Paths

Of the mixture, VE, under a third-order model: Euler's steps of the SDE and the ODE, in both directions, coloured by
where they are at t = 0.

![Paths](../images/synthetic_paths.png)
"""

SECTION = """## {title}

Seeds {seeds}.

| model | steps | ms/step | NLL | KL | l_SM | l_Fisher | Theorem 3.1 | entropy, E\\|s\\|² | entropy, -E div s |
|---|---|---|---|---|---|---|---|---|---|
{rows}

{lines}

By test points, each averaged over seeds, with the standard error of the points: {points}.

Of a single model, the points behind them leave a standard error of {own[cross]:.3f} nats in Theorem 3.1's integral, and
of {own[entropy_score]:.3f} and {own[entropy_divergence]:.3f} in the entropies. It is in common to all models.

![Densities](../images/synthetic_{name}_density.png)
![Distances between scores](../images/synthetic_{name}_distances.png)

The NLL of {starting} points of the data, taken to be at the time that the solve starts at ([L22] Fig. 6), above that of
the data's own density; shaded is the standard error over seeds:

![NLL against the start](../images/synthetic_{name}_starts.png)
"""
