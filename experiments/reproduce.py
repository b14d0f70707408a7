"""Runs the paper's synthetic experiments at a size for a CPU, and writes docs/results/synthetic.md and its figures.

For each problem and each seed, models of orders 1, 2 and 3 are trained from scratch for the same number of steps, one
of order 3 continues from the first order's half-way checkpoint, and one of order 1 is trained for as long as order 3
took. Every model is evaluated on the same points with the same noise, so that differences between models are paired.

    python -m experiments.reproduce --runs=runs/synthetic

Training and likelihoods are the modes train and eval of main.py, and the equivalent commands are printed. If the script
is interrupted, run the same command again to resume.
"""

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import run_lib
from analysis.trajectories import ode_path, sde_path
from build import build
from configs.default import Config
from evaluation import mean_estimate
from experiments.main_calls import newest_step
from experiments.reproduce_page import write_page
from experiments.synthetic import BRANCHES, PROBLEMS, SEEDS, STARTS, TEST_POINTS, Problem
from experiments.synthetic_measurements import (
    data_score,
    density_of,
    density_on_grid,
    distances_of,
    entropies_of,
    excess_by_start,
    loss_variances,
    sde_of,
)
from infra.commits import commit
from infra.console import one_line_errors
from infra.files import read_npz, write_atomic, write_npz
from infra.startup import set_up_compiler
from likelihood import GaussianReference, ode_log_likelihood
from report.run_files import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/synthetic"), help="folder of the runs")
    parser.add_argument("--steps", type=float, default=1.0, help="factor on the numbers of steps, for a short trial")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the page and figures")
    parser.add_argument("--page_only", action="store_true", help="write the page from the existing results")
    arguments = parser.parse_args()
    set_up_compiler()
    problems = [problem.scaled(arguments.steps) for problem in PROBLEMS]
    if not arguments.page_only:
        try:
            run_all(problems, arguments.runs)
        except KeyboardInterrupt:
            sys.exit("Interrupted. Run the same command again to resume.")
    write_page(problems, arguments.runs, arguments.docs)


def run_all(problems: list[Problem], runs: Path) -> None:
    """Trains and evaluates missing comparisons, seed by seed, so that early results cover all problems."""
    left = [(seed, p) for seed in SEEDS for p in problems if not done(runs / p.name / f"seed{seed}")]
    minutes = sum(problem.minutes for _, problem in left)
    print(f"{len(left)} comparisons left, about {minutes:.0f} minutes on an idle CPU core", flush=True)
    for seed, problem in left:
        started, cpu = time.monotonic(), time.process_time()
        folder = runs / problem.name / f"seed{seed}"
        study_floor(problem, runs / problem.name)
        run_seed(problem, seed, folder)
        save_paths(problem, folder)
        took = {"wall": time.monotonic() - started, "cpu": time.process_time() - cpu, "commit": commit()}
        write_atomic(folder / "seconds.json", json.dumps(took))
        print(f"{problem.title}, seed {seed}: {took['wall']:.0f} s, {took['cpu']:.0f} s of CPU time", flush=True)


def done(folder: Path) -> bool:
    return (folder / "seconds.json").exists()


def run_seed(problem: Problem, seed: int, folder: Path) -> None:
    """Trains and evaluates the models of a seed."""
    settings, half = problem.settings(seed), problem.steps // 2
    for name in ("order1", "order2", "order3", "continued3"):
        own: dict[str, Any] = {"training.score_matching_order": BRANCHES[name], "training.n_iters": problem.steps}
        if name == "continued3":
            own["training.init_from"] = str(folder / "order1" / "checkpoints" / str(half))
        train(problem, folder / name, settings | own)
        study(problem, folder, name, folder / name, problem.steps, settings)
    if not (folder / "order1_long.json").exists():
        longer = equal_time_steps(problem, folder)
        train(problem, folder / "order1", settings | {"training.n_iters": longer})
        study(problem, folder, "order1_long", folder / "order1", longer, settings)


def equal_time_steps(problem: Problem, folder: Path) -> int:
    """Returns the steps of order 1 that take as long as the run of order 3.

    The number is written to the folder, because the longer run changes what its records say about the time of a step.
    """
    path = folder / "longer.json"
    if not path.exists():
        ratio = seconds_per_step(folder / "order3") / seconds_per_step(folder / "order1")
        longer = round(problem.steps * min(max(ratio, 1), 8) / 100) * 100  # other work can disturb the ratio
        write_atomic(path, json.dumps(longer))
    return json.loads(path.read_text())


def study_floor(problem: Problem, folder: Path) -> None:
    """Writes floor.json: the measurements with the exact score of the data in place of a model's."""
    path = folder / "floor.json"
    if path.exists():
        return
    run = build(config_of(problem, problem.settings(0)))
    exact = data_score(run)
    density, t_min, config = density_of(run), run.config.training.smallest_time, run.config.eval
    assert density.log_density_of_data is not None
    x = density.sample(jax.random.key(7), (TEST_POINTS, density.dims))
    reference = GaussianReference(0.0, float(jnp.std(x)))
    solver = {"method": config.ode_solver, "num_steps": config.ode_steps, "reference": reference}
    result = ode_log_likelihood(exact, run.sde, x, None, t_min=t_min, **solver)
    result.info.require_success()
    kl = mean_estimate(np.asarray(density.log_density_of_data(x) - result.logp, np.float64))
    measured = {"kl": kl._asdict(), **distances_of(run, exact)[0], **entropies_of(run, exact), **sde_of(run, exact)}
    write_atomic(path, json.dumps(measured, indent=1))


def config_of(problem: Problem, settings: dict[str, Any]) -> Config:
    config = importlib.import_module(f"configs.toy.{problem.name}").get_config().lock()
    config.update_from_flattened_dict(settings)
    return config


def train(problem: Problem, workdir: Path, settings: dict[str, Any]) -> None:
    """Trains to `training.n_iters`. Does nothing if the run is at this step or beyond."""
    if newest_step(workdir) >= settings["training.n_iters"]:
        return
    print_command(problem, "train", workdir, settings)
    run_lib.train(config_of(problem, settings), workdir)


def print_command(problem: Problem, mode: str, workdir: Path, settings: dict[str, Any]) -> None:
    flags = " ".join(f"'--config.{name}={value}'" for name, value in settings.items())
    print(
        f"python main.py --config=configs/toy/{problem.name}.py --mode={mode} --workdir={workdir} {flags}", flush=True
    )


def seconds_per_step(workdir: Path) -> float:
    """Returns the seconds per step of the fastest record of a run. Slower records include compilation or other work."""
    rates = read_metrics(workdir / "train")["train"]["steps_per_second"].values
    return 1 / float(np.max(rates))


# --- evaluation ---


def study(problem: Problem, folder: Path, name: str, workdir: Path, step: int, settings: dict[str, Any]) -> None:
    """Writes folder/<name>.json and .npz: all measurements and a density on a grid."""
    path = folder / f"{name}.json"
    if path.exists():
        return
    settings = settings | {"training.init_from": "", "training.score_matching_order": BRANCHES[name]}
    checkpoint = workdir / "checkpoints" / str(step)
    evaluation = settings | {"eval.checkpoint": str(checkpoint)}
    print_command(problem, "eval", folder / name, evaluation)
    config = config_of(problem, evaluation)
    run_lib.evaluate(config, folder / name, "eval")
    (nll_path,) = (folder / name / "eval").glob(f"{step}_*[0-9a-f].json")
    nll = json.loads(nll_path.read_text())["nll"]
    run = build(config)
    score_fn = run.score_fn(run.load_state(checkpoint).ema_params)
    distances, arrays = distances_of(run, score_fn)
    arrays |= {
        "density": density_on_grid(run, score_fn, problem),
        "points_kl": paired_kl(folder / name, nll["values"]),
        "start": STARTS,
        "excess": excess_by_start(run, score_fn),
    }
    write_npz(folder / f"{name}.npz", **arrays)
    result = {
        "step": step,
        "seconds_per_step": seconds_per_step(workdir),
        "nll": nll["mean"],
        "nll_se": nll["se"],
        "kl": nll["kl"]["mean"],
        "solver_error": nll.get("solver_error"),
        "nfe": nll["nfe"],
        **distances,
        **entropies_of(run, score_fn),
        **sde_of(run, score_fn),
        **loss_variances(run, score_fn),
    }
    write_atomic(path, json.dumps(result, indent=1))


def paired_kl(workdir: Path, values: str) -> np.ndarray:
    """Returns ln q - ln p of each test point."""
    batches = [read_npz(path) for path in sorted((workdir / "eval" / values).glob("batch*.npz"))]
    return np.concatenate([batch["log_density"] + batch["nll"] for batch in batches])


def save_paths(problem: Problem, folder: Path) -> None:
    """Writes paths_<name>.npz: paths of the SDE and the ODE of two models in one dimension, for the first seed.

    The paths are divided by the standard deviation of x_t.
    """
    run, paths = build(config_of(problem, problem.settings(SEEDS[0]))), 40
    density, sde = density_of(run), run.sde
    if density.dims > 1 or folder.name != f"seed{SEEDS[0]}":
        return
    t = jnp.linspace(run.config.training.smallest_time, sde.t_max, 801)
    data, prior = density.sample(jax.random.key(4), (paths, 1)), sde.prior_sample(jax.random.key(5), (paths, 1))
    alpha, sigma = (np.asarray(a)[:, None] for a in sde.alpha_sigma(t))
    deviation = np.hypot(alpha * float(jnp.std(density.sample(jax.random.key(8), (10_000, 1)))), sigma)
    for name in ("order1", "order3"):
        checkpoint = folder / name / "checkpoints" / str(problem.steps)
        score_fn = run.score_fn(run.load_state(checkpoint).ema_params)
        drawn = {
            "sde_forward": sde_path(score_fn, sde, data, t, jax.random.key(6)),
            "ode_forward": ode_path(score_fn, sde, data, t),
            "sde_reverse": sde_path(score_fn, sde, prior, t[::-1], jax.random.key(7))[::-1],
            "ode_reverse": ode_path(score_fn, sde, prior, t[::-1])[::-1],
        }
        arrays = {kind: (np.asarray(path)[..., 0] / deviation)[::4] for kind, path in drawn.items()}
        write_npz(folder / f"paths_{name}.npz", t=np.asarray(t)[::4], **arrays)


if __name__ == "__main__":
    with one_line_errors():
        main()
