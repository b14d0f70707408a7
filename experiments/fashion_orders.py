"""Compares orders of score matching by bits/dim on FashionMNIST, and writes docs/results/orders.md.

A first-order model is trained. Training continues from it with each objective of `BRANCHES` for the same number of
steps, and with the two controls K and C for as much arithmetic as the best branch. All models are evaluated on the same
images with the same noise, so that differences are paired by image. `verdict` has the rule, which was fixed before the
experiment.

    python -m experiments.fashion_orders --runs=runs/fashion_orders

The data must be prepared, see configs/fashion/ncsnpp.py. Each training and each evaluation is a call of main.py, whose
command is printed. The page is written again after each model. If the script is interrupted, run the same command again
to resume. --steps and --images make a short trial of the program.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from experiments.fashion_orders_page import PAGE, best_branch, page_parts
from experiments.fashion_orders_plan import (
    BRANCHES,
    CONFIG,
    CONTROLS,
    LEVEL_BATCHES,
    SEEDS,
    Plan,
    branch_config,
    gflop_per_step,
    likelihoods,
    long,
    objective,
    samples,
)
from experiments.main_calls import call_main, evaluate_once, is_trained
from experiments.noise_levels import measure_levels
from infra.console import one_line_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/fashion_orders"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=PAGE.path, help="page to write")
    parser.add_argument("--base_steps", type=int, default=12_000, help="steps of the first-order model")
    parser.add_argument("--steps", type=int, default=2000, help="steps of each branch")
    parser.add_argument("--images", type=int, default=256, help="test images and training images for bits/dim")
    parser.add_argument("--samples", type=int, default=2048, help="samples for each FID")
    parser.add_argument("--set", nargs="*", default=[], help="more settings for all calls, as training.batch_size=16")
    parser.add_argument("--page_only", action="store_true", help="write the page from the existing results")
    a = parser.parse_args()
    extra = tuple(f"--config.{setting}" for setting in a.set)
    plan = Plan(a.runs, a.base_steps, a.steps, a.images, a.samples, extra)

    def write_page() -> None:
        PAGE.write(page_parts(plan, a.out.parent.parent / "images"), a.out)

    if not a.page_only:
        run_all(plan, write_page)
    write_page()


def run_all(plan: Plan, after_each: Callable[[], None]) -> None:
    """Trains and evaluates everything. Samples come last, because the rule does not need them.

    Args:
        after_each: is called when the likelihoods of a model are there.
    """
    models: list[tuple[str, int]] = []

    def model(branch: str, seed: int, steps: int) -> None:
        train(plan, branch, seed, steps)
        evaluate(plan, branch, seed, likelihoods(plan))
        if seed == SEEDS[0]:
            measure_levels(branch_config(plan, branch), plan.folder(branch, seed), LEVEL_BATCHES)
        models.append((branch, seed))
        if branch != "base":
            after_each()

    model("base", SEEDS[0], plan.base_steps)
    for branch in BRANCHES:
        model(branch, SEEDS[0], plan.steps)
    best = best_branch(plan)
    for branch in (*CONTROLS, best):
        model(branch, SEEDS[1], plan.steps)
    for control in CONTROLS:
        model(long(control), SEEDS[0], equal_cost_steps(plan, control, best))
    for branch, seed in models:
        evaluate(plan, branch, seed, samples(plan))


def equal_cost_steps(plan: Plan, control: str, best: str) -> int:
    """Returns the number of steps in which a control does as much arithmetic as the best branch.

    The arithmetic is counted, because the seconds of a run depend on what else the machine does.
    """
    return max(round(plan.steps * gflop_per_step(plan, best) / gflop_per_step(plan, control)), 1)


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
        settings |= objective(branch)
    workdir = plan.folder(branch, seed)
    if not is_trained(workdir, steps):
        call_main(*call_arguments(plan, "train", workdir, settings))


def evaluate(plan: Plan, branch: str, seed: int, evaluations: Mapping[str, Mapping[str, object]]) -> None:
    """Makes the evaluations that are not there yet, given by their folders and settings. Resumes."""
    workdir = plan.folder(branch, seed)
    for folder, settings in evaluations.items():
        arguments = call_arguments(plan, "eval", workdir, {"seed": SEEDS[0]} | dict(settings))
        evaluate_once(workdir, folder, *arguments, f"--eval_folder={folder}")


def call_arguments(plan: Plan, mode: str, workdir: Path, settings: Mapping[str, object]) -> list[str]:
    """Returns the arguments of main.py."""
    return [f"--config={CONFIG}", f"--workdir={workdir}", f"--mode={mode}", *plan.fields(settings)]


if __name__ == "__main__":
    with one_line_errors():
        main()
