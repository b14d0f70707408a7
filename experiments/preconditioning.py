"""Compares preconditioned scores with the published ones on the digits, and writes docs/results/preconditioning.md.

    python -m experiments.preconditioning --runs=runs/preconditioning

For each seed, both models are trained from scratch with the same steps and batches. All models are evaluated on the
same test images with the same dequantization noise and probes, so that differences are paired by image. Each training
and each evaluation is a call of main.py, whose command is printed. If the script is interrupted, run the same command
again to resume.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from build import build
from configs.default import Config
from configs.digits import ncsnpp, preconditioned
from evaluation import mean_estimate
from experiments.main_calls import call_main, evaluate_once, is_trained
from experiments.noise_levels import BATCH, SIGMAS, Levels, measure_levels, read_levels
from experiments.pages import Page, wrapped
from experiments.provenance import noted_commits, origin
from experiments.run_results import newest_result, seconds_per_step
from infra.commits import commit
from infra.console import one_line_errors
from infra.files import write_atomic
from infra.results import bits_per_dim_of_images
from report.figures import colours, figure_png, style_panel

PAGE = Page(Path("docs/results/preconditioning.md"), ("results", "provenance"))

SEEDS = (1, 2, 3)
MODELS = {"published": ncsnpp.get_config, "preconditioned": preconditioned.get_config}
"""The configurations, by parameterization. Differences are from the first."""

FILES = {"published": "configs/digits/ncsnpp.py", "preconditioned": "configs/digits/preconditioned.py"}

LEVEL_BATCHES = 5
EVALUATIONS = {
    "eval": {"eval.likelihood_at": "both"},
    "eval_bound": {"eval.likelihood_at": "x_tmin", "eval.bound": True, "eval.enable_sampling": False},
}
"""Settings of the evaluations, by their folders."""

QUANTITIES = {
    "ODE at x": ("eval", "bpd"),
    "ODE at x_tmin": ("eval", "bpd_tmin"),
    "bound at x_tmin": ("eval_bound", "bpd_tmin"),
}
"""The folder and the part of the results of each quantity."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/preconditioning"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=PAGE.path, help="page to write")
    parser.add_argument("--page_only", action="store_true", help="write the page from the existing results")
    arguments = parser.parse_args()
    for seed in () if arguments.page_only else SEEDS:
        for name in MODELS:
            run_model(name, seed, folder_of(arguments.runs, name, seed))
    PAGE.write(page_parts(arguments.runs, arguments.out.parent.parent / "images"), arguments.out)


def folder_of(runs: Path, name: str, seed: int) -> Path:
    return runs / f"{name}_seed{seed}"


def config_of(name: str, seed: int) -> Config:
    config = MODELS[name]()
    config.seed = seed
    return config


def run_model(name: str, seed: int, workdir: Path) -> None:
    """Trains and evaluates one model, as far as this has not been done."""
    config = config_of(name, seed)
    if not is_trained(workdir, config.training.n_iters):
        call_main(*flags(name, workdir), f"--config.seed={seed}", "--mode=train")
    for folder, settings in EVALUATIONS.items():
        fields = [f"--config.{field}={value}" for field, value in {"seed": SEEDS[0], **settings}.items()]
        evaluate_once(workdir, folder, *flags(name, workdir), "--mode=eval", f"--eval_folder={folder}", *fields)
    measure_levels(config, workdir, LEVEL_BATCHES)


def flags(name: str, workdir: Path) -> tuple[str, str]:
    """Returns the flags of main.py for the configuration and the workdir of a model."""
    return f"--config={FILES[name]}", f"--workdir={workdir}"


def page_parts(runs: Path, images: Path) -> dict[str, str]:
    """Returns the page's parts. Writes its figure to `images`."""
    values = {name: {quantity: of_seeds(runs, name, quantity) for quantity in QUANTITIES} for name in MODELS}
    levels = {name: levels_of_seeds(runs, name) for name in MODELS}
    d = math.prod(build(config_of("published", SEEDS[0])).data_shape)
    write_atomic(images / "preconditioning.png", figure_png(levels_figure(levels, d)))
    first = next(iter(MODELS))
    commits = {*noted_commits(folder_of(runs, name, seed) for name in MODELS for seed in SEEDS), commit()}
    text = RESULTS.format(
        steps=config_of(first, SEEDS[0]).training.n_iters,
        seeds=", ".join(map(str, SEEDS)),
        images=values[first]["ODE at x"].shape[1],
        rows="\n".join(row(runs, name, values[name]) for name in MODELS),
        differences="\n".join(difference_rows(values)),
        levels="\n".join(level_rows(levels)),
        level_images=LEVEL_BATCHES * BATCH,
        floor=f"{1 / (2 * d):.4f}",
        solver=max(error for name in MODELS for error in solver_errors(runs, name)),
    )
    return {"results": wrapped(text), "provenance": wrapped(origin("make preconditioning", commits))}


def of_seeds(runs: Path, name: str, quantity: str) -> np.ndarray:
    """Returns bits/dim of shape [seeds, images]."""
    folder, part = QUANTITIES[quantity]
    folders = [folder_of(runs, name, seed) / folder for seed in SEEDS]
    return np.stack([bits_per_dim_of_images(each / newest_result(each)[part]["values"]) for each in folders])


def solver_errors(runs: Path, name: str) -> list[float]:
    """Returns the estimated errors of the solver at both points, of all seeds."""
    results = [newest_result(folder_of(runs, name, seed) / "eval") for seed in SEEDS]
    return [abs(result[part]["errors"]["solver_error"]) for result in results for part in ("bpd", "bpd_tmin")]


def levels_of_seeds(runs: Path, name: str) -> Levels:
    """Returns the terms at each noise level, averaged over the seeds' models."""
    each = [read_levels(folder_of(runs, name, seed)) for seed in SEEDS]
    return Levels(*(np.mean(term, axis=0) for term in zip(*each, strict=True)))


def row(runs: Path, name: str, values: dict[str, np.ndarray]) -> str:
    folders = [folder_of(runs, name, seed) for seed in SEEDS]
    fid = mean_estimate(np.array([newest_result(folder / "eval")["samples"]["fid"] for folder in folders]))
    cells = [
        name,
        f"{np.mean([seconds_per_step(folder) for folder in folders]):.3f}",
        *(over_seeds(each) for each in values.values()),
        over_seeds(values["ODE at x_tmin"] - values["bound at x_tmin"], "+"),
        f"{fid.mean:.3f} ± {fid.se:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def over_seeds(values: np.ndarray, sign: str = "") -> str:
    """Returns the mean over images and seeds, with the standard error over seeds."""
    estimate = mean_estimate(values.mean(axis=1))
    return f"{estimate.mean:{sign}.3f} ± {estimate.se:.3f}"


def difference_rows(values: dict[str, dict[str, np.ndarray]]) -> list[str]:
    """Returns a row for each quantity of the other models: the first model's bits/dim minus theirs.

    Differences are paired by seed and image.
    """
    first, *others = values
    rows = []
    for name in others:
        for quantity in QUANTITIES:
            gains = values[first][quantity] - values[name][quantity]
            by_image, by_seed = mean_estimate(gains.mean(axis=0)), mean_estimate(gains.mean(axis=1))
            cells = [name, quantity, f"{by_seed.mean:+.4f} ± {by_seed.se:.4f}", f"{by_image.se:.4f}"]
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def level_rows(levels: dict[str, Levels]) -> list[str]:
    first, *others = levels
    rows = []
    for number, sigma in enumerate(SIGMAS):
        cells = [f"{sigma:g}", *(f"{each.first[number].mean():.5f}" for each in levels.values())]
        for name in others:
            change = levels[name].change_from(levels[first])["first"][number]
            cells.append(f"{change.mean:+.1%} ± {change.se:.1%}")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def levels_figure(levels: dict[str, Levels], d: int) -> Figure:
    """Draws |u|^2 / d against the noise level for each model, and the floor of networks that see only directions."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    panel = figure.subplots()
    for colour, (name, each) in zip(colours(len(levels)), levels.items(), strict=True):
        panel.loglog(SIGMAS, each.first.mean(axis=1), "o-", color=colour, label=name, markersize=4)
    panel.axhline(1 / (2 * d), color="black", linewidth=0.8, linestyle=":", label="1 / (2 d)")
    style_panel(panel, "noise that the score leaves unexplained, |u|² / d", "noise level sigma", "")
    panel.legend(frameon=False, fontsize=8)
    return figure


RESULTS = """
Both models are NCSN++ with the VE SDE on scikit-learn's digits (8x8, 17 levels). The published score is the network's
output divided by sigma (configs/digits/ncsnpp.py). The preconditioned one adds it to the score of Gaussian data
(configs/digits/preconditioned.py). Each is trained for {steps} steps of first-order score matching with the seeds
{seeds}. Values are bits/dim of {images} test images with uniform dequantization. The gap is the ODE at x_tmin minus the
bound at x_tmin. FID compares features of a classifier, of 512 samples. ± is the standard error over seeds. By the
solver's own estimate, its error is at most {solver:.4f} bits/dim.

| score | s/step | ODE at x | ODE at x_tmin | bound at x_tmin | gap | FID |
|---|---|---|---|---|---|---|
{rows}

The reduction of bits/dim compared with the published score:

| score | | difference | its standard error over images |
|---|---|---|---|
{differences}

The next table has the noise |u|² / d, with u = z + sigma s, that the score leaves unexplained at single noise levels.
It is measured on {level_images} test images with the same noise, and averaged over the seeds' models. The last column
has the relative difference, with its error over images.

| sigma | published | preconditioned | difference |
|---|---|---|---|
{levels}

![Unexplained noise against the noise level](../images/preconditioning.png)

The dotted line is 1 / (2 d) = {floor}, below which a network that does not see the length of its input cannot come at
large noise levels.
"""


if __name__ == "__main__":
    with one_line_errors():
        main()
