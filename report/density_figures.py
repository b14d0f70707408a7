"""Figures of points and of densities, per unit of length or area, in one and two dimensions."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from report.figures import colours, style_panel

DATA_COLOUR = "#30363d"

MAX_POINTS = 5000
"""The largest number of points in a panel."""


def density_figure(
    limit: float, data: Float[np.ndarray, "*cells"], models: Mapping[str, Float[np.ndarray, "*cells"]]
) -> Figure:
    """Draws densities at the centres of the cells of [-limit, limit]^d, for d = 1 or 2."""
    if data.ndim == 2:
        return density_maps(limit, data, models)
    x = ((np.arange(len(data)) + 0.5) / len(data) * 2 - 1) * limit
    return density_curves(x, data, {label: [density] for label, density in models.items()})


def density_curves(
    x: Float[np.ndarray, " n"], data: Float[np.ndarray, " n"], models: Mapping[str, Sequence[Float[np.ndarray, " n"]]]
) -> Figure:
    """Draws densities in one dimension: a panel for each kind of model, with a line for each run and with the data."""
    figure = Figure(figsize=(3.7 * len(models), 3.1), layout="constrained")
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for panel, colour, (label, runs) in zip(panels, colours(len(models)), models.items(), strict=True):
        panel.fill_between(x, data, color=DATA_COLOUR, alpha=0.18, linewidth=0, label="data")
        name = "model" if len(runs) == 1 else "model, each seed"
        for number, density in enumerate(runs):
            panel.plot(x, density, color=colour, linewidth=1.3, label=None if number else name)
        style_panel(panel, "", "x", "density" if panel is panels[0] else "")
        _set_title(panel, label)
        panel.set_ylim(0, 1.6 * float(np.max(data)))  # cuts off the peaks of a wrong model
        panel.legend(frameon=False, fontsize=8, loc="upper right")
    return figure


def density_maps(
    limit: float, data: Float[np.ndarray, "n n"], models: Mapping[str, Float[np.ndarray, "n n"]]
) -> Figure:
    """Draws densities on the square [-limit, limit]^2 with one colour scale. Rows of the arrays are values of x_2."""
    maps = {"data": data, **models}
    figure = Figure(figsize=(2.9 * len(maps) + 0.7, 3.2), layout="constrained")
    panels = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    scale = ScalarMappable(Normalize(0, 1.6 * float(np.max(data))), "viridis")
    for panel, (label, density) in zip(panels, maps.items(), strict=True):
        extent = (-limit, limit, -limit, limit)
        panel.imshow(density, origin="lower", extent=extent, norm=scale.norm, cmap=scale.cmap, interpolation="nearest")
        _set_title(panel, label)
        panel.set_xlabel("$x_1$", fontsize=8.5)
        panel.tick_params(labelsize=8)
    panels[0].set_ylabel("$x_2$", fontsize=8.5)
    bar = figure.colorbar(scale, ax=panels, extend="max", shrink=0.85)
    bar.set_label("density", fontsize=8.5)
    bar.ax.tick_params(labelsize=8)
    return figure


def point_figure(clouds: Mapping[str, Float[np.ndarray, "_ d"]]) -> Figure:
    """Draws points around the range of the first cloud: histograms in one dimension, else the first two coordinates."""
    limit = 1.5 * float(np.abs(next(iter(clouds.values()))).max()) or 1.0
    figure = Figure(figsize=(2.9 * len(clouds) + 0.7, 3.2), layout="constrained")
    panels = figure.subplots(1, len(clouds), sharex=True, sharey=True, squeeze=False)[0]
    for panel, (label, points) in zip(panels, clouds.items(), strict=True):
        if points.shape[1] == 1:
            panel.hist(points[:, 0], bins=60, range=(-limit, limit), density=True, color=DATA_COLOUR)
            labels = "x", "density"
        else:
            panel.plot(points[:MAX_POINTS, 0], points[:MAX_POINTS, 1], ".", color=DATA_COLOUR, markersize=2, alpha=0.5)
            panel.set(ylim=(-limit, limit), aspect="equal")
            labels = "$x_1$", "$x_2$"
        panel.set_xlim(-limit, limit)
        style_panel(panel, "", labels[0], labels[1] if panel is panels[0] else "")
        _set_title(panel, label)
    return figure


def _set_title(panel: Axes, label: str) -> None:
    """Sets a title that may contain a dollar sign, as names of folders do."""
    panel.set_title(label, fontsize=10, loc="left").set_parse_math(False)
