"""Compares the diagnostics of the demo's two models with the floor of the measurement: docs/results/diagnostics.md.

The floor is what the same code measures for an exact score, whose true distance and bias are 0: the score of a mixture
of ten Gaussians, one for the training images of each digit. Networks are rougher in time than this score. For them, the
error of the solver is measured as the change when the number of steps is doubled.

    python -m experiments.diagnostics --runs=runs

`make diagnostics` trains the models and runs --mode=diagnose before. If the script is interrupted, run the same command
again to resume.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from analysis.score_distances import TimeNodes, time_nodes
from arrays import Batch, ScoreFn, as_pytree
from build import Run, build
from configs.digits.ncsnpp import get_config
from datasets import data_reference, labels_of, source_from_config
from evaluation import mean_estimate
from evaluators.cache import Values
from evaluators.diagnostics import BY_TIME, errors_at_time, start_times
from evaluators.estimators import as_float64
from experiments.pages import Page, wrapped
from experiments.provenance import noted_commits, origin
from experiments.run_results import newest_result
from infra.commits import commit
from infra.console import one_line_errors
from infra.files import read_npz, write_atomic, write_npz
from infra.startup import set_up_compiler
from likelihood import GaussianReference, ode_log_likelihood, to_bits_per_dim
from report.diagnostics_figures import diagnostics_figure
from report.figures import figure_png
from report.run_files import read_runs
from sources.densities import GaussianMixture

PAGE = Page(Path("docs/results/diagnostics.md"), ("results", "provenance"))

MODELS = {"order 1": "order1", "order 1, 800 more steps": "order1_more", "order 3": "order3"}
"""Folders of the models, by their names on the page. The last two continue from the first by equally many steps."""

FINER = "diagnose_96_steps"
"""The folder of the diagnosis with 96 instead of 48 steps. It lies in the workdir of order 1."""

IMAGES = 64
"""Images behind the floor."""

SMALLEST_STD = 1 / 17
"""The standard deviation of the mixture's narrowest directions: one grey level."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the workdirs order1 and order3")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the page and the figure")
    arguments = parser.parse_args()
    set_up_compiler()
    run, folder = build(get_config()), arguments.runs / "diagnostics"
    try:
        floor = once(folder / "floor.npz", lambda: measure_floor(run))
    except KeyboardInterrupt:
        sys.exit("Interrupted. Run the same command again to resume.")
    results, finer = diagnoses(arguments.runs), finer_diagnosis(arguments.runs)
    models = {name: result["diagnostics"] for name, result in results.items()}
    write_atomic(arguments.docs / "images" / "diagnostics.png", figure_png(diagnostics_figure(models)))
    texts = {
        "results": results_part(run, arguments.runs, results, finer, floor),
        "provenance": provenance_part(arguments.runs, models, floor),
    }
    PAGE.write(texts, arguments.docs / "results" / PAGE.path.name)


def once(path: Path, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns the values in the file, or computes and writes them, with the time and the commit."""
    if not path.exists():
        started = time.monotonic()
        values = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_npz(path, **values, seconds=np.array(time.monotonic() - started), commit=np.array(commit()))
    return read_npz(path)


def diagnoses(runs: Path) -> dict[str, dict[str, Any]]:
    """Reads the newest diagnosis of each model.

    Raises:
        FileNotFoundError: if a model has none.
    """
    found = {}
    for name, run in zip(MODELS, read_runs(runs / folder for folder in MODELS.values()), strict=True):
        result = run.newest_result("diagnostics")[0]
        if result is None:
            raise FileNotFoundError(f"{runs / MODELS[name]} has no diagnosis: run main.py --mode=diagnose first")
        found[name] = result
    return found


def finer_diagnosis(runs: Path) -> dict[str, Any] | None:
    """Reads the diagnosis of the first model with twice as many steps, if there is one."""
    folder = runs / MODELS["order 1"] / FINER
    try:
        return newest_result(folder)["diagnostics"]
    except FileNotFoundError:
        return None


def mixture_of_digits(run: Run) -> GaussianMixture:
    """Fits a Gaussian to the training images of each digit, in the network's data space."""
    source = source_from_config(run.config, "train")
    indices = np.arange(len(source))
    x = (source.images(indices).reshape(len(source), -1) + 0.5) / run.config.data.levels
    labels = labels_of(source)
    classes = [x[labels == label] for label in range(10)]
    least = SMALLEST_STD**2 * np.eye(x.shape[1])
    return GaussianMixture(
        np.array([len(each) for each in classes]) / len(x),
        np.stack([each.mean(axis=0) for each in classes]),
        np.stack([np.cov(each.T) + least for each in classes]),
    )


def measure_floor(run: Run) -> dict[str, np.ndarray]:
    """Measures the curves of --mode=diagnose for the exact score of a mixture, and the errors of bits/dim by start.

    Bits/dim are solved with the exact divergence, so that their errors are those of the solver and the prior.

    Returns:
        Values of shape [images, times], and `bpd`, the errors, of shape [images, starts].
    """
    density, settings = mixture_of_digits(run), run.config.eval
    x0 = density.sample(jax.random.key(0), (IMAGES, *run.data_shape))
    score_fn = as_pytree(density.score_fn(run.sde))
    reference = reference_of(run)
    curves = curves_at_nodes(run, score_fn, x0, reference, settings.ode_steps)
    errors = []
    for start in starts_of(run):
        solved = ode_log_likelihood(
            score_fn,
            run.sde,
            x0,
            None,
            t_min=float(start),
            method=settings.ode_solver,
            num_steps=settings.ode_steps,
            reference=reference,
        )
        exact = density.log_density(run.sde, x0, jnp.full(len(x0), start))
        errors.append(to_bits_per_dim(np.asarray(exact - solved.logp, np.float64), density.dims))
    return curves | {"bpd": np.stack(errors, axis=1)}


def curves_at_nodes(
    run: Run, score_fn: ScoreFn, x0: Batch, reference: GaussianReference, num_steps: int
) -> dict[str, np.ndarray]:
    """Computes `BY_TIME` at each time of --mode=diagnose: [images, times]."""
    rows = []
    for number, t in enumerate(nodes_of(run).t):
        key = jax.random.fold_in(jax.random.key(2), number)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(len(x0)))
        rows.append(as_float64(errors_at_time(score_fn, run.sde, x0, t, keys, reference, num_steps=num_steps)))
    return {name: np.stack([row[name] for row in rows], axis=1) for name in BY_TIME}


def reference_of(run: Run) -> GaussianReference:
    data = run.config.data
    return data_reference(source_from_config(run.config, "train"), data.levels, data.levels, data.centered)


def nodes_of(run: Run) -> TimeNodes:
    return time_nodes(run.sde, run.config.training.smallest_time, run.config.eval.diagnose_times)


def starts_of(run: Run) -> Float[np.ndarray, " starts"]:
    return start_times(run.sde, run.config.training.smallest_time, run.config.eval.diagnose_starts)


# --- the page ---


def per_image(workdir: Path, diagnosis: Mapping[str, Any], name: str) -> Float[np.ndarray, "images times"]:
    """Reads the values of each image, at all times or start times, from the files of a diagnosis."""
    kind, places = ("start", diagnosis["starts"]) if name == "bpd" else ("time", diagnosis["times"])
    folder = next(workdir.glob(f"*/{diagnosis['values']}"))
    batches = range(len(list(folder.glob(f"batch*_{kind}0.npz"))))
    return np.concatenate(
        [
            np.stack([read_npz(folder / f"batch{b}_{kind}{number}.npz")[name] for number in range(len(places))], axis=1)
            for b in batches
        ]
    )


def shown(values: np.ndarray, digits: int, sign: str = "") -> str:
    """The mean over images and its standard error."""
    mean, se, _ = mean_estimate(values)
    return f"{mean:{sign}.{digits}f} ± {se:.{digits}f}"


def table(places: Sequence[float], columns: Sequence[np.ndarray], digits: Sequence[int]) -> str:
    """Returns rows of a table: the noise level, and the mean of each column of shape [images, places] with its error.

    Columns after the models have a sign.
    """
    lines = []
    for number, place in enumerate(places):
        cells = [
            shown(each[:, number], digit, "+" if position >= len(MODELS) else "")
            for position, (each, digit) in enumerate(zip(columns, digits, strict=True))
        ]
        lines.append(f"| {place:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def results_part(
    run: Run, runs: Path, results: Mapping[str, Mapping[str, Any]], finer: Mapping[str, Any] | None, floor: Values
) -> str:
    found = {name: result["diagnostics"] for name, result in results.items()}
    one, weight, dims = found["order 1"], nodes_of(run).weight, int(np.prod(run.data_shape))

    def compared(name: str) -> list[np.ndarray]:
        """Returns the values of each model, and the difference between the third and the second model."""
        each = [per_image(runs / MODELS[model], diagnosis, name) for model, diagnosis in found.items()]
        return [*each, each[2] - each[1]]

    bpd, difference = compared("bpd"), compared("difference")
    integrals = [to_bits_per_dim(each @ weight, dims) for each in (*difference, floor["difference"])]
    noise = one["log_noise_level"]
    first_steps, last_steps = (results[name]["checkpoint_step"] for name in ("order 1", "order 3"))
    text = RESULTS.format(
        images=one["n"],
        first_steps=f"{first_steps:,}",
        more_steps=last_steps - first_steps,
        steps=one["score_steps"],
        solver=SOLVER_NOT_MEASURED if finer is None else solver_section(runs, finer, difference[0], noise),
        bpd=table(one["start_log_noise_level"], [*bpd, floor["bpd"]], (4, 4, 4, 4, 5)),
        difference=table(noise, [*difference, floor["difference"]], (2, 2, 2, 2, 3)),
        first=table(noise, compared("first"), (4, 4, 4, 4)),
        trace=table(noise, [*compared("trace_bias"), floor["trace_bias"]], (3, 3, 3, 3, 3)),
        integrals=" | ".join(shown(each, 4, "+" if k >= len(MODELS) else "") for k, each in enumerate(integrals)),
    )
    return wrapped(text)


def provenance_part(runs: Path, models: Mapping[str, Mapping[str, Any]], floor: Values) -> str:
    commits = {*noted_commits(runs / folder for folder in MODELS.values()), str(floor["commit"]), commit()}
    took = ", ".join(f"{seconds(runs / MODELS[name], each):.0f} s ({name})" for name, each in models.items())
    return wrapped(
        f"{origin('make diagnostics', commits)} The diagnoses took {took}, and the floor took "
        f"{float(floor['seconds']):.0f} s."
    )


def solver_section(runs: Path, finer: Mapping[str, Any], difference: np.ndarray, noise: Sequence[float]) -> str:
    """Returns the text on the solver's error: the change of l_Diff of the first model with more steps."""
    more = per_image(runs / MODELS["order 1"], finer, "difference")
    change = more - difference[: len(more)]
    lines = [f"| {place:.2f} | {shown(change[:, number], 2, '+')} |" for number, place in enumerate(noise)]
    return SOLVER.format(steps=finer["score_steps"], images=len(more), rows="\n".join(lines))


def seconds(workdir: Path, diagnosis: Mapping[str, Any]) -> float:
    """The time that the solves of a diagnosis took, summed over all runs."""
    folder = next(workdir.glob(f"*/{diagnosis['values']}"))
    return sum(float(read_npz(path)["seconds"]) for path in folder.glob("*.npz"))


SOLVER = """A network is rougher in time than the exact score of the mixture, so its solves have a larger error. It is
measured as the change of l_Diff of order 1 with {steps} steps instead, for {images} images and paired by image:

| ln(sigma / alpha) | change |
|---|---|
{rows}"""

SOLVER_NOT_MEASURED = """\
A network is rougher in time than the exact score of the mixture. The error of its solves has not been measured yet."""

RESULTS = """
This page has the results of `--mode=diagnose` for the demo's two digits models (VE, configs/digits/ncsnpp.py): order 1
after {first_steps} steps, and order 3, which continues from it for {more_steps} steps of batch 32. "+{more_steps}" is
order 1 after {more_steps} further steps of batch 32. It shows the effect of more steps with the same order.
All values are means over the first {images} test images, with two probes. The models see the same images, noise and
probes, and the column "order 3 - (+{more_steps})" is paired by image. ± is the standard error over
images; the bands in the figure are plus and minus two standard errors. Each model was trained once. Each row of a table
is a noise level.

"Exact" is the floor of the measurement: the same code and the same steps, with the exact score of a known density. The
true value of this column is 0. The density is a mixture of ten Gaussians, one for each digit, with the means and
covariances of the training images, and the {images} images are samples of it.

![The models by noise level](../images/diagnostics.png)

## Bits/dim by start time ([L22] Fig. 6)

The images are used as x_t at the start time of the solve. The first row is what `--mode=eval` computes for these
images. The column "exact" has the error of the solve: its bits/dim, with the exact divergence, minus the bits/dim in
closed form.

| ln(sigma / alpha) at the start | order 1 | +{more_steps} | order 3 | order 3 - (+{more_steps}) | exact |
|---|---|---|---|---|---|
{bpd}

## Distance between the model's score and the score of its ODE ([L22] Fig. 7)

l_Diff(t) = g^2 / 2 E|s - grad ln p_t|^2 in nats per unit of time, unbiased by two probes, with {steps} steps from t.

| ln(sigma / alpha) | order 1 | +{more_steps} | order 3 | order 3 - (+{more_steps}) | exact |
|---|---|---|---|---|---|
{difference}

{solver}

The integrals over time, in bits/dim:

| order 1 | +{more_steps} | order 3 | order 3 - (+{more_steps}) | exact |
|---|---|---|---|---|
| {integrals} |

## First-order loss and bias of the trace

The first-order loss is |sigma s + z|^2 / d. Its smallest value is not 0.

| ln(sigma / alpha) | order 1 | +{more_steps} | order 3 | order 3 - (+{more_steps}) |
|---|---|---|---|---|
{first}

The trace's bias is (sigma^2 tr J + d - |sigma s + z|^2) / d, which has the mean 0 for the exact score.

| ln(sigma / alpha) | order 1 | +{more_steps} | order 3 | order 3 - (+{more_steps}) | exact |
|---|---|---|---|---|---|
{trace}
"""


if __name__ == "__main__":
    with one_line_errors():
        main()
