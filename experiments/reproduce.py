"""Runs the paper's synthetic experiments at a size for a CPU, and writes docs/results/synthetic.md and its figures.

For each of three problems and each seed, a first-order model is trained. Training then continues from this model with
orders 1, 2 and 3 for the same number of steps, and with order 1 for as long as order 3 took. Every model is evaluated
on the same points with the same noise, so that differences between models are paired.

    python -m experiments.reproduce --runs=runs/synthetic

Training and likelihoods are the modes train and eval of main.py, and the equivalent commands are printed. If the script
is interrupted, run the same command again to resume.
"""

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import run_lib
from analysis.entropy import FORMS, draw_entropy_noise, entropy
from analysis.ode_score import likelihood_by_start
from analysis.score_distances import distance_curves, time_nodes
from analysis.trajectories import ode_path, sde_path
from build import Run, build
from configs.default import Config
from evaluators.points import grid_points
from experiments.provenance import commit
from experiments.reproduce_page import write_page
from experiments.synthetic import (
    BRANCHES,
    ENTROPY_POINTS,
    NUM_TIMES,
    POINTS_AT_TIME,
    PROBLEMS,
    SEEDS,
    STARTING_POINTS,
    STARTS,
    TOLERANCE,
    Problem,
)
from infra.files import read_npz, write_atomic, write_npz
from likelihood import GaussianReference, ode_log_likelihood
from models.score import NetworkScore
from ode import require_success
from report.run_files import read_metrics
from sources.marginals import marginals_of, sample_at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/synthetic"), help="folder of the runs")
    parser.add_argument("--steps", type=float, default=1.0, help="factor on the numbers of steps, for a short trial")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the page and figures")
    parser.add_argument("--page_only", action="store_true", help="write the page from the existing results")
    arguments = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", ".cache/jax"))
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
        run_seed(problem, seed, folder)
        study_starts(problem, folder)
        save_paths(problem, folder, runs / "paths.npz")
        took = {"wall": time.monotonic() - started, "cpu": time.process_time() - cpu, "commit": commit()}
        write_atomic(folder / "seconds.json", json.dumps(took))
        print(f"{problem.title}, seed {seed}: {took['wall']:.0f} s, {took['cpu']:.0f} s of CPU time", flush=True)


def study_starts(problem: Problem, folder: Path) -> None:
    """Writes folder/<name>_starts.npz: ln q - ln p of points against the start time of the solve ([L22] Fig. 6)."""
    for name in BRANCHES:
        path = folder / f"{name}_starts.npz"
        if path.exists():
            continue
        run = build(config_of(problem, problem.settings(0)))
        step = json.loads((folder / f"{name}.json").read_text())["step"]
        workdir = folder / name.removesuffix("_long") / "checkpoints" / str(step)
        score_fn = run.score_fn(run.load_state(workdir).ema_params)
        density = run.density
        assert density is not None
        assert density.log_density_of_data is not None
        x = density.sample(jax.random.key(9), (STARTING_POINTS, density.dims))
        logp, info = likelihood_by_start(score_fn, run.sde, x, STARTS, rtol=TOLERANCE, atol=TOLERANCE)
        require_success(info)
        excess = np.asarray(density.log_density_of_data(x), np.float64) - np.asarray(logp, np.float64)
        write_npz(path, start=STARTS, excess=excess)


def done(folder: Path) -> bool:
    return (folder / "seconds.json").exists()


def run_seed(problem: Problem, seed: int, folder: Path) -> None:
    """Trains and evaluates the first-order model of a seed and the models that continue from it."""
    settings = problem.settings(seed)
    train(problem, folder / "base", settings | {"training.n_iters": problem.base})
    last = problem.base + problem.steps
    continued = settings | {"training.init_from": str(folder / "base"), "training.n_iters": last}
    for name in ("order3", "order2", "order1"):
        train(problem, folder / name, continued | {"training.score_matching_order": BRANCHES[name]})
        study(problem, folder, name, folder / name, last, continued)
    ratio = seconds_per_step(folder / "order3") / seconds_per_step(folder / "order1")
    longer = problem.base + max(problem.steps, round(problem.steps * ratio / 100) * 100)
    if not (folder / "order1_long.json").exists():
        train(problem, folder / "order1", continued | {"training.n_iters": longer}, at_least=longer - 500)
        step = max(steps_of(folder / "order1"))
        study(problem, folder, "order1_long", folder / "order1", step, continued)


def config_of(problem: Problem, settings: dict[str, Any]) -> Config:
    config = importlib.import_module(f"configs.toy.{problem.name}").get_config().lock()
    config.update_from_flattened_dict(settings)
    return config


def train(problem: Problem, workdir: Path, settings: dict[str, Any], at_least: int | None = None) -> None:
    """Trains to `training.n_iters`, unless a checkpoint of at least `at_least` steps exists."""
    if max(steps_of(workdir), default=0) >= (at_least or settings["training.n_iters"]):
        return
    print_command(problem, "train", workdir, settings)
    run_lib.train(config_of(problem, settings), workdir)


def steps_of(workdir: Path) -> list[int]:
    return [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]


def print_command(problem: Problem, mode: str, workdir: Path, settings: dict[str, Any]) -> None:
    flags = " ".join(f"'--config.{name}={value}'" for name, value in settings.items())
    print(
        f"python main.py --config=configs/toy/{problem.name}.py --mode={mode} --workdir={workdir} {flags}", flush=True
    )


def seconds_per_step(workdir: Path) -> float:
    """Returns the time of a step in the fastest record of a run. Slower records include compilation or other load."""
    rates = read_metrics(workdir / "train")["train"]["steps_per_second"].values
    return 1 / float(np.max(rates))


# --- evaluation ---


def study(problem: Problem, folder: Path, name: str, workdir: Path, step: int, settings: dict[str, Any]) -> None:
    """Writes folder/<name>.json and .npz: likelihoods, distances between scores, entropies and a density on a grid."""
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
    arrays |= {"density": density_on_grid(run, score_fn, problem), "points_kl": paired_kl(folder / name, nll["values"])}
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
    }
    write_atomic(path, json.dumps(result, indent=1))


def paired_kl(workdir: Path, values: str) -> np.ndarray:
    """Returns ln q - ln p of each test point."""
    batches = [read_npz(path) for path in sorted((workdir / "eval" / values).glob("batch*.npz"))]
    return np.concatenate([batch["log_density"] + batch["nll"] for batch in batches])


def distances_of(run: Run, score_fn: NetworkScore) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the integrals of the distances over time with standard errors, and the curves as arrays."""
    density, sde = run.density, run.sde
    assert density is not None
    marginals = marginals_of(density)
    assert marginals is not None
    nodes = time_nodes(sde, run.config.training.smallest_time, NUM_TIMES)
    curves = distance_curves(
        score_fn,
        sde,
        lambda t: sample_at(density, sde, jax.random.key(1), t),
        nodes,
        POINTS_AT_TIME,
        data_score=lambda x, t: marginals.score(sde, x, t),
        rtol=TOLERANCE,
        atol=TOLERANCE,
    )
    integrals = {name: curve.integral._asdict() for name, curve in curves.items()}
    arrays = {f"{name}_{part}": getattr(curve, part) for name, curve in curves.items() for part in ("mean", "se")}
    return integrals, arrays | {"nodes_t": nodes.t, "nodes_weight": nodes.weight}


def entropies_of(run: Run, score_fn: NetworkScore) -> dict[str, Any]:
    """Returns the entropy of the data at t_min in nats, from the model's score, for each form of the estimate."""
    density, t_min = run.density, run.config.training.smallest_time
    assert density is not None
    x0 = density.sample(jax.random.key(2), (ENTROPY_POINTS, density.dims))
    noise = draw_entropy_noise(jax.random.key(3), run.sde, x0.shape, t_min=t_min)
    return {
        f"entropy_{form}": entropy(score_fn, run.sde, x0, noise, t_min=t_min, form=form)._asdict() for form in FORMS
    }


def density_on_grid(run: Run, score_fn: NetworkScore, problem: Problem) -> np.ndarray:
    """Returns the density of the ODE at the points of the grid."""
    assert run.density is not None
    x = jnp.asarray(grid_points(problem.limit, problem.grid, run.density.dims))
    result = ode_log_likelihood(
        score_fn,
        run.sde,
        x,
        None,
        t_min=run.config.training.smallest_time,
        method="rk4_log",
        num_steps=50,
        reference=GaussianReference(0.0, 0.6 if run.density.dims == 1 else 2.3),
    )
    require_success(result.info)
    return np.exp(np.asarray(result.logp, np.float64))


def save_paths(problem: Problem, folder: Path, path: Path) -> None:
    """Writes paths of the SDE and the ODE of the first one-dimensional third-order model.

    The paths are divided by the standard deviation of x_t.
    """
    run = build(config_of(problem, problem.settings(SEEDS[0]) | {"training.score_matching_order": 3}))
    density, sde, paths = run.density, run.sde, 40
    assert density is not None
    if path.exists() or density.dims > 1:
        return
    checkpoint = folder / "order3" / "checkpoints" / str(problem.base + problem.steps)
    score_fn = run.score_fn(run.load_state(checkpoint).ema_params)
    t = jnp.linspace(run.config.training.smallest_time, sde.t_max, 801)
    data, prior = density.sample(jax.random.key(4), (paths, 1)), sde.prior_sample(jax.random.key(5), (paths, 1))
    drawn = {
        "sde_forward": sde_path(score_fn, sde, data, t, jax.random.key(6)),
        "ode_forward": ode_path(score_fn, sde, data, t),
        "sde_reverse": sde_path(score_fn, sde, prior, t[::-1], jax.random.key(7))[::-1],
        "ode_reverse": ode_path(score_fn, sde, prior, t[::-1])[::-1],
    }
    alpha, sigma = (np.asarray(a)[:, None] for a in sde.alpha_sigma(t))
    deviation = np.hypot(alpha * float(jnp.std(density.sample(jax.random.key(8), (10_000, 1)))), sigma)
    arrays = {name: (np.asarray(of_kind)[..., 0] / deviation)[::4] for name, of_kind in drawn.items()}
    write_npz(path, t=np.asarray(t)[::4], **arrays)


if __name__ == "__main__":
    main()
