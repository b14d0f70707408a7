"""Figures of training curves, and pictures of image grids."""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image, ImageDraw, ImageFont

from infra.artefacts import ImageGrid
from infra.image_grid import image_grid
from infra.metrics import MetricCurve, RunCurves
from losses import TERMS

COLOURS = ("#2563a8", "#d1600a", "#2f855a", "#8a4fb0", "#b83250", "#5a6472")
"""The colours of runs or models."""

TITLES = {
    "total": "total",
    "loss": "total",
    **{name: term.title for name, term in TERMS.items()},
    "grad_norm": "gradient norm, before clipping",
}
"""Titles of the losses and the gradient norm, by the names of the metrics, in the order that they are shown in."""


def loss_figure(runs: Mapping[str, RunCurves], unit: str = "dimensionless") -> Figure:
    """Draws a panel for each term of the loss that any run has, in this unit, and one for the gradient norm."""
    present = {name for curves in runs.values() for of_split in curves.values() for name in of_split}
    if len(present & TERMS.keys()) == 1:
        present -= {"total", "loss"}  # equal to the only term
    names = [name for name in TITLES if name in present]
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(max(3.7 * columns, 5.5), 2.8 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, name in zip(panels, names, strict=False):
        for colour, curves in zip(colours(len(runs)), runs.values(), strict=True):
            _draw_curves(panel, colour, {split: c[name] for split, c in curves.items() if name in c})
        _style_steps(panel, TITLES[name], "norm" if name == "grad_norm" else f"loss ({unit})")
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    _loss_legend(figure, runs)
    return figure


def seconds_figure(runs: Mapping[str, RunCurves]) -> Figure:
    """Draws seconds per training step. The axis ends at three times the median: early records contain compilation."""
    figure = Figure(figsize=(11.1, 2.4), layout="constrained")
    panel = figure.subplots()
    top = 0.0
    for colour, curves in zip(colours(len(runs)), runs.values(), strict=True):
        rate = curves.get("train", {}).get("steps_per_second")
        if rate is not None:
            panel.plot(rate.steps, 1 / rate.values, color=colour, linewidth=1.2)
            top = max(top, 3 * float(np.median(1 / rate.values)))
    _style_steps(panel, "", "seconds per step")
    panel.set_ylim(0, min(top, panel.get_ylim()[1]))
    if len(runs) > 1:
        _legend(figure, _run_entries(runs))
    return figure


def colours(count: int) -> list[str]:
    """Returns `count` colours. They repeat if there are more runs than colours."""
    return [COLOURS[k % len(COLOURS)] for k in range(count)]


def _draw_curves(panel: Axes, colour: str, curves: Mapping[str, MetricCurve]) -> None:
    """Draws training losses smoothed over raw, and test losses, each a mean of few batches, smoothed over dots."""
    for split, curve in curves.items():
        if split == "train":
            panel.plot(curve.steps, curve.values, color=colour, alpha=0.25, linewidth=0.7)
            panel.plot(curve.steps, curve.smoothed(), color=colour, linewidth=1.6)
        else:
            panel.plot(curve.steps, curve.values, ".", color=colour, alpha=0.5, markersize=4, markeredgewidth=0)
            panel.plot(curve.steps, curve.smoothed(), color=colour, linewidth=1.3, linestyle="--")
        _choose_scale(panel, curve.values)


def _choose_scale(panel: Axes, values: Float[np.ndarray, " n"]) -> None:
    """Chooses a logarithmic axis if the values are positive and span more than a factor of 5."""
    finite = values[np.isfinite(values)]
    if len(finite) > 0 and finite.max() > 5 * finite.min() > 0:
        log_axis(panel, subs=(1, 2, 5) if finite.max() < 300 * finite.min() else (1,))


def log_axis(panel: Axes, subs: Sequence[int]) -> None:
    """Makes the y axis logarithmic, with ticks at `subs` times powers of ten, labelled by plain numbers."""
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=subs))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())


def style_panel(panel: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Sets the texts, the grid and the frame of a panel."""
    panel.set_title(title, fontsize=10, loc="left")
    panel.set_xlabel(xlabel, fontsize=8.5)
    panel.set_ylabel(ylabel, fontsize=8.5)
    panel.tick_params(labelsize=8)
    panel.grid(color="#e3e6ea", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _style_steps(panel: Axes, title: str, ylabel: str) -> None:
    style_panel(panel, title, "training step", ylabel)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panel.locator_params(axis="x", nbins=5)


def _loss_legend(figure: Figure, runs: Mapping[str, RunCurves]) -> None:
    """Adds one legend for all panels: a colour for each run, a line style for each split."""
    several = len(runs) > 1
    entries = _run_entries(runs) if several else {}
    colour = "#30363d" if several else COLOURS[0]
    entries["train (raw behind smoothed)"] = Line2D([], [], color=colour)
    if any("test" in curves for curves in runs.values()):
        entries["test (dots behind smoothed)"] = Line2D([], [], color=colour, linestyle="--")
    _legend(figure, entries)


def _run_entries(runs: Mapping[str, RunCurves]) -> dict[str, Line2D]:
    return {label: Line2D([], [], color=colour) for label, colour in zip(runs, colours(len(runs)), strict=True)}


def _legend(figure: Figure, entries: Mapping[str, Line2D]) -> None:
    """Adds a legend below the panels, with as many columns as fit the width of the figure."""
    inches = 0.6 + 0.075 * max(map(len, entries))
    legend = figure.legend(
        handles=list(entries.values()),
        labels=list(entries),
        loc="outside lower center",
        ncols=max(1, min(len(entries), int(figure.get_figwidth() / inches))),
        frameon=False,
        fontsize=9,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # the name of a folder may contain a dollar sign


def figure_png(figure: Figure) -> bytes:
    """Returns the figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()


def snapshot_grid(grids: Sequence[ImageGrid], per_row: int = 8) -> Image.Image:
    """Draws a row for each snapshot, with its first images: `per_row`, or as many as all have.

    A column is one image during training.
    """
    count = min(per_row, *(len(grid.images) for grid in grids))
    return image_grid(np.concatenate([grid.images[:count] for grid in grids]), grids[0].levels, columns=count)


def captioned(images: Mapping[str, Image.Image]) -> Image.Image:
    """Draws images, by their captions, side by side, each with its caption above it."""
    margin, line = 16, 24
    font = ImageFont.load_default(15)
    widths = [max(image.width, math.ceil(font.getlength(caption))) for caption, image in images.items()]
    height = max(image.height for image in images.values())
    canvas = Image.new("RGB", (sum(widths) + margin * (len(images) + 1), height + line + 2 * margin), "white")
    draw = ImageDraw.Draw(canvas)
    left = margin
    for (caption, image), width in zip(images.items(), widths, strict=True):
        draw.text((left, margin - 4), caption, fill="#24292f", font=font)
        canvas.paste(image, (left, margin + line))
        left += width + margin
    return canvas
