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
from experiments.pages import Page, wrapped
from experiments.provenance import origin
from experiments.synthetic import (
    BRANCHES,
    ENTROPY_POINTS,
    NUM_TIMES,
    POINTS_AT_TIME,
    STARTING_POINTS,
    STARTS,
    TEST_POINTS,
    TOLERANCE,
    Problem,
)
from experiments.synthetic_figures import distance_figure, start_figure, trajectories
from infra.files import read_npz, write_atomic
from report.density_figures import density_curves, density_maps
from report.figures import figure_png
from sources.densities import DENSITIES

PAGE = Page(Path("docs/results/synthetic.md"), ("setup", "provenance", "problems"))

LABELS = {
    "order1": "order 1",
    "order2": "order 2",
    "order3": "order 3",
    "continued3": "order 1, then order 3",
    "order1_long": "order 1, as long as order 3",
}

FLOOR = "exact score"
"""The label of the measurements with the score of the data in place of a model's."""

Models = dict[str, list[dict[str, Any]]]
"""The results of each model for all seeds, by the name of the model."""


def write_page(problems: Sequence[Problem], runs: Path, docs: Path) -> None:
    """Writes the page and the figures for all complete comparisons.

    Raises:
        FileNotFoundError: if there is none.
    """
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
    if not sections:
        raise FileNotFoundError(f"{runs} has no complete comparison; the page is not changed")
    minutes, cpu = (sum(each[kind] for each in took) / 60 for kind in ("wall", "cpu"))
    commits = {each["commit"] for each in took}
    provenance = f"{origin('make reproduce', commits)} It took {minutes:.0f} minutes, {cpu:.0f} of CPU time."
    texts = {"setup": setup(problems), "provenance": wrapped(provenance), "problems": wrapped("\n".join(sections))}
    PAGE.write(texts, docs / "results" / PAGE.path.name)


# --- text ---


def setup(problems: Sequence[Problem]) -> str:
    sizes = "\n".join(
        f"| {p.title} | {p.steps:,} | {p.batch_size} | {_widths(p.branch)} and {_widths(p.trunk)} | "
        f"{DENSITIES[p.dataset].entropy:.3f} |"
        for p in problems
    )
    text = SETUP.format(
        sizes=sizes,
        test=f"{TEST_POINTS:,}",
        times=NUM_TIMES,
        points=POINTS_AT_TIME,
        entropy_points=f"{ENTROPY_POINTS:,}",
        tolerance=TOLERANCE,
    )
    return wrapped(text)


def _widths(widths: Sequence[int]) -> str:
    return ", ".join(map(str, widths))


def section(problem: Problem, folders: Sequence[Path]) -> str:
    """Returns the section of one problem, with its tables, comparisons and figures."""
    models = {name: [json.loads((f / f"{name}.json").read_text()) for f in folders] for name in BRANCHES}
    floor = json.loads((folders[0].parent / "floor.json").read_text())
    points = "; ".join(f"{LABELS[b]} against {LABELS[a]} {of_points(folders, a, b)}" for a, b in COMPARED)
    own = {
        term: np.mean([result[term]["se"] for results in models.values() for result in results])
        for term in ("cross", "fisher", "entropy_score", "entropy_divergence")
    }
    paths = (folders[0] / "paths_order1.npz").exists()
    text = SECTION.format(
        title=problem.title,
        seeds=", ".join(folder.name.removeprefix("seed") for folder in folders),
        likelihoods=table(LIKELIHOODS, models, floor),
        errors=table(ERRORS, models, floor),
        sde=table(SDE_COLUMNS, models, floor) if "sde" in floor else "",
        entropies=table(ENTROPIES, models, floor),
        lines="\n".join(f"- {comparison(models, worse, better)}" for worse, better in COMPARED),
        points=points,
        own=own,
        name=problem.name,
        starting=STARTING_POINTS,
    )
    return text + (PATHS.format(name=problem.name) if paths else "")


COMPARED = (
    ("order1", "order2"),
    ("order2", "order3"),
    ("order1", "order3"),
    ("order1", "continued3"),
    ("order1_long", "order3"),
)

Column = tuple[str, str]
"""The header of a column, and the dotted path of its value in a result. A value may be an estimate with a `mean`."""

LIKELIHOODS: tuple[Column, ...] = (
    ("NLL", "nll"),
    ("KL", "kl"),
    ("Theorem 3.1", "cross"),
    ("l_SM", "score_matching"),
    ("l_Fisher", "fisher"),
    ("l_Diff", "difference"),
)
ERRORS: tuple[Column, ...] = (
    ("first (l_SM)", "score_matching"),
    ("second", "second"),
    ("third", "third"),
    ("source of first", "source_first"),
    ("source of second", "source_second"),
    ("source of third", "source_third"),
)
SDE_COLUMNS: tuple[Column, ...] = (
    ("KL of the ODE", "kl"),
    ("KL of the SDE", "sde.kl"),
    ("its bound", "sde.score_matching"),
    ("gap of the bound", "sde.gap"),
)
ENTROPIES: tuple[Column, ...] = (
    ("entropy, E\\|s\\|²", "entropy_score"),
    ("entropy, -E div s", "entropy_divergence"),
    ("variance of the loss, uniform times", "loss_variance.uniform"),
    ("with importance sampling", "loss_variance.importance"),
)


def table(columns: Sequence[Column], models: Models, floor: dict[str, Any]) -> str:
    """Returns a table with a row for each model, and one for the exact score."""
    headers = ["model", "steps", "ms/step", *(header for header, _ in columns)]
    rows = [headers, ["---"] * len(headers), *(table_row(name, models[name], columns) for name in BRANCHES)]
    exact = [value_at(floor, path) for _, path in columns]
    rows.append([FLOOR, "", "", *("" if value is None else f"{value:.3g}" for value in exact)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def table_row(name: str, results: list[dict[str, Any]], columns: Sequence[Column]) -> list[str]:
    steps = ", ".join(f"{step:,}" for step in sorted({r["step"] for r in results}))
    cost = f"{1e3 * np.median([r['seconds_per_step'] for r in results]):.1f}"
    return [LABELS[name], steps, cost, *(over_seeds([value_at(r, path) for r in results]) for _, path in columns)]


def value_at(result: dict[str, Any], path: str) -> float | None:
    """Returns the number at a dotted path, which may be the mean of an estimate; None if it does not exist."""
    value: Any = result
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value.get("mean") if isinstance(value, dict) else value


def over_seeds(values: Sequence[float | None], digits: int = 4) -> str:
    estimate = mean_estimate(np.array(values, np.float64))
    return plus_minus(estimate, digits).removesuffix(" (one seed)")  # the page says so above the table


def plus_minus(estimate: MeanEstimate, digits: int = 4, sign: str = "") -> str:
    error = f" ± {estimate.se:.{digits}f}" if estimate.n > 1 else " (one seed)"
    return f"{estimate.mean:{sign}.{digits}f}{error}"


def comparison(models: Models, worse: str, better: str) -> str:
    """States how much lower or higher one model's NLL is than another's, from the differences of the seeds."""
    fall = mean_estimate(np.array([a["kl"] - b["kl"] for a, b in zip(models[worse], models[better], strict=True)]))
    beyond = "" if fall.n == 1 else ", beyond" if abs(fall.mean) > 2 * fall.se else ", within"
    verdict = beyond and f"{beyond} two standard errors"
    size = plus_minus(fall._replace(mean=abs(fall.mean)))
    place = "below" if fall.mean > 0 else "above"
    return f'The NLL of "{LABELS[better]}" is {size} nats {place} that of "{LABELS[worse]}"{verdict}.'


def of_points(folders: Sequence[Path], worse: str, better: str) -> str:
    """Returns the change of the NLL with a standard error over test points, each averaged over seeds."""
    of_better, of_worse = (
        np.array([read_npz(folder / f"{name}.npz")["points_kl"] for folder in folders]) for name in (better, worse)
    )
    return plus_minus(mean_estimate(of_better - of_worse), sign="+")


# --- figures ---


def problem_figures(problem: Problem, folders: Sequence[Path]) -> dict[str, Figure]:
    arrays = {name: [read_npz(folder / f"{name}.npz") for folder in folders] for name in BRANCHES}
    curves = {LABELS[name]: averaged_curves(of_seeds) for name, of_seeds in arrays.items()}
    figures = {
        "density": density_figure(problem, arrays),
        "distances": distance_figure(curves),
        "starts": starts_figure(folders),
    }
    paths = {name: folders[0] / f"paths_{name}.npz" for name in ("order1", "order3")}
    if all(path.exists() for path in paths.values()):
        figures["paths"] = paths_figure({LABELS[name]: read_npz(path) for name, path in paths.items()})
    return figures


def starts_figure(folders: Sequence[Path]) -> Figure:
    models = {}
    for name in BRANCHES:
        of_seeds = [read_npz(folder / f"{name}.npz") for folder in folders]
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


def paths_figure(models: dict[str, dict[str, np.ndarray]]) -> Figure:
    kinds = {
        "ode_forward": "ODE, from the data",
        "ode_reverse": "ODE, from the prior",
        "sde_reverse": "SDE, from the prior",
    }
    panels = {f"{title}, {name}": arrays[kind] for kind, title in kinds.items() for name, arrays in models.items()}
    return trajectories(next(iter(models.values()))["t"], panels)


SETUP = """
Does a diffusion ODE get closer to the data when its score is trained with second and third-order denoising score
matching? As in the paper, a model of each order is trained from scratch, with exact derivatives and the weights of the
paper, for the same number of steps. In addition, one model of order 3 continues from the first order's half-way
checkpoint to the same number of steps, and one model of order 1 is trained for as long as order 3 took.
`make reproduce` runs all experiments; an interrupted run resumes.

**Smaller than published.** The paper trains each order for 50,000 to 100,000 steps of batch 5000, with widths 128 and
512. The experiments of this page have these sizes:

| problem | steps | batch | widths: branches and trunk | entropy of the data, nats |
|---|---|---|---|---|
{sizes}

The paper's network (`model.name=mlp_published`) sees time and points unscaled, has no nonlinearity on the joined
features, and starts from the uniform initialisation of PyTorch. Under VE, our network scales points and output by the
noise level.

Time starts at 1e-5, as in the paper. All models are evaluated on the same {test} test points. NLL, and KL(q || p) of
the data's density q and the model's p, come from the exact likelihood of the ODE, in nats. All distances between scores
are integrals over time in nats, from {times} times with {points} points each, with solves at tolerance {tolerance:g}:

- l_SM, l_Fisher and l_Diff compare two scores each, as in [L22] Fig. 3 and 7. l_SM compares the model with the data;
  first-order training minimises it. l_Fisher compares the ODE's own density with the data. l_Diff compares the model
  with the ODE's own density.
- "Theorem 3.1" is the integral of [L22] Theorem 3.1: a second estimate of the KL, from scores alone and on other
  points.
- "second" and "third" are the errors of the score's Jacobian and of the gradient of its trace. With e = s - grad ln q,
  they are the integrals over ln(sigma / alpha) of sigma^4 |grad e|^2 and sigma^6 |grad tr grad e|^2, as l_SM is the
  integral of sigma^2 |e|^2.
- The sources are the terms that drive the ODE's score away from the data's score; Theorem 3.2 bounds them. They are
  sigma^3 times |(grad^2 ln p) e|, |(grad e)^T grad ln q| and |grad tr grad e|, also integrated over ln(sigma / alpha)
  (analysis/score_distances.py).
- The bound on the KL of the SDE with the same score is l_SM plus the divergence from the prior, which is at most 1e-5
  nats. The KL is below this bound by the gap of [L22] App. C (analysis/sde_density.py).
- The entropies of the data are estimated from the model's score ([S21b] Theorem 4, {entropy_points} points). The
  variances are those of the likelihood-weighted first-order loss of an example, divided by the squared mean, with times
  drawn uniformly and by importance sampling ([S21b] Fig. 2).

± is the standard error over seeds, which few seeds do not determine well: at the 95 % level, a difference needs 12.7
standard errors with two seeds, and 4.3 with three. The row "exact score" has the score of the data in place of a
model's score. It is the floor of each measurement, which comes from the solvers and the prior.
"""

PATHS = """
Paths of the ODE and the SDE, coloured by their position at t = 0, under models of order 1 and 3 of the first seed:

![Paths](../images/synthetic_{name}_paths.png)
"""

SECTION = """## {title}

The seeds are {seeds}.

{likelihoods}

{lines}

Paired by test point and averaged over seeds, the changes of the NLL and their standard errors over points are:
{points}.

Errors of the three orders, and the sources of the ODE's error:

{errors}

{sde}

{entropies}

For a single model, the standard error over points is {own[cross]:.3f} nats for the integral of Theorem 3.1,
{own[fisher]:.3f} for l_Fisher, and {own[entropy_score]:.3f} and {own[entropy_divergence]:.3f} nats for the entropies.

![Densities](../images/synthetic_{name}_density.png)
![Distances between scores](../images/synthetic_{name}_distances.png)

The next figure shows the NLL of {starting} data points, minus the NLL under the data's own density, against the start
time of the solve. The points are taken to be at this start time ([L22] Fig. 6). The shaded area is the standard error
over seeds.

![NLL against the start](../images/synthetic_{name}_starts.png)
"""
