"""One page for each run, to look at instead of reading logs: curves, tables, samples, settings.

The page is made from the run's folder alone, from whatever is there, and needs no other file to be shown.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL.Image import Image

from infra.files import write_atomic
from infra.image_grid import image_grid, image_png
from infra.workdir import ImageGrid, Workdir
from report.density_figures import densities_figure
from report.figures import (
    TITLES,
    captioned,
    figure_png,
    loss_figure,
    seconds_figure,
    snapshot_grid,
)
from report.formatting import MISSING, duration, html_table, number, paragraph, with_error
from report.result_tables import Runs, likelihoods, losses_over_all, sample_quality
from report.run_files import RunFiles, read_run

SHOWN = 64
"""Images in a grid, at most."""

SNAPSHOTS = 6
"""Snapshots shown, at most."""


def write_report(workdir: Path, *, others: Sequence[Path] = ()) -> None:
    """Writes report.html into a run's folder, and copies of its figures into figures/.

    Args:
        others: folders of runs to show beside this one: curves over one another, tables joined.

    Raises:
        FileNotFoundError: if a folder does not exist.
    """
    runs = _labelled([read_run(folder) for folder in (workdir, *others)])
    write_atomic(Workdir(workdir).report, _page(runs, Workdir(workdir).figures))


def _page(runs: Runs, figures: Path) -> str:
    sections = {
        "Loss": _losses(runs, figures),
        "Likelihood": likelihoods(runs),
        "Sample quality": sample_quality(runs),
        "Samples": _samples(runs, figures) + _snapshots(runs, figures),
        "Density": _density(runs, figures),
        "Time": _times(runs, figures),
        "Configuration": _configurations(runs),
        "Environment": _environments(runs),
    }
    problems = [problem for run in runs.values() for problem in run.problems]
    if problems:
        sections["Unreadable files"] = "".join(paragraph(problem) for problem in problems)
    title = html.escape(" and ".join(runs))
    summaries = "".join(paragraph(_summary(label, run), "summary") for label, run in runs.items())
    body = "".join(
        f"<section>\n<h2>{heading}</h2>\n{content}</section>\n" for heading, content in sections.items() if content
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{summaries}{body}</body>\n</html>\n"
    )


def _labelled(runs: Sequence[RunFiles]) -> dict[str, RunFiles]:
    """Runs by the names of their folders, numbered where a name is taken."""
    labelled: dict[str, RunFiles] = {}
    for run in runs:
        label, count = run.name, 2
        while label in labelled:
            label, count = f"{run.name} ({count})", count + 1
        labelled[label] = run
    return labelled


def _described(label: str, run: RunFiles) -> str:
    return label if run.order is None else f"{label}, order {run.order}"


def _summary(label: str, run: RunFiles) -> str:
    """The run in one line."""
    parts = []
    if run.last_step is not None:
        parts.append(f"{run.last_step:,} steps")
    if run.environment and "num_parameters" in run.environment:
        parts.append(f"{number(run.environment['num_parameters'])} parameters")
    for part in ("bpd", "nll", "samples"):
        result, source = _newest(run, part)
        if result and part != "samples":
            unit = "bits/dim" if part == "bpd" else "nats"
            parts.append(f"{with_error(result.get('mean'), result.get('se'))} {unit}{source}")
        elif result:
            features = result.get("fid_features", "unknown")
            parts.append(f"FID {number(result.get('fid'))} ({features} features){source}")
    return f"{_described(label, run)}: {', '.join(parts) or 'nothing recorded yet'}"


def _newest(run: RunFiles, part: str) -> tuple[Mapping[str, Any], str]:
    """This part of the newest checkpoint's evaluation; of several the last in eval/, or of all, and then its file."""
    having = [result for result in run.results if part in result]
    of_newest = [result for result in having if result["checkpoint_step"] == having[-1]["checkpoint_step"]]
    if not of_newest:
        return {}, ""
    chosen = ([result for result in of_newest if result["file"].startswith("eval/")] or of_newest)[-1]
    return chosen[part], f" of {chosen['file']}" if len(of_newest) > 1 else ""


# --- sections ---


def _losses(runs: Runs, figures: Path) -> str:
    curves = {_described(label, run): run.metrics for label, run in runs.items() if run.has_curves(TITLES)}
    if not curves:
        content = paragraph("No training recorded yet.")
    else:
        content = _plot(loss_figure(curves), figures / "loss.png", "Loss curves") + paragraph(
            "The terms of the objective, each without its weight; the total is what training minimises. Losses are "
            "squared errors relative to the noise, so they have no unit. Test losses are those of the averaged "
            "parameters."
        )
    return content + losses_over_all(runs)


def _samples(runs: Runs, figures: Path) -> str:
    grids = [
        (f"{_described(label, run)}, step {run.samples.step:,}{_of_file(run.samples)}", run.samples)
        for label, run in runs.items()
        if run.samples is not None
    ]
    missing = "" if grids else paragraph("No samples drawn yet.")
    real = next((run.data for run in runs.values() if run.data is not None), None)
    if real is not None:
        grids.append(("real images", real))
    elif grids:
        missing = paragraph("No real images stored to hold them against.")
    if not grids:
        return missing
    captions = [caption for caption, _ in grids]
    pictures = [image_grid(_shown(grid), grid.levels) for _, grid in grids]
    write_atomic(figures / "samples.png", image_png(captioned(captions, pictures)))
    return _gallery(captions, pictures) + missing


def _snapshots(runs: Runs, figures: Path) -> str:
    """Empty where none were drawn while training; of many only some are shown, the first and the last among them."""
    captions, pictures = [], []
    for label, run in runs.items():
        if not run.snapshots:
            continue
        chosen = np.unique(np.linspace(0, len(run.snapshots) - 1, SNAPSHOTS).round().astype(int))
        snapshots = [run.snapshots[i] for i in chosen]
        steps = ", ".join(f"{snapshot.ema.step:,}" for snapshot in snapshots)
        for weights, grids in (("averaged", [s.ema for s in snapshots]), ("last", [s.raw for s in snapshots])):
            captions.append(f"{_described(label, run)}, {weights} weights, steps {steps}")
            pictures.append(snapshot_grid(grids))
    if not pictures:
        return ""
    write_atomic(figures / "snapshots.png", image_png(captioned(captions, pictures)))
    return (
        "<h3>While training</h3>\n"
        + _gallery(captions, pictures)
        + paragraph("A row for each checkpoint, in the order of the steps; a column is the same noise all along.")
    )


def _gallery(captions: Sequence[str], pictures: Sequence[Image]) -> str:
    shown = "".join(
        f"<figure>{_image(image_png(picture), caption)}<figcaption>{html.escape(caption)}</figcaption></figure>\n"
        for caption, picture in zip(captions, pictures, strict=True)
    )
    return f'<div class="grids">{shown}</div>\n'


def _of_file(grid: ImageGrid) -> str:
    """Where the images are, unless that is where those of a step usually are."""
    return "" if grid.name in ("", f"step_{grid.step}") else f", {grid.name}"


def _shown(grid: ImageGrid) -> np.ndarray:
    """Fewer of larger images, so that the grid fits a screen."""
    per_row = max(1, min(8, 600 // grid.images.shape[2]))
    return grid.images[: min(SHOWN, per_row**2)]


def _density(runs: Runs, figures: Path) -> str:
    """Empty unless a run has points; runs of other data than the first are left out."""
    grids = {label: run.density for label, run in runs.items() if run.density is not None}
    first = next(iter(grids.values()), None)
    if first is None or first.data is None:
        return ""
    densities = {
        f"{_described(label, runs[label])}, step {grid.step:,}".replace("$", r"\$"): grid.density
        for label, grid in grids.items()
        if grid.limit == first.limit and grid.density.shape == first.density.shape
    }
    figure = densities_figure(first.limit, first.data, densities)
    return _plot(figure, figures / "density.png", "Densities of data and models") + paragraph(
        "By the likelihood of the ODE, at the cells of a grid; where a model's is beyond the scale it is cut off."
    )


def _times(runs: Runs, figures: Path) -> str:
    timed = {label: run for label, run in runs.items() if run.has_curves(["steps_per_second"])}
    if not timed:
        return paragraph("No training recorded yet.")
    rows = []
    for label, run in timed.items():
        train = run.metrics["train"]
        slow, median, fast = np.quantile(1 / train["steps_per_second"].values, [0.9, 0.5, 0.1])
        seconds = float(train["seconds"].values[-1]) if "seconds" in train else None
        times = (f"{value:.4g}" for value in (median, fast, slow))
        rows.append((_described(label, run), number(run.last_step), duration(seconds), *times))
    headers = ("run", "steps", "training time", "seconds per step, median", "10 % quantile", "90 % quantile")
    curves = {_described(label, run): run.metrics for label, run in timed.items()}
    return html_table(headers, rows) + _plot(
        seconds_figure(curves), figures / "seconds.png", "Seconds per training step"
    )


def _configurations(runs: Runs) -> str:
    flat = {label: _flat(run.config) for label, run in runs.items() if run.config is not None}
    if not flat:
        return paragraph("No configuration stored.")
    names = list(dict.fromkeys(name for fields in flat.values() for name in fields))
    rows = [(name, *(fields.get(name, MISSING) for fields in flat.values())) for name in names]
    different = [row for row in rows if len(set(row[1:])) > 1]
    headers = ("field", *flat)
    difference = "<h3>Fields that differ</h3>\n" + html_table(headers, different) if different else ""
    return f"{difference}<details><summary>all {len(rows)} fields</summary>\n{html_table(headers, rows)}</details>\n"


def _environments(runs: Runs) -> str:
    flat = {label: _flat(run.environment) for label, run in runs.items() if run.environment is not None}
    if not flat:
        return paragraph("No environment stored.")
    names = list(dict.fromkeys(name for fields in flat.values() for name in fields))
    rows = [
        (name.removeprefix("versions.").replace("_", " "), *(fields.get(name, MISSING) for fields in flat.values()))
        for name in names
    ]
    return html_table(("", *flat), rows)


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested fields as text, by their dotted names."""
    flat: dict[str, str] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = str(value)
    return flat


# --- parts of sections ---


def _plot(figure: Figure, path: Path, description: str) -> str:
    """A figure as part of the page, and as a file."""
    png = figure_png(figure)
    write_atomic(path, png)
    return _image(png, description, f"{100 * figure.get_figwidth():.0f}px")


def _image(png: bytes, description: str, width: str = "auto") -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(description)}" style="width: {width}" src="data:image/png;base64,{data}">\n'


_STYLE = """
:root { color-scheme: light; }
body { max-width: 1180px; margin: 2rem auto; padding: 0 1.5rem; background: #fff; color: #1f2328;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid #d8dee4; }
h3 { font-size: .95rem; margin: 1.2rem 0 .3rem; }
.summary { margin: .1rem 0; font-size: 1.02rem; }
.note { margin: .4rem 0; color: #57606a; font-size: .88rem; max-width: 100ch; }
.warning { margin: .4rem 0; padding: .3rem .7rem; font-size: .88rem; background: #fff6dd;
  border-left: 3px solid #d4a72c; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; margin: .4rem 0; }
th, td { padding: .28rem .7rem; text-align: left; border-bottom: 1px solid #e6eaee; white-space: nowrap; }
th { font-weight: 600; color: #424a53; border-bottom: 1px solid #b9c1c9; }
.n { text-align: right; }
tr:hover td { background: #f6f8fa; }
figure { margin: .6rem 0; }
img { max-width: 100%; }
.grids { display: flex; flex-wrap: wrap; gap: 1.6rem; align-items: flex-start; }
.grids img { image-rendering: pixelated; display: block; }
figcaption { font-size: .86rem; color: #424a53; margin-top: .35rem; }
details summary { cursor: pointer; color: #2563a8; margin: .4rem 0; }
"""
