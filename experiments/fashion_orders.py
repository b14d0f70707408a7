"""Compares orders of score matching by bits/dim on FashionMNIST, and writes docs/results/orders.md.

A first-order model is trained. Training continues from it with each objective of `BRANCHES` for the same number of
steps, and with the two controls K and C for as much arithmetic as the best branch. All models are evaluated on the same
images with the same noise, so that differences are paired by image. `verdict` has the rule, which was fixed before the
experiment.

    python -m experiments.fashion_orders --runs=runs/fashion_orders

The data must be prepared, see configs/fashion/ncsnpp.py. Each training and each evaluation is a call of main.py, whose
command is printed. If the script is interrupted, run the same command again to resume. --steps and --images make a
short trial of the program.
"""

import argparse
import dataclasses
import functools
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from build import build
from configs.default import Config
from configs.fashion.ncsnpp import get_config
from evaluation import MeanEstimate, mean_estimate
from evaluators.step_cost import traced_step
from experiments.provenance import commit, machine
from infra.files import write_atomic
from infra.metrics import read_metrics
from infra.workdir import Workdir
from report.figures import colours, style_panel

RESIDUAL = {"first_order_weighting": "residual", "high_order_weighting": "residual"}
UNBIASED = {"high_order_estimator": "unbiased"}
BRANCHES: dict[str, dict[str, object]] = {
    "K": {},
    "C": {"first_order_weighting": "residual"},
    "2": {"score_matching_order": 2},
    "W": {"score_matching_order": 2, **RESIDUAL},
    "V2": {"score_matching_order": 2, **UNBIASED, **RESIDUAL},
    "3": {"score_matching_order": 3},
    "V3": {"score_matching_order": 3, **UNBIASED, **RESIDUAL},
}
"""Differences in `training` from the first branch, order 1. The cheapest come first.

C is the control for W, V2 and V3: the same weights of the first order, without the terms of orders 2 and 3."""

TITLES = {
    "K": "order 1",
    "C": "order 1, weighted by 1/r",
    "2": "order 2 as published",
    "W": "order 2, published terms, weights by r",
    "V2": "order 2, unbiased, weights by r",
    "3": "order 3 as published",
    "V3": "order 3, unbiased, weights by r",
}
CONTROLS = ("K", "C")
SEEDS = (1, 2)
SMALLEST_GAP = 0.02
"""Bits/dim. Below this gap of K there is nothing to close."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The size of the experiment."""

    runs: Path
    base_steps: int
    steps: int
    images: int
    samples: int
    extra: tuple[str, ...] = ()
    """More settings for all calls."""

    def folder(self, branch: str, seed: int) -> Path:
        return self.runs / "base" if branch == "base" else self.runs / f"{branch}_seed{seed}"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/fashion_orders"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("docs/results/orders.md"), help="page to write")
    parser.add_argument("--base_steps", type=int, default=12_000, help="steps of the first-order model")
    parser.add_argument("--steps", type=int, default=2000, help="steps of each branch")
    parser.add_argument("--images", type=int, default=256, help="test images and training images for bits/dim")
    parser.add_argument("--samples", type=int, default=2048, help="samples for each FID")
    parser.add_argument("--set", nargs="*", default=[], help="more settings for all calls, as training.batch_size=16")
    a = parser.parse_args()
    extra = tuple(f"--config.{setting}" for setting in a.set)
    plan, started = Plan(a.runs, a.base_steps, a.steps, a.images, a.samples, extra), time.time()
    best = run_all(plan)
    page = results_page(plan, best, a.out.parent.parent / "images", time.time() - started)
    write_atomic(a.out, page)
    print(a.out.read_text())


def run_all(plan: Plan) -> str:
    """Trains and evaluates everything, and returns the best branch: of orders 2 and 3, by the ODE at x_tmin.

    Samples come last, because the rule does not need them.
    """
    models: list[tuple[str, int]] = []

    def model(branch: str, seed: int, steps: int) -> None:
        train(plan, branch, seed, steps)
        evaluate(plan, branch, seed, likelihoods(plan))
        models.append((branch, seed))

    model("base", SEEDS[0], plan.base_steps)
    for branch in BRANCHES:
        model(branch, SEEDS[0], plan.steps)
    high = [branch for branch in BRANCHES if branch not in CONTROLS]
    best = min(high, key=lambda branch: float(np.mean(values_of(plan, branch, SEEDS[0]).ode_tmin)))
    for branch in (*CONTROLS, best):
        model(branch, SEEDS[1], plan.steps)
    for control in CONTROLS:
        model(long(control), SEEDS[0], equal_cost_steps(plan, control, best))
    for branch, seed in models:
        evaluate(plan, branch, seed, samples(plan))
    return best


def long(control: str) -> str:
    """Returns the name of the branch of a control that is trained for as long as the best branch."""
    return f"{control}_long"


def equal_cost_steps(plan: Plan, control: str, best: str) -> int:
    """Returns the number of steps in which a control does as much arithmetic as the best branch.

    The arithmetic is counted, because the seconds of a run depend on what else the machine does.
    """
    return max(round(plan.steps * gflop_per_step(best) / gflop_per_step(control)), 1)


@functools.cache
def gflop_per_step(branch: str) -> float:
    return traced_step(build(branch_config(branch)))[0]["gflop"]


def branch_config(branch: str) -> Config:
    config = get_config()
    config.training.update(BRANCHES.get(branch.removesuffix("_long"), {}))
    return config


def train(plan: Plan, branch: str, seed: int, steps: int) -> None:
    """Trains the base model, or continues from it with the learning rate falling linearly from 3e-4 to 0.

    No branch clips gradients, so that the limit does not decide between terms of different sizes.
    """
    settings = {"seed": seed, "training.n_iters": steps, "training.snapshot_freq": steps}
    if branch != "base":
        settings |= {
            "training.init_from": plan.folder("base", seed),
            "training.init_reset": "step",
            "optim.lr": 3e-4,
            "optim.schedule": "linear",
            "optim.warmup": 0,
            "optim.grad_clip": -1.0,
        }
        settings |= {f"training.{name}": value for name, value in BRANCHES[branch.removesuffix("_long")].items()}
    workdir = plan.folder(branch, seed)
    if not (Workdir(workdir).checkpoints / str(steps)).is_dir():
        call(plan, "train", workdir, settings)


def evaluate(plan: Plan, branch: str, seed: int, evaluations: Mapping[str, Mapping[str, object]]) -> None:
    """Makes the evaluations that are not there yet, given by their folders and settings. Resumes."""
    workdir = plan.folder(branch, seed)
    for folder, settings in evaluations.items():
        if not list((workdir / folder).glob("step_*[0-9].json")):
            call(plan, "eval", workdir, {"seed": SEEDS[0]} | dict(settings), f"--eval_folder={folder}")


def likelihoods(plan: Plan) -> dict[str, dict[str, object]]:
    """Returns the evaluations of bits/dim, of test and of training images."""
    common: dict[str, object] = {"eval.enable_sampling": False, "eval.max_examples": plan.images}
    bound: dict[str, object] = {"eval.bound": True, "eval.likelihood_at": "x_tmin"}
    train_split: dict[str, object] = {"eval.bpd_dataset": "train"}
    return {
        "eval": common | {"eval.likelihood_at": "both"},
        "eval_bound": common | bound,
        "eval_train": common | train_split | {"eval.likelihood_at": "x_tmin"},
        "eval_train_bound": common | train_split | bound,
    }


def samples(plan: Plan) -> dict[str, dict[str, object]]:
    """Returns the evaluations of FID, of samples of the ODE and of the SDE."""
    common: dict[str, object] = {
        "eval.enable_bpd": False,
        "eval.enable_sampling": True,
        "eval.num_samples": plan.samples,
    }
    return {
        "eval_ode_samples": common | {"sampling.eta": 0.0},
        "eval_sde_samples": common | {"sampling.eta": 1.0},
    }


def call(plan: Plan, mode: str, workdir: Path, settings: Mapping[str, object], *flags: str) -> None:
    """Calls main.py."""
    fields = [f"--config.{name}={value}" for name, value in settings.items()]
    command = ["main.py", "--config=configs/fashion/ncsnpp.py", f"--workdir={workdir}", f"--mode={mode}"]
    command += [*flags, *fields, *plan.extra]
    print("python", shlex.join(command), flush=True)
    subprocess.run([sys.executable, *command], check=True)


def seconds_per_step(workdir: Path) -> float:
    """Returns the median over the records of a run, without the first record, which includes the compilation."""
    rates = read_metrics(Workdir(workdir).train)["train"]["steps_per_second"].values
    return 1 / float(np.median(rates[1:] if len(rates) > 1 else rates))


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
    stored = folder / newest_result(folder)[part]["values"]
    batches = sorted(stored.glob("repeat0_batch*.npz"), key=lambda path: int(path.stem.split("batch")[1]))
    return np.concatenate([np.load(path)["bpd"] for path in batches]).astype(np.float64)


def newest_result(folder: Path) -> dict:
    paths = folder.glob("step_*[0-9].json")  # excludes the *_seconds.json files
    return json.loads(max(paths, key=lambda path: int(path.stem.split("_")[1])).read_text())


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


def results_page(plan: Plan, best: str, images: Path, seconds: float) -> str:
    names = ["base", *BRANCHES, *(long(control) for control in CONTROLS)]
    cases = [(name, SEEDS[0]) for name in names] + [(name, SEEDS[1]) for name in (*CONTROLS, best)]
    values = {name: values_of(plan, name, SEEDS[0]) for name in names}
    second = {name: values_of(plan, name, SEEDS[1]) for name in (*CONTROLS, best)}
    draw_figures(plan, names, images)
    return PAGE.format(
        base=plan.base_steps,
        steps=plan.steps,
        images=plan.images,
        samples=plan.samples,
        gap=SMALLEST_GAP,
        rows="\n".join(row(plan, name, seed) for name, seed in cases),
        verdict=verdict({name: values[name] for name in BRANCHES}),
        second=verdict(second),
        timed=verdict({**{name: values[long(name)] for name in CONTROLS}, best: values[best]}),
        best=best,
        commit=commit(),
        machine=machine(),
        minutes=round(seconds / 60),
    )


def row(plan: Plan, name: str, seed: int) -> str:
    values, folder = values_of(plan, name, seed), plan.folder(name, seed)
    against = values_of(plan, "K", seed)
    longer = {long(control): f"{control}, as much arithmetic as the best" for control in CONTROLS}
    title = (TITLES | longer | {"base": "the start"})[name]
    result = newest_result(folder / "eval")
    fids = [newest_result(folder / f"eval_{kind}_samples")["samples"]["fid"] for kind in ("ode", "sde")]
    cells = [
        name,
        title,
        str(seed),
        str(result["checkpoint_step"]),
        f"{gflop_per_step(name):.1f}",
        f"{seconds_per_step(folder):.3f}",
        *(with_error(each) for each in (values.ode_x, values.ode_tmin, values.bound)),
        with_error(against.ode_tmin - values.ode_tmin, "+"),
        f"{values.gap.mean:+.4f} ± {values.gap.se:.4f}",
        *(with_error(each) for each in (values.train_ode_tmin, values.train_bound)),
        *(f"{fid:.3f}" for fid in fids),
    ]
    return f"| {' | '.join(cells)} |"


def with_error(values: np.ndarray, sign: str = "") -> str:
    estimate = mean_estimate(values)
    return f"{estimate.mean:{sign}.4f} ± {estimate.se:.4f}"


def draw_figures(plan: Plan, names: list[str], images: Path) -> None:
    """Draws the first-order test loss against steps and time, and r against the noise level."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    steps, seconds, residuals = figure.subplots(1, 3)
    branches = [name for name in names if name != "base"]
    for colour, name in zip(colours(len(branches)), branches, strict=True):
        folder = Workdir(plan.folder(name, SEEDS[0]))
        curves = read_metrics(folder.train).get("test", {})
        if "first" in curves:
            steps.plot(curves["first"].steps, curves["first"].values, color=colour, label=name)
            seconds.plot(curves["seconds"].values, curves["first"].values, color=colour)
        if BRANCHES[name.removesuffix("_long")].get("first_order_weighting") == "residual":
            residuals.loglog(*measured_residuals(name, folder.path), color=colour, label=name)
    style_panel(steps, "first-order test loss", "step", "")
    style_panel(seconds, "the same against time", "seconds", "")
    style_panel(residuals, "r(t) = E|u|² / d", "noise level", "")
    steps.legend(frameon=False, fontsize=8)
    residuals.legend(frameon=False, fontsize=8)
    images.mkdir(parents=True, exist_ok=True)
    figure.savefig(images / "orders.png", dpi=120)


def measured_residuals(name: str, workdir: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns noise levels, and r there as the run measured it."""
    config = branch_config(name)
    run = build(config)
    table = run.load_state(workdir).residuals
    if table is None:
        raise ValueError(f"the run {workdir} has not measured the residual")
    values = np.asarray(table.values())
    t_min = config.training.smallest_time
    t = t_min + (np.arange(len(values)) + 0.5) / len(values) * (1 - t_min)
    return np.asarray(run.sde.alpha_sigma(t.astype(np.float32))[1]), values


PAGE = """# Orders of score matching on FashionMNIST

A first-order model (VE, configs/fashion/ncsnpp.py, {base} steps) is trained for {steps} more steps with each objective,
at a learning rate that falls from 3e-4 to 0, without clipping. Bits/dim are of {images} test and {images} training
images with uniform dequantization. The ODE is evaluated at x as published, and at x_tmin, where it compares with the
bound. The gain is K's bits/dim of the ODE at x_tmin minus the branch's, so positive is better. Values after ± are
standard errors over images; gains and gaps are paired by image. FID compares features of a classifier, of {samples}
samples.

| | objective | seed | step | GFLOP/step | s/step | ODE at x | ODE at x_tmin | bound | gain on K | gap | ODE, training images | bound, training images | FID, ODE | FID, SDE |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
{rows}

## The rule, and its verdict

The rule was fixed before the experiment. If K's gap, the ODE at x_tmin minus the bound, is below {gap}, there is nothing
to close. Otherwise a branch helps if it beats K and C on the ODE at x_tmin by two standard errors, its gap is smaller
than K's, and its bound on training images is not worse by two standard errors.

- Equal steps: {verdict}
- Equal steps, second seed, for {best}: {second}
- Equal arithmetic, for {best}: {timed}

The seconds per step are medians of runs beside other work on the same machine. So equal time is compared by the
floating-point operations of a step, which are counted in its program.

![test loss against steps and time, and r against the noise level](../images/orders.png)

Command `make fashion-orders`, commit {commit}, {machine}. The last call took {minutes} minutes; an interrupted run
resumes.
"""  # noqa: E501


if __name__ == "__main__":
    main()
