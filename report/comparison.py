"""Formats evaluations of runs as a plain-text table, one line each. `--mode=report` prints it."""

from collections.abc import Iterable, Sequence

from infra.console import text_table
from report.fields import Field, Result, field, likelihood, run_and_file
from report.formatting import estimate, whole_number, with_error


def comparison_table(results: Iterable[Result], several_runs: bool = False) -> str:
    """Formats evaluations, such as `run_files.read_run(workdir).results`. Evaluations of points get their own table.

    Args:
        several_runs: name the run of each result even if all results belong to one, because others have none.
    """
    results = list(results)
    points = [result for result in results if "nll" in result or "points" in result]
    images = [result for result in results if result not in points]
    several_runs = several_runs or len({result["run"] for result in results if "run" in result}) > 1
    tables = [_table(_IMAGE_FIELDS, images, several_runs)] if images or not points else []
    tables += [_table(_POINT_FIELDS, points, several_runs)] if points else []
    return "\n\n".join(tables)


def _table(fields: Sequence[Field], results: Sequence[Result], several_runs: bool) -> str:
    at_x_tmin = any("bpd_tmin" in result for result in results)
    fields = [each for each in fields if at_x_tmin or each is not _AT_X_TMIN]
    fields = [*run_and_file(results, several_runs), *fields]
    return text_table([each.header for each in fields], [[each.show(result) for each in fields] for result in results])


def _costs(likelihood: str, samples: str) -> list[Field]:
    """Columns of network evaluations and seconds, from these parts of an evaluation."""

    def evaluation_seconds(result: Result) -> str:
        seconds = [result[part]["seconds"] for part in (likelihood, samples) if "seconds" in result.get(part, {})]
        return whole_number(sum(seconds) if seconds else None)

    return [
        field("NFE likelihood", f"{likelihood}.nfe", show=whole_number),
        field("NFE sample", f"{samples}.nfe", show=whole_number),
        field("s training", "train_seconds", show=whole_number),
        Field("s evaluation", evaluation_seconds),
    ]


_CHECKPOINT = [field("order", "order"), field("steps", "checkpoint_step")]

_AT_X_TMIN = field("bits/dim at x_tmin", "bpd_tmin", show=likelihood)
"""A column of tables that have such a result."""

_IMAGE_FIELDS = [
    *_CHECKPOINT,
    field("bits/dim", "bpd", show=likelihood),
    _AT_X_TMIN,
    field("FID", "samples.fid"),
    field("IS", "samples.is_mean", "samples.is_std", show=with_error),
    *_costs("bpd", "samples"),
]

_POINT_FIELDS = [
    *_CHECKPOINT,
    field("NLL nats", "nll", show=likelihood),
    field("KL nats", "nll.kl", show=estimate),
    *_costs("nll", "points"),
]
