"""Repeats the experiments of NCSN at a size for one CPU core, and writes docs/results/ncsn.md and its figures.

It draws samples by Langevin dynamics with and without annealing: on two modes of unequal weights, with the exact score
and with trained networks, and on digits. On digits, it also varies the smallest noise level and the number of levels.
The ladders of a comparison take nearly equal numbers of steps.

    python -m experiments.ncsn --runs=runs/ncsn

Training is the same as --mode=train of main.py. If the script is interrupted, run the same command again to resume.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import run_lib
from arrays import ScoreFn
from build import Run, build
from configs.default import Config
from configs.digits import ncsn as digits
from configs.toy import far_modes_ve
from evaluators.samples import draw_images
from experiments.ncsn_cases import (
    IMAGE_CASES,
    IMAGE_STEPS,
    IMAGES,
    LONG_CASES,
    POINT_CASES,
    POINT_STEPS,
    POINTS,
    SAMPLING_SEEDS,
    TRAINING_SEEDS,
    Case,
)
from experiments.ncsn_page import write_page
from infra.commits import commit
from infra.files import write_npz
from infra.startup import set_up_compiler
from infra.workdir import Workdir
from sources.densities import GaussianMixture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/ncsn"), help="folder of the runs")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the page and figures")
    parser.add_argument("--page_only", action="store_true", help="write the page from the existing results")
    arguments = parser.parse_args()
    set_up_compiler()
    if not arguments.page_only:
        try:
            points_with_exact_score(arguments.runs)
            points_with_networks(arguments.runs)
            images(arguments.runs)
        except KeyboardInterrupt:
            sys.exit("Interrupted. Run the same command again to resume.")
    write_page(arguments.runs, arguments.docs)


def points_with_exact_score(runs: Path) -> None:
    run = build(far_modes_ve.get_config())
    density = run.density
    assert isinstance(density, GaussianMixture)
    exact = density.score_fn(run.sde)
    for case in (*POINT_CASES, *LONG_CASES):
        for seed in SAMPLING_SEEDS:
            draw_points(case, exact, seed, runs / "exact" / f"{case.name}_seed{seed}.npz")


def points_with_networks(runs: Path) -> None:
    for seed in TRAINING_SEEDS:
        config = far_modes_ve.get_config()
        config.seed = seed
        run, params = trained(config, runs / f"network_seed{seed}")
        for case in POINT_CASES:
            draw_points(case, run.score_fn(params), seed, runs / "network" / f"{case.name}_seed{seed}.npz")


def draw_points(case: Case, score_fn: ScoreFn, seed: int, path: Path) -> None:
    """Draws the points of one case and writes them, unless the file exists."""
    run = build(case.configure(far_modes_ve.get_config(), POINT_STEPS))
    numbers = jnp.arange(POINTS)
    write_once(path, lambda: np.asarray(run.sampler()(score_fn, jax.random.key(seed), numbers, run.data_shape).x))


def images(runs: Path) -> None:
    """Trains the model of digits, and draws its images."""
    _, params = trained(digits.get_config(), runs / "digits")
    for case in IMAGE_CASES:
        run = build(case.configure(digits.get_config(), IMAGE_STEPS))
        path = runs / "images" / f"{case.name}.npz"
        write_once(path, lambda run=run: draw_images(run, params, np.arange(IMAGES))[0])


def trained(config: Config, workdir: Path) -> tuple[Run, Any]:
    """Trains a model to its last step, unless that checkpoint exists. Returns the run and its averaged parameters."""
    run, path = build(config), workdir.absolute()
    if not (Workdir(path).checkpoints / str(config.training.n_iters)).is_dir():
        print(f"training {workdir}", flush=True)
        started = time.monotonic()
        run_lib.train(config, path)
        write_npz(path / "time.npz", seconds=np.array(time.monotonic() - started), commit=np.array(commit()))
    return run, run.load_state(path).ema_params


def write_once(path: Path, draw: Callable[[], np.ndarray]) -> None:
    """Writes the samples that `draw` returns, with its time and the commit, unless the file exists."""
    if path.exists():
        return
    started = time.monotonic()
    samples = draw()
    seconds = time.monotonic() - started
    print(f"{path}: {seconds:.0f} s", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_npz(path, samples=samples, seconds=np.array(seconds), commit=np.array(commit()))


if __name__ == "__main__":
    main()
