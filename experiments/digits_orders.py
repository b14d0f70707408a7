"""Compares orders of score matching by bits/dim on the handwritten digits, and writes docs/results/digits.md.

For each seed, a first-order model is trained. Training then continues from this model with each order for the same
number of steps, and with the first order for as long as the third order took. All models are evaluated on the same test
images with the same dequantization noise and probes, so that differences are paired by image.

    python -m experiments.digits_orders --runs=runs/digits_orders

Each training and each evaluation is a call of main.py, whose command is printed. If the script is interrupted, run the
same command again to resume.
"""

import argparse
import math
import subprocess
import sys
from pathlib import Path

import numpy as np

from evaluation import MeanEstimate, mean_estimate
from experiments.main_calls import call_main, is_trained
from experiments.pages import Page, wrapped
from experiments.provenance import noted_commits, origin
from experiments.run_results import newest_result, seconds_per_step
from infra.commits import commit
from infra.results import bits_per_dim_of_images

PAGE = Page(Path("docs/results/digits.md"), ("results", "gradients", "provenance"))

SEEDS = (1, 2, 3)
BASE_STEPS, MORE_STEPS = 3000, 1000
CONTINUED_BATCH = 32
BRANCHES = {
    "order 1, equal steps": 1,
    "order 2, equal steps": 2,
    "order 3, equal steps": 3,
    "order 1, as long as order 3": 1,
}
EQUAL_TIME = "order 1, as long as order 3"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/digits_orders"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=PAGE.path, help="page to write")
    arguments = parser.parse_args()
    for seed in SEEDS:
        run_seed(seed, arguments.runs / f"seed{seed}")
    PAGE.write(page_parts(arguments.runs), arguments.out)


def run_seed(seed: int, folder: Path) -> None:
    """Trains and evaluates the base model of one seed and the models that continue from it."""
    base = folder / "base"
    common = [f"--config.seed={seed}"]
    call("train", base, *common, f"--config.training.n_iters={BASE_STEPS}")
    call("eval", base, *common, "--config.eval.enable_sampling=False")
    for name, order in BRANCHES.items():
        workdir = folder / slug(name)
        steps = steps_of(folder, name)
        settings = [
            *common,
            f"--config.training.score_matching_order={order}",
            f"--config.training.batch_size={CONTINUED_BATCH}",
            f"--config.training.init_from={base}",
            f"--config.training.n_iters={BASE_STEPS + steps}",
        ]
        call("train", workdir, *settings)
        call("eval", workdir, *settings, "--config.eval.enable_sampling=False")


def steps_of(folder: Path, name: str) -> int:
    """Returns the number of steps of a branch, for equal time from the speeds of the first and third order."""
    if name != EQUAL_TIME:
        return MORE_STEPS
    ratio = seconds_per_step(folder / slug("order 3, equal steps")) / seconds_per_step(
        folder / slug("order 1, equal steps")
    )
    return round(MORE_STEPS * ratio / 100) * 100


def call(mode: str, workdir: Path, *settings: str) -> None:
    """Calls main.py, unless the training that it asks for is complete."""
    if mode == "train" and is_trained(workdir, int(next(s.split("=")[1] for s in settings if "n_iters" in s))):
        return
    call_main("--config=configs/digits/ncsnpp.py", f"--workdir={workdir}", f"--mode={mode}", *settings)


def slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "_")


def page_parts(runs: Path) -> dict[str, str]:
    folders = {name: [runs / f"seed{seed}" / slug(name) for seed in SEEDS] for name in ("base", *BRANCHES)}
    evaluated = {name: [folder / "eval" for folder in each] for name, each in folders.items()}
    values = {
        name: [bits_per_dim_of_images(folder / newest_result(folder)["bpd"]["values"]) for folder in each]
        for name, each in evaluated.items()
    }
    rows = []
    for name, each in folders.items():
        steps = sorted({newest_result(folder)["checkpoint_step"] for folder in evaluated[name]})
        over_seeds = [float(np.mean(v)) for v in values[name]]
        cells = [
            "order 1 (the start)" if name == "base" else name,
            ", ".join(map(str, steps)),
            f"{np.mean([seconds_per_step(f) for f in each]):.3f}",
            ", ".join(f"{mean:.4f}" for mean in over_seeds),
            of_seeds(over_seeds),
            gain(values["base"], values[name]),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    paired = loss_over_seeds(values["order 1, equal steps"], values["order 3, equal steps"])
    timed = loss_over_seeds(values[EQUAL_TIME], values["order 3, equal steps"])
    noise_seed = SEEDS[0]
    noise = [gradient_noise(folders[name][0], noise_seed) for name in ("base", EQUAL_TIME)]
    results = RESULTS.format(
        rows="\n".join(rows),
        paired=paired,
        timed=timed,
        base=BASE_STEPS,
        more=MORE_STEPS,
        batch=CONTINUED_BATCH,
        seeds=", ".join(map(str, SEEDS)),
        images=len(values["base"][0]),
    )
    gradients = GRADIENTS.format(noise_seed=noise_seed, noise="\n\n".join(f"```\n{each}\n```" for each in noise))
    commits = noted_commits(folder for each in folders.values() for folder in each)
    return {
        "results": wrapped(results),
        "gradients": wrapped(gradients),
        "provenance": wrapped(origin("make digits-orders", {*commits, commit()})),
    }


def gradient_noise(workdir: Path, seed: int) -> str:
    """Returns a table with the signal and noise of each term's gradient at the newest checkpoint of a run."""
    settings = [f"--config.seed={seed}", f"--config.training.batch_size={CONTINUED_BATCH}", "--batches=150"]
    command = ["-m", "experiments.gradient_noise", "--config=configs/digits/ncsnpp.py", f"--workdir={workdir}"]
    done = subprocess.run([sys.executable, *command, *settings], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def gain(reference: list[np.ndarray], model: list[np.ndarray]) -> str:
    """Returns how much lower the bits/dim of `model` are, from differences of single images averaged over seeds."""
    return signed(mean_estimate(np.array(reference) - np.array(model)))


def loss_over_seeds(reference: list[np.ndarray], model: list[np.ndarray]) -> str:
    """Returns how much higher the bits/dim of `model` are, from the mean difference of each seed."""
    return signed(mean_estimate(np.mean(np.array(model) - np.array(reference), axis=1)))


def signed(difference: MeanEstimate) -> str:
    """Returns the difference with its sign and its standard error."""
    return f"{difference.mean:+.4f} ± {difference.se:.4f}"


def of_seeds(means: list[float]) -> str:
    estimate: MeanEstimate = mean_estimate(np.array(means))
    return f"{estimate.mean:.4f} ± {0.0 if math.isnan(estimate.se) else estimate.se:.4f}"


RESULTS = """
This page has bits/dim of the ODE on the {images} test images of scikit-learn's digits (8x8, 17 levels), with uniform
dequantization and one probe. A first-order model (VE, configs/digits/ncsnpp.py, {base} steps at batch 64) is trained
for {more} more steps at batch {batch} with each order, and with the first order for the time that the third order
took. The seeds are {seeds}.

| model | step | s/step | bits/dim of each seed | mean ± s.e. over seeds | below the start, ± s.e. over images |
|---|---|---|---|---|---|
{rows}

The third order has {paired} bits/dim more than the first at equal steps, and {timed} more at equal time. The
standard errors are over seeds.
"""

GRADIENTS = """
These tables show the gradient of each term for seed {noise_seed}, at the start and after the longest first-order
training (`python -m experiments.gradient_noise`):

{noise}
"""


if __name__ == "__main__":
    main()
