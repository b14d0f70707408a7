"""The tables of evaluations on the page: losses, likelihoods, sample quality."""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from evaluation import mean_estimate
from infra.results import bits_per_dim_of_images
from report.content import Block, Note, Table
from report.fields import Field, Result, field, run_and_file
from report.figures import TITLES
from report.formatting import MISSING, duration, estimate, number, small_error, whole_number, with_error
from report.run_files import RunFiles


def losses_over_test_set(runs: Sequence[RunFiles]) -> list[Block]:
    """The losses over all test images, from evaluations with `eval.enable_loss`."""
    stored = {name for result in _results_with("loss", runs) for name in result["loss"]}
    fields = [field(title, name, show=estimate) for name, title in TITLES.items() if name in stored]
    return _table("loss", fields, runs, "Losses over all test images")


def bits_per_dim(runs: Sequence[RunFiles]) -> list[Block]:
    """The likelihoods of images."""
    tables: list[Block] = []
    for part, place in _PLACES.items():
        terms = dict.fromkeys(name for result in _results_with(part, runs) for name in result[part].get("terms", {}))
        term_fields = [field(name.replace("_", " "), f"terms.{name}", show=estimate) for name in terms]
        tables += [
            *_table(part, _BITS_PER_DIM, runs, "" if part == "bpd" else f"Bits/dim {place}"),
            *_table(part, term_fields, runs, f"Terms in bits/dim {place}".strip()),
            *_table(part, _LIKELIHOOD_SETTINGS, runs, f"Settings of the likelihood {place}".strip()),
        ]
    warnings = [note for part in _PLACES for note in _warnings(part, runs)]
    return [*tables, *_gaps(runs), Note(_ABOUT_BITS_PER_DIM), *warnings] if tables else []


_PLACES = {"bpd": "", "bpd_tmin": "at x_tmin"}
"""The parts of an evaluation with bits/dim, and where they were evaluated."""


def _gaps(runs: Sequence[RunFiles]) -> list[Block]:
    """The bits/dim of the ODE minus the bound for the same images, dequantization, parameters, place and start time."""
    rows = []
    for run, (part, place) in itertools.product(runs, _PLACES.items()):
        results = [result for result in run.results if part in result]
        odes = [result for result in results if "bound" not in result[part]]
        bounds = [result for result in results if _bounds_the_same(result[part], part)]
        for ode, bound in itertools.product(odes, bounds):
            if _compared_by(ode, part) == _compared_by(bound, part):
                step, gap = number(ode["checkpoint_step"]), _gap(run, ode, bound, part)
                rows.append([run.name, step, place or "at x", _estimator(ode[part]), gap])
    headers = ["run", "step", "evaluated", "ODE", "ODE minus bound"]
    return [Table(headers, rows, "Gap between the ODE and the bound, bits/dim")] if rows else []


def _gap(run: RunFiles, ode: Result, bound: Result, part: str) -> str:
    """The difference of the means, and its standard error over images unless the values of the images are missing."""
    difference = f"{ode[part]['mean'] - bound[part]['mean']:+.4f}"
    try:
        values, bounds = (_of_images(run, result, part) for result in (ode, bound))
        return f"{difference} ± {mean_estimate(values - bounds).se:.4f}"
    except (KeyError, OSError, ValueError):
        return difference


def _of_images(run: RunFiles, result: Result, part: str) -> Float[np.ndarray, " images"]:
    """Reads the bits/dim of each image, as means over the repeats."""
    folder = (run.folder / result["file"]).parent / result[part]["values"]
    return np.mean([bits_per_dim_of_images(folder, repeat) for repeat in range(result[part]["repeats"])], axis=0)


def _bounds_the_same(part: Result, name: str) -> bool:
    """Returns whether this is a bound at the place of this part. A bound at x needs the start-time correction."""
    return "bound" in part and (part["num_starts"] > 0) == (name == "bpd")


def _compared_by(result: Result, part: str) -> list[object]:
    names = ("data", "dequantization", "dequantizer", "tau", "t_min", "n", "importance_samples")
    of_part = (result[part].get(name) for name in names)
    return [result["checkpoint_step"], result.get("parameters"), *of_part]


def nats(runs: Sequence[RunFiles]) -> list[Block]:
    """The likelihoods of points."""
    tables = [
        *_table("nll", _NATS, runs),
        *_table("nll", _LIKELIHOOD_SETTINGS, runs, "Settings of the likelihood"),
    ]
    return [*tables, Note(_ABOUT_NATS), *_warnings("nll", runs)] if tables else []


def sample_quality(runs: Sequence[RunFiles]) -> list[Block]:
    """FID, IS and KID."""
    table = _table("samples", _SAMPLE_QUALITY, runs)
    return [
        *table,
        *([Note("IS: mean ± standard deviation over splits. KID: mean ± standard error.")] if table else []),
        *_warnings("samples", runs),
    ]


def latent_codes(runs: Sequence[RunFiles]) -> list[Block]:
    """Returns a table of the errors of reconstructions."""
    table = _table("latents", _LATENT_CODES, runs, "Latent codes")
    return [*table, Note(_ABOUT_LATENT_CODES)] if table else []


def conditional_samples(runs: Sequence[RunFiles]) -> list[Block]:
    """Returns tables of the errors of images that were partly known, and of the share with the wanted class."""
    tables = [table for part in CONDITIONAL for table in _table(part, _CONDITIONAL, runs, part.capitalize())]
    return [
        *tables,
        *([Note(_ABOUT_CONDITIONAL)] if tables else []),
        *_table("classes", _CLASSES, runs, "Samples of classes"),
    ]


CONDITIONAL = ("inpainting", "colorization", "restoration")
"""The parts of an evaluation with images that were partly known."""


def _warnings(part: str, runs: Sequence[RunFiles]) -> list[Block]:
    """The warnings in this part of the evaluations, each once."""
    warnings = dict.fromkeys(result[part].get("warning") for result in _results_with(part, runs))
    return [Note(f"{warning}.", "warning") for warning in warnings if warning]


def _results_with(part: str, runs: Sequence[RunFiles]) -> list[Result]:
    return [result for run in runs for result in run.results if part in result]


def _table(part: str, fields: Sequence[Field], runs: Sequence[RunFiles], title: str = "") -> list[Block]:
    """A table with a row for each evaluation that has this part, and the fields of the part. Empty without any."""
    results = _results_with(part, runs)
    if not results or not fields:
        return []
    checkpoint = [*run_and_file(results, several_runs=len(runs) > 1), *_CHECKPOINT]
    headers = [each.header for each in (*checkpoint, *fields)]
    rows = [
        [*(each.show(result) for each in checkpoint), *(each.show(result[part]) for each in fields)]
        for result in results
    ]
    return [Table(headers, rows, title)]


# --- columns ---


def _interval(ends: Sequence[float | None] | None) -> str:
    return f"{ends[0]:.4f} to {ends[1]:.4f}" if ends and None not in ends else MISSING


def _estimator(part: Result) -> str:
    """The solver or bound that computed a likelihood, with its settings."""
    settings = [f"{name} {part[name]:.0e}" for name in ("rtol", "atol") if name in part]
    settings += [f"{part['steps']} steps"] if "steps" in part else []
    if "bound" in part:
        settings += [f"{part['num_times']} times, {part['num_starts']} start draws"]
    estimator = f"{part['bound']} bound of the SDE" if "bound" in part else number(part.get("solver"))
    return ", ".join([estimator, *settings])


def _probes(part: Result) -> str:
    return " ".join(number(part[name]) for name in ("num_probes", "probe") if name in part) or MISSING


def _dequantization(part: Result) -> str:
    return number(part.get("dequantization")) + (f", cut at {part['tau']:.3g}" if "tau" in part else "")


_CHECKPOINT = [
    field("order", "order"),
    field("step", "checkpoint_step"),
    field("weights", "ema", show=lambda ema: MISSING if ema is None else "averaged" if ema else "last"),
]

_COSTS = [field("NFE", "nfe", show=whole_number), field("time", "seconds", show=duration)]
_SPEED = field("images/s", "images_per_second")  # in the fastest batch, which does not compile

_BITS_PER_DIM = [
    Field("bits/dim", estimate),
    field("95 % interval", "ci95", show=_interval),
    field("images", "n"),
    field("repeats", "repeats"),
    field("error of repeats", "se_over_repeats", show=small_error),
    field("error of the solver", "errors.solver_error", show=small_error),
    field("error of probes", "errors.probe_error", show=small_error),
    field("error of sampling", "errors.sampling_error", show=small_error),
    *_COSTS,
    _SPEED,
]
_ABOUT_BITS_PER_DIM = (
    "The value after ± is the standard error over images; the repeats of an image are averaged first. That of the gap "
    "is the error of the mean difference between the two values of an image. All errors are estimates in bits/dim. The "
    "error of the solver is a bias of the mean. The other errors are standard errors of the mean: of the random "
    "probes, of the times and noise that a bound samples, and over repeats. If the error of the solver is far below "
    "the others, a finer solve does not make the result more accurate."
)

_NATS = [
    Field("NLL, nats", estimate),
    field("KL to the data, nats", "kl", show=estimate),
    field("entropy of the data, nats", "entropy"),
    field("points", "n"),
    field("error of the solver", "solver_error", show=small_error),
    *_COSTS,
]
_ABOUT_NATS = (
    "The value after ± is the standard error over points. KL is the mean over points of ln q - ln p, where q is the "
    "density of the data and p that of the model. The spread of ln q does not contribute to its error."
)

_LIKELIHOOD_SETTINGS = [
    Field("estimator", _estimator),
    field("smallest time", "t_min"),
    Field("probes", _probes),
    Field("dequantization", _dequantization),
    field("importance samples", "importance_samples"),
    field("data", "data"),
]

_SAMPLE_QUALITY = [
    field("FID", "fid"),
    field("FID features", "fid_features"),
    field("IS", "is_mean", "is_std", show=with_error),
    field("KID", "kid_mean", "kid_se", show=with_error),
    field("samples", "n"),
    field("sampler", "sampler"),
    *_COSTS,
    _SPEED,
    field("compared with", "statistics_data"),
]

_LATENT_CODES = [
    field("error of reconstruction", "reconstruction_error", show=small_error),
    field("largest error", "largest_error", show=small_error),
    field("pixels with another level", "changed_levels", show=small_error),
    field("variance of latents", "latent_variance"),
    field("images", "n"),
    field("tolerance", "rtol"),
    *_COSTS,
    field("data", "data"),
]
_ABOUT_LATENT_CODES = (
    "Images are encoded by the ODE and decoded again. The error is the root mean square difference between image and "
    "its reconstruction, in units of the range of the data. The largest error is the maximum over single pixels. The "
    "variance of latents is relative to the prior's variance, and is 1 if the latents follow the prior."
)

_CONDITIONAL = [
    field("error of known components", "known_error", show=small_error),
    field("difference of other components", "unknown_error", show=small_error),
    field("spread of pixels", "spread", show=small_error),
    field("images", "n"),
    field("draws", "draws"),
    *_COSTS,
    field("data", "data"),
]
_ABOUT_CONDITIONAL = (
    "Root mean squares, in units of the range of the data. The spread is the standard deviation of a pixel over the "
    "images that were drawn for the same observation."
)

_CLASSES = [
    field("images with their class", "accuracy", "se", show=with_error),
    field("guidance", "guidance"),
    field("images", "n"),
    field("accuracy of the classifier on real images", "judge_accuracy"),
    *_COSTS,
]
