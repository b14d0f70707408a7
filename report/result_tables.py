"""The report's tables of evaluations: losses, likelihoods, sample quality."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from report.figures import TITLES
from report.formatting import MISSING, Row, duration, html_table, number, paragraph, with_error
from report.run_files import RunFiles

Runs: TypeAlias = Mapping[str, RunFiles]
"""Runs by their labels."""

Result: TypeAlias = Mapping[str, Any]
"""An evaluation, as it is stored."""


def losses_over_all(runs: Runs) -> str:
    """Of evaluations with `eval.enable_loss`; nothing without any."""
    results = _results(runs, "loss")
    if not results:
        return ""
    names = [name for name in TITLES if any(name in result["loss"] for _, result in results)]
    rows = [
        (*_which(label, result), *(with_error(*_mean_and_se(result["loss"].get(name))) for name in names))
        for label, result in results
    ]
    return "<h3>Over all test images</h3>\n" + _results_table(runs, [TITLES[name] for name in names], rows)


def likelihoods(runs: Runs) -> str:
    """Bits/dim of images, and nats of points."""
    sections = [tables for tables in (_bits_per_dim(runs), _nats(runs)) if tables]
    return "".join(sections) or paragraph("No evaluation of the likelihood yet.")


def _nats(runs: Runs) -> str:
    """Of points."""
    results = _results(runs, "nll")
    if not results:
        return ""
    headers = ("NLL, nats", "KL to the data, nats", "entropy of the data", "points", "solver error", "NFE", "time")
    rows = [(*_which(label, result), *_nats_cells(result["nll"])) for label, result in results]
    solves = [(*_which(label, result), *_solve_cells(result["nll"])) for label, result in results]
    return (
        _results_table(runs, headers, rows)
        + paragraph(
            "± is the standard error over points. KL is the mean of ln q - ln p over the points, q being the density "
            "they are drawn from, so the spread of ln q does not count in its error."
        )
        + "<h3>How it was computed</h3>\n"
        + _results_table(runs, (*_SOLVE_HEADERS[:-1], "points of"), solves)
    )


def _nats_cells(nll: Mapping[str, Any]) -> Row:
    return (
        with_error(nll.get("mean"), nll.get("se")),
        with_error(*_mean_and_se(nll.get("kl"))),
        number(nll.get("entropy")),
        number(nll.get("n")),
        _small(nll.get("solver_error")),
        number(nll.get("nfe"), 0),
        duration(nll.get("seconds")),
    )


def _bits_per_dim(runs: Runs) -> str:
    results = _results(runs, "bpd")
    if not results:
        return ""
    names = list(dict.fromkeys(name for _, result in results for name in result["bpd"].get("terms", {})))
    tables = {
        "": (_BPD_HEADERS, _bpd_cells),
        "Terms, in bits/dim": (
            [name.replace("_", " ") for name in names],
            lambda bpd: [with_error(*_mean_and_se(bpd.get("terms", {}).get(name))) for name in names],
        ),
        "How it was computed": (_SOLVE_HEADERS, _solve_cells),
    }
    content = ""
    for heading, (headers, cells) in tables.items():
        rows = [(*_which(label, result), *cells(result["bpd"])) for label, result in results]
        content += (f"<h3>{heading}</h3>\n" if heading else "") + _results_table(runs, headers, rows)
    return content + paragraph(
        "± is the standard error over images, of which each counts with the mean of its repeats. Errors are estimates, "
        "in bits/dim: the solver's of the bias of the mean, the others of its standard error by probes, by the times "
        "and noise that a bound is sampled at, and over repeats. A solve far more accurate than those costs more than "
        "it tells."
    )


_BPD_HEADERS = (
    "bits/dim",
    "95 % interval",
    "images",
    "repeats",
    "over repeats ±",
    "solver error",
    "probes ±",
    "sampling ±",
    "NFE",
    "time",
)


def _bpd_cells(bpd: Mapping[str, Any]) -> Row:
    interval, errors = bpd.get("ci95"), bpd.get("errors", {})
    return (
        with_error(bpd.get("mean"), bpd.get("se")),
        f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else MISSING,
        number(bpd.get("n")),
        number(bpd.get("repeats")),
        _small(bpd.get("se_over_repeats")),
        *(_small(errors.get(name)) for name in ("solver_error", "probe_error", "sampling_error")),
        number(bpd.get("nfe"), 0),
        duration(bpd.get("seconds")),
    )


def _small(error: float | None) -> str:
    return MISSING if error is None else f"{error:.1e}"


_SOLVE_HEADERS = ("estimate", "from t", "probes", "dequantization", "draws", "images of")


def _solve_cells(bpd: Mapping[str, Any]) -> Row:
    settings = [f"{name} {bpd[name]:.0e}" for name in ("rtol", "atol") if name in bpd]
    settings += [f"{bpd['steps']} steps"] if "steps" in bpd else []
    if "bound" in bpd:
        settings += [f"{bpd['num_times']} times, {bpd['num_starts']} start draws"]
    estimate = f"{bpd['bound']} bound of the SDE" if "bound" in bpd else number(bpd.get("solver"))
    probes = [number(bpd[name]) for name in ("num_probes", "probe") if name in bpd]
    noise = number(bpd.get("dequantization")) + (f", cut at {bpd['tau']:.3g}" if "tau" in bpd else "")
    return (
        ", ".join([estimate, *settings]),
        number(bpd.get("t_min")),
        " ".join(probes) or MISSING,
        noise,
        number(bpd.get("importance_samples")),
        number(bpd.get("data")),
    )


def sample_quality(runs: Runs) -> str:
    """FID, IS and KID."""
    results = _results(runs, "samples")
    if not results:
        return paragraph("No evaluation of samples yet.")
    headers = ("FID", "of features", "IS", "KID", "samples", "sampler", "NFE", "time", "compared with")
    rows = [(*_which(label, result), *_quality_cells(result["samples"])) for label, result in results]
    warnings = dict.fromkeys(result["samples"].get("warning") for _, result in results)
    return (
        _results_table(runs, headers, rows)
        + paragraph("IS: mean ± standard deviation over splits. KID: mean ± standard error.")
        + "".join(paragraph(f"{warning}.", "warning") for warning in warnings if warning)
    )


def _quality_cells(samples: Mapping[str, Any]) -> Row:
    return (
        number(samples.get("fid")),
        number(samples.get("fid_features")),
        with_error(samples.get("is_mean"), samples.get("is_std")),
        with_error(samples.get("kid_mean"), samples.get("kid_se")),
        number(samples.get("n")),
        number(samples.get("sampler")),
        number(samples.get("nfe"), 0),
        duration(samples.get("seconds")),
        number(samples.get("statistics_data")),
    )


def _results(runs: Runs, part: str) -> list[tuple[str, Result]]:
    """The evaluations that have this part, with their runs' labels."""
    return [(label, result) for label, run in runs.items() for result in run.results if part in result]


def _which(label: str, result: Result) -> Row:
    """What tells an evaluation from the others; see `_results_table`."""
    weights = {True: "averaged", False: "last"}.get(result.get("ema", None), MISSING)
    return label, result["file"], number(result.get("order")), number(result.get("checkpoint_step")), weights


def _results_table(runs: Runs, headers: Sequence[str], rows: Sequence[Row]) -> str:
    """A table of rows that begin with `_which`; run and file are only shown where there are several for one step."""
    several_runs = len(runs) > 1
    several_files = len({(row[0], row[3]) for row in rows}) < len(rows)
    chosen = [several_runs, several_files, *[True] * (len(headers) + 3)]
    all_headers = ("run", "file", "order", "step", "weights", *headers)
    kept = [list(itertools.compress(row, chosen)) for row in (all_headers, *rows)]
    return html_table(kept[0], kept[1:])


def _mean_and_se(estimate: Any) -> tuple[float | None, float | None]:
    """Of an estimate stored as a number, or as its mean and standard error."""
    if isinstance(estimate, Mapping):
        return estimate.get("mean"), estimate.get("se")
    return estimate, None
