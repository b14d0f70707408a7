"""What `make fashion-orders` found: the bits/dim of each image, the rule, and the page docs/results/orders.md."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from build import build
from evaluation import MeanEstimate, mean_estimate
from experiments.fashion_orders_plan import (
    BRANCHES,
    CONTROLS,
    LEVEL_BATCHES,
    SEEDS,
    TITLES,
    Plan,
    branch_config,
    gflop_per_step,
    likelihoods,
    long,
    samples,
)
from experiments.main_calls import is_evaluated
from experiments.noise_levels import BATCH, SIGMAS, Levels, levels_file, read_levels
from experiments.pages import Page, wrapped
from experiments.provenance import noted_commits, origin
from experiments.run_results import newest_result, seconds_per_step
from infra.commits import commit
from infra.metrics import read_metrics
from infra.results import bits_per_dim_of_images
from infra.workdir import Workdir
from report.figures import colours, style_panel

PAGE = Page(Path("docs/results/orders.md"), ("results", "provenance"))

SMALLEST_GAP = 0.02
"""Bits/dim. Below this gap of K there is nothing to close."""


@dataclasses.dataclass(frozen=True)
class Values:
    """Bits/dim of each image of one model."""

    ode_x: np.ndarray
    ode_tmin: np.ndarray
    bound: np.ndarray
    train_ode_tmin: np.ndarray
    train_bound: np.ndarray

    @property
    def gap(self) -> MeanEstimate:
        """The ODE at x_tmin minus the bound without start-time correction, paired by image."""
        return mean_estimate(self.ode_tmin - self.bound)


def values_of(plan: Plan, branch: str, seed: int) -> Values:
    folder = plan.folder(branch, seed)
    return Values(
        ode_x=per_image(folder / "eval", "bpd"),
        ode_tmin=per_image(folder / "eval", "bpd_tmin"),
        bound=per_image(folder / "eval_bound", "bpd_tmin"),
        train_ode_tmin=per_image(folder / "eval_train", "bpd_tmin"),
        train_bound=per_image(folder / "eval_train_bound", "bpd_tmin"),
    )


def per_image(folder: Path, part: str) -> np.ndarray:
    """Returns the bits/dim of each image in the newest evaluation in a folder."""
    return bits_per_dim_of_images(folder / newest_result(folder)[part]["values"])


# --- the rule ---


def helps(branch: Values, first: Values, weighted: Values) -> bool:
    """The rule, fixed beforehand.

    A branch helps if it beats K (first) and C (weighted) on the ODE at x_tmin by two standard errors, paired by image,
    if its gap is smaller than K's, and if its bound on training images is not worse than K's by two standard errors.
    """
    gains = [mean_estimate(control.ode_tmin - branch.ode_tmin) for control in (first, weighted)]
    loss = mean_estimate(branch.train_bound - first.train_bound)
    better = all(gain.mean > 2 * gain.se for gain in gains)
    return better and branch.gap.mean < first.gap.mean and loss.mean <= 2 * loss.se


def verdict(values: Mapping[str, Values], controls: tuple[str, str] = CONTROLS) -> str:
    """Applies the rule to the branches, compared with the two controls, and states the result."""
    first, weighted = (values[name] for name in controls)
    if first.gap.mean < SMALLEST_GAP:
        return (
            f"The gap of {controls[0]} is {first.gap.mean:.4f} ± {first.gap.se:.4f} bits/dim, below {SMALLEST_GAP}: "
            "there is nothing to close."
        )
    tested = [name for name in values if name not in (*CONTROLS, *controls, "base")]
    helping = [name for name in tested if helps(values[name], first, weighted)]
    gap = f"The gap of {controls[0]} is {first.gap.mean:.4f} ± {first.gap.se:.4f} bits/dim."
    return f"{gap} By the rule, {'these help: ' + ', '.join(helping) if helping else 'no branch helps'}."


# --- the page ---


def page_parts(plan: Plan, images: Path) -> dict[str, str]:
    """Returns the page's parts with the models evaluated so far, at least K. Writes its figure to `images`."""
    names, one = ["base", *BRANCHES, *map(long, CONTROLS)], SEEDS[0]
    cases = [(name, seed) for seed in SEEDS for name in names if seed == one or name != "base"]
    values = {case: values_of(plan, *case) for case in cases if has_likelihoods(plan, *case)}
    finished = [name for name, seed in values if seed == one]
    folders = {name: plan.folder(name, one) for name in finished}
    levels = {name: read_levels(folder) for name, folder in folders.items() if levels_file(folder).exists()}
    diverged = [name for name in finished if name != "base" and has_diverged(plan, name)]
    draw_figures(plan, [name for name in finished if name not in diverged], levels, images)
    missing = [name for name in names if (name, one) not in values]
    if sum(seed != one for _, seed in values) <= len(CONTROLS):
        missing.append("the second seed")
    text = RESULTS.format(
        base=plan.base_steps,
        steps=plan.steps,
        images=plan.images,
        samples=plan.samples,
        gap=SMALLEST_GAP,
        rows="\n".join(row(plan, *case) for case in values),
        levels=levels_text(levels),
        verdicts="\n".join(f"- {line}" for line in verdicts(plan, values)),
        diverged=f"Not drawn, because they diverged: {', '.join(diverged)}." if diverged else "",
        missing=f"Not finished: {', '.join(missing)}." if missing else "",
        solver=max(solver_error(plan, *case) for case in values),
    )
    command = f"python -m experiments.fashion_orders {plan.arguments}".strip()
    commits = {*noted_commits(plan.folder(*case) for case in values), commit()}
    return {"results": wrapped(text), "provenance": wrapped(origin(command, commits))}


def solver_error(plan: Plan, name: str, seed: int) -> float:
    """Returns the size of the estimated error of the ODE's bits/dim at x_tmin, by the solver."""
    return abs(newest_result(plan.folder(name, seed) / "eval")["bpd_tmin"]["errors"]["solver_error"])


def has_likelihoods(plan: Plan, name: str, seed: int) -> bool:
    return all(is_evaluated(plan.folder(name, seed) / folder) for folder in likelihoods(plan))


def has_diverged(plan: Plan, name: str) -> bool:
    """Returns whether the last first-order test loss of a branch is above 1.1 times the last one of K."""
    last = [test_curve(plan, each)[1][-1:] for each in (name, "K")]
    return bool(all(len(each) for each in last) and last[0][0] > 1.1 * last[1][0])


def test_curve(plan: Plan, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps and the first-order test losses of a branch."""
    curve = read_metrics(Workdir(plan.folder(name, SEEDS[0])).train).get("test", {}).get("first")
    return (np.asarray(curve.steps), np.asarray(curve.values)) if curve else (np.zeros(0), np.zeros(0))


def best_branch(plan: Plan) -> str:
    """Returns the best of the evaluated branches of orders 2 and 3, by the ODE at x_tmin."""
    high = [branch for branch in BRANCHES if branch not in CONTROLS and has_likelihoods(plan, branch, SEEDS[0])]
    return min(high, key=lambda branch: float(np.mean(values_of(plan, branch, SEEDS[0]).ode_tmin)))


def verdicts(plan: Plan, values: Mapping[tuple[str, int], Values]) -> list[str]:
    """Applies the rule at equal steps, with both seeds, and at equal arithmetic, as far as the models are there."""
    one = SEEDS[0]
    first, second = ({name: values[name, seed] for name in BRANCHES if (name, seed) in values} for seed in SEEDS)
    lines = []
    if all(control in first for control in CONTROLS):
        lines.append(f"Equal steps: {verdict(first)}")
    if len(second) > len(CONTROLS):
        (best,) = second.keys() - {*CONTROLS}
        lines.append(f"Equal steps, second seed, for {best}: {verdict(second)}")
    if all((long(control), one) in values for control in CONTROLS):
        best = best_branch(plan)
        longer = {control: values[long(control), one] for control in CONTROLS}
        lines.append(f"Equal arithmetic, for {best}: {verdict(longer | {best: values[best, one]})}")
    return lines


def row(plan: Plan, name: str, seed: int) -> str:
    values, folder = values_of(plan, name, seed), plan.folder(name, seed)
    against = values_of(plan, "K", seed)
    longer = {long(control): f"{control}, as much arithmetic as the best" for control in CONTROLS}
    title = (TITLES | longer | {"base": "the start"})[name]
    result = newest_result(folder / "eval")
    drawn = [folder / name for name in samples(plan)]
    fids = [f"{newest_result(each)['samples']['fid']:.3f}" if is_evaluated(each) else "" for each in drawn]
    cells = [
        name,
        title,
        str(seed),
        str(result["checkpoint_step"]),
        f"{gflop_per_step(plan, name):.1f}",
        f"{seconds_per_step(folder):.3f}",
        *(with_error(each) for each in (values.ode_x, values.ode_tmin, values.bound)),
        with_error(against.ode_tmin - values.ode_tmin, "+"),
        f"{values.gap.mean:+.4f} ± {values.gap.se:.4f}",
        *(with_error(each) for each in (values.train_ode_tmin, values.train_bound)),
        *fids,
    ]
    return f"| {' | '.join(cells)} |"


def with_error(values: np.ndarray, sign: str = "") -> str:
    estimate = mean_estimate(values)
    return f"{estimate.mean:{sign}.4f} ± {estimate.se:.4f}"


def levels_text(levels: Mapping[str, Levels]) -> str:
    """Returns the section about the noise levels; nothing if they have not been measured."""
    if "base" not in levels:
        return ""
    start, branches = levels["base"], [name for name in levels if name != "base"]
    changes = {name: levels[name].change_from(start) for name in branches}

    def rows(term: str, values: np.ndarray) -> str:
        cells = [
            [f"{each[term][n].mean:+.1%} ± {each[term][n].se:.1%}" for each in changes.values()]
            for n in range(len(SIGMAS))
        ]
        return "\n".join(
            f"| {sigma:g} | {value:.3g} | {' | '.join(row)} |"
            for sigma, value, row in zip(SIGMAS, values, cells, strict=True)
        )

    return LEVELS.format(
        images=LEVEL_BATCHES * BATCH,
        names=" | ".join(branches),
        lines="---|" * len(branches),
        first=rows("first", start.first.mean(axis=1)),
        second=rows("second", start.second.mean(axis=1)),
    )


def draw_figures(plan: Plan, names: list[str], levels: Mapping[str, Levels], images: Path) -> None:
    """Draws the first-order test loss against steps and arithmetic, and r and its change against the noise level."""
    figure = Figure(figsize=(11, 6.8), layout="constrained")
    (steps, arithmetic), (residuals, change) = figure.subplots(2, 2)
    branches = [name for name in names if name in BRANCHES]
    colour_of = dict(zip(branches, colours(len(branches)), strict=True))
    for name in (*branches, *(name for name in map(long, CONTROLS) if name in names)):
        branch = name.removesuffix("_long")  # A longer control has the colour of its control.
        colour, line = colour_of[branch], "o-" if name == branch else "s--"
        done, losses = test_curve(plan, name)
        steps.plot(done, losses, line, color=colour, label=name, markersize=4)
        arithmetic.plot(done * gflop_per_step(plan, name) / 1000, losses, line, color=colour, markersize=4)
        if BRANCHES[branch].get("first_order_weighting") == "residual":
            measured = measured_residuals(plan, name)
            residuals.loglog(*measured, line[1:], color=colour, label=name)
        if {name, "base"} <= levels.keys():
            estimates = levels[name].change_from(levels["base"])["first"]
            means, errors = (100 * np.array([getattr(each, part) for each in estimates]) for part in ("mean", "se"))
            change.errorbar(SIGMAS, means, errors, fmt=line, color=colour, markersize=4, capsize=2)
    style_panel(steps, "first-order test loss", "step", "")
    style_panel(arithmetic, "the same against arithmetic", "TFLOP", "")
    style_panel(residuals, "r(t) = E|u|² / d", "noise level", "")
    style_panel(change, "change of |u|² / d from the start, in %", "noise level", "")
    change.set_xscale("log")
    steps.legend(frameon=False, fontsize=8)
    if residuals.lines:
        residuals.legend(frameon=False, fontsize=8)
    images.mkdir(parents=True, exist_ok=True)
    figure.savefig(images / "orders.png", dpi=120)


def measured_residuals(plan: Plan, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns noise levels, and r there as the run measured it."""
    config, workdir = branch_config(plan, name), plan.folder(name, SEEDS[0])
    run = build(config)
    table = run.load_state(workdir).residuals
    if table is None:
        raise ValueError(f"the run {workdir} has not measured the residual")
    values = np.asarray(table.values())
    t_min = config.training.smallest_time
    t = t_min + (np.arange(len(values)) + 0.5) / len(values) * (1 - t_min)
    return np.asarray(run.sde.alpha_sigma(t.astype(np.float32))[1]), values


LEVELS = """
## Where the branches differ

The first-order term |u|² / d with u = z + sigma s at single noise levels, and its relative change from the start, on
{images} test images with the same noise for all models:

| sigma | start | {names} |
|---|---|{lines}
{first}

The second-order term, the mean of |sigma² J + I - u uᵀ|² / d² (its unbiased estimate):

| sigma | start | {names} |
|---|---|{lines}
{second}
"""

RESULTS = """
A first-order model (VE, configs/fashion/ncsnpp.py, {base} steps) is trained for {steps} more steps with each objective,
at a learning rate that falls from 3e-4 to 0, without clipping. Bits/dim are of {images} test and {images} training
images with uniform dequantization. The ODE is evaluated at x as published, and at x_tmin, where it compares with the
bound. The letters name the objectives of the table; K is order 1, the control. A branch is a training that continues
from the base. "Step" counts the steps of the base in its row, and the steps after the base in the other rows. r =
E|u|² / d with u = z + sigma s is the noise that a score leaves unexplained at a noise level. The gain is K's bits/dim
of the ODE at x_tmin minus the branch's, so positive is better. Values after ± are
standard errors over images; gains and gaps are paired by image. By the solver's own estimate, its error in the bits/dim
of the ODE at x_tmin is at most {solver:.4f}. FID compares features of a classifier, of {samples} samples.

| | objective | seed | step | GFLOP/step | s/step | ODE at x | ODE at x_tmin | bound | gain on K | gap | ODE, training images | bound, training images | FID, ODE | FID, SDE |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
{rows}

## The rule, and its verdict

The rule was fixed before the experiment. If K's gap, the ODE at x_tmin minus the bound, is below {gap}, there is nothing
to close. Otherwise a branch helps if it beats K and C on the ODE at x_tmin by two standard errors, its gap is smaller
than K's, and its bound on training images is not worse by two standard errors.

{verdicts}

{levels}

The seconds per step are medians of runs beside other work on the same machine. So equal time is compared by the
floating-point operations of a step, which are counted in its program.

![test loss against steps and arithmetic, and r and its change against the noise level](../images/orders.png)

{diverged}

{missing}
"""  # noqa: E501
