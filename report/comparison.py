"""Evaluations of runs as plain text, a line each: what `--mode=report` prints."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from report.formatting import Row, number, text_table, with_error


def comparison_table(results: Iterable[Mapping[str, Any]]) -> str:
    """`run_files.read_run(workdir).results` has those of a run; evaluations of points have a table of their own.

    Lines say what run and what file they are of where there are several runs, and several lines for one step.
    """
    results = list(results)
    of_points = [result for result in results if "nll" in result or "points" in result]
    of_images = [result for result in results if result not in of_points]
    tables = []
    if of_images or not of_points:
        tables.append(_table(_HEADERS, of_images, _row))
    if of_points:
        tables.append(_table(_POINT_HEADERS, of_points, _point_row))
    return "\n\n".join(tables)


def _table(headers: Row, results: Sequence[Mapping[str, Any]], row: Callable[[Mapping[str, Any]], Row]) -> str:
    several_runs = len({result["run"] for result in results if "run" in result}) > 1
    several_files = len({(result.get("run"), result.get("checkpoint_step")) for result in results}) < len(results)
    fields = [field for field, wanted in (("run", several_runs), ("file", several_files)) if wanted]
    rows = [(*(number(result.get(field)) for field in fields), *row(result)) for result in results]
    return text_table((*fields, *headers), rows)


_HEADERS = ("order", "steps", "bits/dim", "FID", "IS", "NFE likelihood", "NFE sample", "s training", "s evaluation")


def _row(result: Mapping[str, Any]) -> Row:
    bpd, samples = result.get("bpd", {}), result.get("samples", {})
    return (
        *_trained(result),
        with_error(bpd.get("mean"), bpd.get("se")),
        number(samples.get("fid")),
        with_error(samples.get("is_mean"), samples.get("is_std")),
        *_costs(result, bpd, samples),
    )


_POINT_HEADERS = ("order", "steps", "NLL nats", "KL nats", "NFE likelihood", "NFE sample", "s training", "s evaluation")


def _point_row(result: Mapping[str, Any]) -> Row:
    nll, points = result.get("nll", {}), result.get("points", {})
    kl = nll.get("kl", {})
    return (
        *_trained(result),
        with_error(nll.get("mean"), nll.get("se")),
        with_error(kl.get("mean"), kl.get("se")),
        *_costs(result, nll, points),
    )


def _trained(result: Mapping[str, Any]) -> Row:
    return number(result.get("order")), number(result.get("checkpoint_step"))


def _costs(result: Mapping[str, Any], likelihood: Mapping[str, Any], samples: Mapping[str, Any]) -> Row:
    seconds = [part["seconds"] for part in (likelihood, samples) if "seconds" in part]
    return (
        number(likelihood.get("nfe"), 0),
        number(samples.get("nfe"), 0),
        number(result.get("train_seconds"), 0),
        number(sum(seconds) if seconds else None, 0),
    )
