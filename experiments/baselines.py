"""Compares the alternatives to high-order score matching in the paper, and writes docs/results/baselines.md.

On the mixture in one dimension, a model of first order continues with each objective for the same number of steps:
first and second order denoising score matching, the second order of Meng et al., and the likelihood of the ODE through
its solver ([L22] App. F). Every model is evaluated on the same points.

    python -m experiments.baselines --runs=runs/baselines

If the script is interrupted, run the same command again to resume.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from build import build
from evaluation import mean_estimate
from experiments.pages import Page, wrapped
from experiments.provenance import origin
from experiments.reproduce import config_of, seconds_per_step, train
from experiments.synthetic import PROBLEMS, SEEDS, TEST_POINTS
from experiments.synthetic_measurements import density_of
from infra.commits import commit
from infra.files import read_npz, write_npz
from infra.startup import set_up_compiler
from likelihood import GaussianReference, ode_log_likelihood

PAGE = Page(Path("docs/results/baselines.md"), ("results", "provenance"))

PROBLEM = next(problem for problem in PROBLEMS if problem.name == "mixture_ve")
BASE_STEPS, MORE_STEPS = 2000, 600
SECOND_ORDER_WEIGHT = 0.5
"""The weight of the second order in configs/toy."""

OBJECTIVES: dict[str, dict[str, Any]] = {
    "denoising, order 1": {},
    "denoising, order 2": {"training.score_matching_order": 2},
    "order 2 of Meng et al.": {"training.objective": "meng"},
    "order 2 of Meng et al., a tenth of the weight": {
        "training.objective": "meng",
        "training.second_order_weight": SECOND_ORDER_WEIGHT / 10,
    },
    "likelihood through the solver": {"training.objective": "ode_likelihood"},
}
"""The fields of each objective."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/baselines"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=PAGE.path, help="page to write")
    arguments = parser.parse_args()
    set_up_compiler()
    try:
        for name in ("", *OBJECTIVES):  # the objective that takes longest is last
            for seed in SEEDS:
                train_and_evaluate(name, seed, arguments.runs / f"seed{seed}")
    except KeyboardInterrupt:
        sys.exit("Interrupted. Run the same command again to resume.")
    PAGE.write(page_parts(arguments.runs), arguments.out)


def train_and_evaluate(name: str, seed: int, folder: Path) -> None:
    """Trains and evaluates the model of an objective, or of the common start if `name` is empty, for one seed."""
    common = PROBLEM.settings(seed) | {"training.log_freq": 100, "training.snapshot_freq": 100}
    if not name:
        train(PROBLEM, folder / "base", common | {"training.n_iters": BASE_STEPS})
        return evaluate(folder / "base", BASE_STEPS, common)
    settings = common | OBJECTIVES[name]
    end = {"training.n_iters": BASE_STEPS + MORE_STEPS, "training.init_from": str(folder / "base")}
    train(PROBLEM, folder / slug(name), settings | end)
    evaluate(folder / slug(name), BASE_STEPS + MORE_STEPS, settings)


def slug(name: str) -> str:
    return name.replace(",", "").replace(".", "").replace(" ", "_")


def evaluate(workdir: Path, step: int, settings: dict[str, Any]) -> None:
    """Writes ln q - ln p of each test point for the model at this step, unless the file exists.

    If the training has diverged, the ODE cannot be solved, and the values are NaN.
    """
    path = workdir / "kl.npz"
    if path.exists():
        return
    run = build(config_of(PROBLEM, settings))
    density, fields = density_of(run), run.config.eval
    assert density.log_density_of_data is not None
    x = density.sample(jax.random.key(7), (TEST_POINTS, density.dims))
    score_fn = run.score_fn(run.load_state(workdir.absolute() / "checkpoints" / str(step)).ema_params)
    solver = {"method": fields.ode_solver, "num_steps": fields.ode_steps}
    reference, t_min = GaussianReference(0.0, float(jnp.std(x))), run.config.training.smallest_time
    result = ode_log_likelihood(score_fn, run.sde, x, None, t_min=t_min, reference=reference, **solver)
    values = np.asarray(density.log_density_of_data(x) - result.logp, np.float64)
    if not bool(result.info.success):
        print(f"{workdir}: the training has diverged", flush=True)
        values = np.full_like(values, np.nan)
    write_npz(path, kl=values, seconds_per_step=np.array(seconds_per_step(workdir)), commit=np.array(commit()))


def page_parts(runs: Path) -> dict[str, str]:
    folders = {"order 1 (the start)": "base", **{name: slug(name) for name in OBJECTIVES}}
    found = {
        name: {seed: read_npz(path) for seed in SEEDS if (path := runs / f"seed{seed}" / folder / "kl.npz").exists()}
        for name, folder in folders.items()
    }
    first, rows = found["denoising, order 1"], []
    for name, each in found.items():
        if not each:
            continue
        values = np.stack([one["kl"] for one in each.values()])
        compared = np.stack([first[seed]["kl"] for seed in each])
        milliseconds = f"{1000 * float(np.mean([one['seconds_per_step'] for one in each.values()])):.1f}"
        cells = [name, ", ".join(map(str, each)), *_kl_cells(values, compared), milliseconds]
        rows.append(f"| {' | '.join(cells)} |")
    commits = {str(one["commit"]) for each in found.values() for one in each.values()}
    results = RESULTS.format(rows="\n".join(rows), base=BASE_STEPS, more=MORE_STEPS, points=TEST_POINTS)
    return {"results": wrapped(results), "provenance": wrapped(origin("make baselines", commits))}


def _kl_cells(values: Float[np.ndarray, "seeds points"], first: Float[np.ndarray, "seeds points"]) -> list[str]:
    """The mean with its standard error, over seeds or over the points of one seed, and the difference from `first`."""
    diverged = int(np.sum(np.any(np.isnan(values), axis=1)))
    if diverged:
        return [f"diverged for {diverged} of {len(values)} seeds", ""]
    over = 1 if len(values) > 1 else 0  # a single seed has only the error over points
    over_seeds, paired = mean_estimate(values.mean(axis=over)), mean_estimate((values - first).mean(axis=over))
    same = np.array_equal(values, first)
    return [
        f"{over_seeds.mean:.4f} ± {over_seeds.se:.4f}",
        "" if same else f"{paired.mean:+.4f} ± {paired.se:.4f}",
    ]


RESULTS = """
A first-order model is trained for {base} steps on the mixture in one dimension (VE, configs/toy/mixture_ve.py with the
widths of experiments/synthetic.py). Training continues from it for {more} steps with each objective. The numbers are
estimates of KL(q || p) in nats on {points} points, where q is the density of the data and p the density of the model's
ODE. ± is the standard error over the seeds, or over the points if there is one seed. The fourth column is the
difference from the first order at equal steps, paired by seed or by point.

| objective | seeds | KL, nats | above order 1 | ms for a step |
| --- | --- | --- | --- | --- |
{rows}"""


if __name__ == "__main__":
    main()
