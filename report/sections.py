"""The parts of the page that show one kind of file of the runs: curves, images, densities, times, descriptions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL.Image import Image

from infra.artefacts import ImageGrid
from infra.image_grid import image_grid, image_png
from report.content import Block, Gallery, Note, Plot, Table
from report.density_figures import density_figure, point_figure
from report.diagnostics_figures import diagnostics_figure
from report.figures import TITLES, captioned, figure_png, loss_figure, seconds_figure, snapshot_grid
from report.formatting import MISSING, duration, number
from report.run_files import RunFiles

Runs = Sequence[RunFiles]

MAX_IMAGES = 64
"""The largest number of images in a grid."""

MAX_ROWS = 16
"""The largest number of rows shown of a picture with a fixed number of columns."""

MAX_SNAPSHOTS = 6
"""The largest number of snapshots that are shown of a run."""


def loss_curves(runs: Runs) -> list[Block]:
    """The losses that training recorded."""
    curves = {run.title: run.metrics for run in runs if run.has_curves(TITLES)}
    if not curves:
        return []
    units = {_loss_unit(run) for run in runs if run.title in curves}
    notes = [
        "The total is the loss that training minimises. Test losses use the averaged parameters.",
        *(_ABOUT_UNITS[unit] for unit in sorted(units)),
    ]
    return [_plot("loss", loss_figure(curves, " or ".join(sorted(units))), "Loss curves"), Note(" ".join(notes))]


_ABOUT_UNITS = {
    "dimensionless": "Squared errors relative to the noise have no unit. They do not include their weights.",
    "bits/dim": "Terms in bits/dim are those of the bound on -ln p. They include their weights.",
}
"""An explanation of each unit of the losses."""


def _loss_unit(run: RunFiles) -> str:
    return "bits/dim" if (run.config or {}).get("training", {}).get("bits_per_dim") else "dimensionless"


def samples(runs: Runs) -> list[Block]:
    """The newest samples of each run, and real images."""
    drawn = [(run.title, run.samples) for run in runs if run.samples is not None]
    grids = [(f"{title}, step {grid.step:,}{_file_name(grid)}", grid) for title, grid in drawn]
    real = next((run.data for run in runs if run.data is not None), None)
    if real is not None:
        grids.append(("real images", real))
    pictures = {caption: image_grid(_first_images(grid), grid.levels) for caption, grid in grids}
    missing = "No samples drawn yet." if not drawn else "No real images stored for comparison." if real is None else ""
    return [*_gallery("samples", pictures), *([Note(missing)] if grids and missing else [])]


def control_pictures(runs: Runs) -> list[Block]:
    """Returns the pictures of latent codes and of conditional samples."""
    pictures = {
        f"{run.title}, {name.replace('_', ' ')}": image_grid(_first_rows(grid), grid.levels, grid.columns or None)
        for run in runs
        for name, grid in run.pictures.items()
    }
    return _gallery("control", pictures)


def _first_rows(grid: ImageGrid) -> np.ndarray:
    """Returns the rows of a picture that the report shows."""
    return grid.images[: grid.columns * MAX_ROWS] if grid.columns else _first_images(grid)


def points(runs: Runs) -> list[Block]:
    """The newest points of each run, and points of the data."""
    clouds = {f"{run.title}, step {run.points.step:,}": run.points.points for run in runs if run.points is not None}
    data = next((run.data_points.points for run in runs if run.data_points is not None), None)
    clouds = clouds if data is None else {"data": data, **clouds}
    if not clouds:
        return []
    note = "Points outside the panels are not shown."
    return [_plot("points", point_figure(clouds), "Points of the data and the models"), Note(note)]


def snapshots(runs: Runs) -> list[Block]:
    """Samples drawn during training. If there are many snapshots, some are left out, but not the first and the last."""
    pictures = {}
    for run in runs:
        chosen = np.unique(np.linspace(0, len(run.snapshots) - 1, MAX_SNAPSHOTS).round().astype(int))
        shown = [run.snapshots[i] for i in chosen] if run.snapshots else []
        steps = ", ".join(f"{snapshot.step:,}" for snapshot in shown)
        if shown:
            pictures[f"{run.title}, averaged parameters, steps {steps}"] = snapshot_grid([s.ema for s in shown])
            pictures[f"{run.title}, raw parameters, steps {steps}"] = snapshot_grid([s.raw for s in shown])
    note = "Each row shows one checkpoint, in the order of the steps. All images of a column start from the same noise."
    return [*_gallery("snapshots", pictures, "Samples during training"), Note(note)] if pictures else []


def densities(runs: Runs) -> list[Block]:
    """The densities of models of points. Runs with other data than the first are left out."""
    grids = {f"{run.title}, step {run.density.step:,}": run.density for run in runs if run.density is not None}
    first = next(iter(grids.values()), None)
    if first is None or first.data is None:
        return []
    models = {
        label: grid.density
        for label, grid in grids.items()
        if grid.limit == first.limit and grid.density.shape == first.density.shape
    }
    figure = density_figure(first.limit, first.data, models)
    note = "The density of a model is that of its ODE at the points of a grid. Densities above the scale are cut off."
    return [_plot("density", figure, "Densities of the data and the models"), Note(note)]


def diagnostics(runs: Runs) -> list[Block]:
    """The errors of the newest checkpoint of each run, by start time and noise level."""
    models = {}
    for run in runs:
        result, file = run.newest_result("diagnostics")
        if result is not None:
            models[f"{run.title}, step {result['checkpoint_step']:,}{file}"] = result["diagnostics"]
    if not models:
        return []
    note = (
        "Means over images, plus and minus two standard errors. The first-order loss and the trace's bias are per "
        "dimension; for the exact score, the trace's bias is 0. l_Diff is the distance between the model's score and "
        "the score of the ODE's own density."
    )
    return [_plot("diagnostics", diagnostics_figure(models), "Errors by start time and noise level"), Note(note)]


def times(runs: Runs) -> list[Block]:
    """The time of training, and of its steps."""
    timed = [run for run in runs if run.has_curves(["steps_per_second"])]
    if not timed:
        return []
    headers = ("run", "steps", "training time", "seconds per step, median", "10 % quantile", "90 % quantile")
    figure = seconds_figure({run.title: run.metrics for run in timed})
    return [Table(headers, [_time_row(run) for run in timed]), _plot("seconds", figure, "Seconds per training step")]


def _time_row(run: RunFiles) -> list[str]:
    train = run.metrics["train"]
    fast, median, slow = np.quantile(1 / train["steps_per_second"].values, [0.1, 0.5, 0.9])
    seconds = float(train["seconds"].values[-1]) if "seconds" in train else None
    return [run.title, number(run.last_step), duration(seconds), *(f"{value:.4g}" for value in (median, fast, slow))]


def configurations(runs: Runs) -> list[Block]:
    """The configurations, and apart from them the fields that differ between runs."""
    table = _fields_table({run.name: run.config for run in runs if run.config}, "field")
    if table is None:
        return []
    different = [row for row in table.rows if len(set(row[1:])) > 1]
    differences = [Table(table.headers, different, "Fields that differ")] if different else []
    return [*differences, Table(table.headers, table.rows, folded=f"All {len(table.rows)} fields")]


def environments(runs: Runs) -> list[Block]:
    """The software and devices of the last start, and the commits of all starts."""
    of_runs = {
        run.name: dict(run.environment) | {"commits": ", ".join(run.environment.get("commits", [MISSING]))}
        for run in runs
        if run.environment
    }
    table = _fields_table(of_runs, "")
    if table is None:
        return []
    rows = [(name.removeprefix("versions.").replace("_", " "), *values) for name, *values in table.rows]
    return [Table(table.headers, rows)]


def unreadable_files(runs: Runs) -> list[Block]:
    """The errors of files that could not be read."""
    return [Note(problem) for run in runs for problem in run.problems]


def _fields_table(of_runs: Mapping[str, Mapping[str, Any]], header: str) -> Table | None:
    """Nested fields, a row each, with a column for each run."""
    flat = [_flatten(fields) for fields in of_runs.values()]
    names = dict.fromkeys(name for fields in flat for name in fields)
    rows = [(name, *(fields.get(name, MISSING) for fields in flat)) for name in names]
    return Table((header, *of_runs), rows) if rows else None


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested fields as text, by their dotted names."""
    flat: dict[str, str] = {}
    for name, value in nested.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: str(value)}
    return flat


def _plot(name: str, figure: Figure, description: str) -> Plot:
    return Plot(name, figure_png(figure), description, round(100 * figure.get_figwidth()))


def _gallery(name: str, pictures: Mapping[str, Image], title: str = "") -> list[Block]:
    """Pictures by their captions. Empty without any."""
    if not pictures:
        return []
    copy = image_png(captioned(pictures))
    return [Gallery(name, copy, {caption: image_png(image) for caption, image in pictures.items()}, title)]


def _file_name(grid: ImageGrid) -> str:
    """The name of the file, unless it is the usual one of the step."""
    return "" if grid.name in ("", f"step_{grid.step}") else f", {grid.name}"


def _first_images(grid: ImageGrid) -> np.ndarray:
    """At most 64 images, and fewer if they are large, so that the grid fits on a screen."""
    per_row = max(1, min(8, 600 // grid.images.shape[2]))
    return grid.images[: min(MAX_IMAGES, per_row**2)]
