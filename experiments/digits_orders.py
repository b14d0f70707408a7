"""Which order of score matching serves bits/dim best on the handwritten digits: docs/results/digits.md.

For each seed a first-order model is trained; from it training goes on with each order for the same number of steps,
and with the first order for as long as the third order took. All are evaluated on the same test images with the same
dequantization noise and probes, so that differences are taken image by image.

    python -m experiments.digits_orders --runs=runs/digits_orders

Every step is a plain call of main.py, logged as pasted. Interrupted and started again, it goes on.
"""

import argparse
import json
import math
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from evaluation import MeanEstimate, mean_estimate
from experiments.provenance import commit, machine
from infra.files import write_atomic

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
    parser.add_argument("--runs", type=Path, default=Path("runs/digits_orders"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/digits.md"))
    arguments = parser.parse_args()
    started = time.time()
    for seed in SEEDS:
        run_seed(seed, arguments.runs / f"seed{seed}")
    write_atomic(arguments.out, results_page(arguments.runs, time.time() - started))
    print(arguments.out.read_text())


def run_seed(seed: int, folder: Path) -> None:
    """The base model of one seed, its continuations, and their evaluations."""
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
    """The steps a continuation takes; at equal time, in proportion to the speeds of the first and third order."""
    if name != EQUAL_TIME:
        return MORE_STEPS
    ratio = seconds_per_step(folder / slug("order 3, equal steps")) / seconds_per_step(
        folder / slug("order 1, equal steps")
    )
    return round(MORE_STEPS * ratio / 100) * 100


def seconds_per_step(workdir: Path) -> float:
    """The median over the records of a run, the first, which holds the compilation, left out."""
    records = [json.loads(line) for line in (workdir / "train" / "metrics.jsonl").read_text().splitlines()]
    rates = [r["steps_per_second"] for r in records if r["split"] == "train"][1:]
    return 1 / float(np.median(rates))


def call(mode: str, workdir: Path, *settings: str) -> None:
    command = ["main.py", "--config=configs/digits/ncsnpp.py", f"--workdir={workdir}", f"--mode={mode}", *settings]
    if mode == "train" and finished(workdir, settings):
        return
    print("python", shlex.join(command), flush=True)
    subprocess.run([sys.executable, *command], check=True)


def finished(workdir: Path, settings: tuple[str, ...]) -> bool:
    """Whether the run's last checkpoint is there; a run that is can be asked nothing more."""
    last = next(s.split("=")[1] for s in settings if "n_iters" in s)
    return (workdir / "checkpoints" / last).is_dir()


def slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "_")


def bits_per_dim_of_images(workdir: Path) -> np.ndarray:
    """Bits/dim of each test image at the run's newest evaluation."""
    result = newest_result(workdir)
    folder = workdir / "eval" / result["bpd"]["values"]
    parts = sorted(folder.glob("repeat0_batch*.npz"), key=lambda p: int(p.stem.split("batch")[1]))
    return np.concatenate([np.load(p)["bpd"] for p in parts])


def newest_result(workdir: Path) -> dict:
    paths = (workdir / "eval").glob("step_*[0-9].json")  # without those of the seconds
    return json.loads(max(paths, key=lambda p: int(p.stem.split("_")[1])).read_text())


def results_page(runs: Path, seconds: float) -> str:
    folders = {name: [runs / f"seed{seed}" / slug(name) for seed in SEEDS] for name in ("base", *BRANCHES)}
    values = {name: [bits_per_dim_of_images(f) for f in each] for name, each in folders.items()}
    rows = []
    for name, each in folders.items():
        steps = sorted({newest_result(f)["checkpoint_step"] for f in each})
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
    paired = gain(values["order 1, equal steps"], values["order 3, equal steps"])
    timed = gain(values[EQUAL_TIME], values["order 3, equal steps"])
    noise_seed = SEEDS[0]
    noise = [gradient_noise(folders[name][0], noise_seed) for name in ("base", EQUAL_TIME)]
    return PAGE.format(
        noise_seed=noise_seed,
        noise="\n\n".join(noise),
        rows="\n".join(rows),
        paired=paired,
        timed=timed,
        base=BASE_STEPS,
        more=MORE_STEPS,
        batch=CONTINUED_BATCH,
        seeds=", ".join(map(str, SEEDS)),
        commit=commit(),
        minutes=round(seconds / 60),
        machine=machine(),
        images=len(values["base"][0]),
    )


def gradient_noise(workdir: Path, seed: int) -> str:
    """Signal and noise of each term's gradient at a run's newest checkpoint."""
    settings = [f"--config.seed={seed}", f"--config.training.batch_size={CONTINUED_BATCH}", "--batches=150"]
    command = ["-m", "experiments.gradient_noise", "--config=configs/digits/ncsnpp.py", f"--workdir={workdir}"]
    done = subprocess.run([sys.executable, *command, *settings], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def gain(reference: list[np.ndarray], model: list[np.ndarray]) -> str:
    """By how much the model's bits/dim are lower, from the differences of single images, each averaged over seeds."""
    difference = mean_estimate(np.array(reference) - np.array(model))
    return f"{difference.mean:+.4f} ± {difference.se:.4f}"


def of_seeds(means: list[float]) -> str:
    estimate: MeanEstimate = mean_estimate(np.array(means))
    return f"{estimate.mean:.4f} ± {0.0 if math.isnan(estimate.se) else estimate.se:.4f}"


PAGE = """# Orders of score matching on handwritten digits

Bits/dim of the ODE on the {images} test images of scikit-learn's digits (8x8, 17 levels), uniform dequantization, one
probe. A first-order model (VE, configs/digits/ncsnpp.py, {base} steps at batch 64) is continued for {more} steps at
batch {batch} with each order, and with the first order for the time that the third took. Seeds {seeds}.

| model | step | s/step | bits/dim of each seed | mean ± s.e. over seeds | below the start, ± s.e. over images |
|---|---|---|---|---|---|
{rows}

Third against first order, image by image (positive: the third order is better):
at equal steps {paired} bits/dim, at equal time {timed} bits/dim.

## Why

The gradient of each term at the start and after the longest first-order training, of seed {noise_seed}
(`python -m experiments.gradient_noise`):

```
{noise}
```

The published normalisation divides the terms by up to d^3. In 64 dimensions the first second-order term and the
third-order one are left with a hundredth of the first order's gradient or less: order 3 is order 2 for all that matters
here. The second-order trace has a gradient of the first order's size. At the start it points much the same way, so it
tells little that is new, and its noise adds to that of the first order; later its signal, too, is small against its
noise. At one learning rate that is a noisier first-order step. The runs of the paper start from first-order models
trained for a hundred times as long, where the error that first-order steps can still remove is small; that is not
tested here.

Command `make digits-orders`, commit {commit}, {machine}; the last call took {minutes} minutes (it resumes).
Times are of a shared machine: only their ratios mean something.
"""


if __name__ == "__main__":
    main()
