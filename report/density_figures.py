"""Pictures of densities in one and two dimensions: of data and models, of paths between data and prior, of distances.

All of them take arrays, and draw what they are given. Densities are per unit of length or area, distances in nats.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from analysis.score_distances import DistanceCurve
from report.figures import colours

DATA_COLOUR = "#30363d"

DISTANCES = {
    "score_matching": "model's score to the data's, $\\ell_{SM}$",
    "fisher": "ODE's score to the data's, $\\ell_{Fisher}$",
    "difference": "model's score to the ODE's, $\\ell_{Diff}$",
}
"""Titles of the panels, by the names of `score_distances.Distances`."""


def densities_figure(
    limit: float, data: Float[np.ndarray, "*cells"], models: Mapping[str, Float[np.ndarray, "*cells"]]
) -> Figure:
    """Densities at the centres of the cells of [-limit, limit]^d, d = 1 or 2."""
    if data.ndim == 2:
        return density_maps(limit, data, models)
    x = ((np.arange(len(data)) + 0.5) / len(data) * 2 - 1) * limit
    return density_curves(x, data, {label: [density] for label, density in models.items()})


def density_curves(
    x: Float[np.ndarray, " n"], data: Float[np.ndarray, " n"], models: Mapping[str, Sequence[Float[np.ndarray, " n"]]]
) -> Figure:
    """Densities in one dimension, a panel for each kind of model: a line for each of its runs, over the data's."""
    figure = Figure(figsize=(3.7 * len(models), 3.1), layout="constrained")
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for panel, colour, (label, runs) in zip(panels, colours(len(models)), models.items(), strict=True):
        panel.fill_between(x, data, color=DATA_COLOUR, alpha=0.18, linewidth=0, label="data")
        name = "model" if len(runs) == 1 else "model, each seed"
        for number, density in enumerate(runs):
            panel.plot(x, density, color=colour, linewidth=1.3, label=None if number else name)
        _style(panel, label, "x", "density" if panel is panels[0] else "")
        panel.set_ylim(0, 1.6 * float(np.max(data)))  # a wrong model's peaks may be cut off
        panel.legend(frameon=False, fontsize=8, loc="upper right")
    return figure


def density_maps(
    limit: float, data: Float[np.ndarray, "n n"], models: Mapping[str, Float[np.ndarray, "n n"]]
) -> Figure:
    """Densities on the square [-limit, limit]^2, rows along the second axis of space, all in the same colours."""
    maps = {"data": data, **models}
    figure = Figure(figsize=(2.9 * len(maps) + 0.7, 3.2), layout="constrained")
    panels = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    scale = ScalarMappable(Normalize(0, 1.6 * float(np.max(data))), "viridis")
    for panel, (label, density) in zip(panels, maps.items(), strict=True):
        extent = (-limit, limit, -limit, limit)
        panel.imshow(density, origin="lower", extent=extent, norm=scale.norm, cmap=scale.cmap, interpolation="nearest")
        panel.set_title(label, fontsize=10, loc="left")
        panel.set_xlabel("$x_1$", fontsize=8.5)
        panel.tick_params(labelsize=8)
    panels[0].set_ylabel("$x_2$", fontsize=8.5)
    bar = figure.colorbar(scale, ax=panels, extend="max", shrink=0.85)
    bar.set_label("density", fontsize=8.5)
    bar.ax.tick_params(labelsize=8)
    return figure


def trajectories(t: Float[np.ndarray, " times"], panels: Mapping[str, Float[np.ndarray, "times paths"]]) -> Figure:
    """Paths in one dimension against time, two panels a row; for VE, give them divided by their scale."""
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(9.2, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, (label, paths) in zip(axes, panels.items(), strict=False):
        order = np.argsort(paths[0])
        shades = np.linspace(0, 1, paths.shape[1])
        for shade, path in zip(shades, paths[:, order].T, strict=True):
            panel.plot(t, path, color=(0.15 + 0.7 * shade, 0.35, 0.75 - 0.55 * shade), linewidth=0.7, alpha=0.8)
        _style(panel, label, "t", "x / standard deviation of $x_t$")
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    return figure


def distance_figure(models: Mapping[str, Mapping[str, DistanceCurve]]) -> Figure:
    """The distances between scores against time, a panel for each that there is, within two standard errors."""
    names = [name for name in DISTANCES if any(name in curves for curves in models.values())]
    figure = Figure(figsize=(3.9 * len(names), 3.3), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        for colour, (label, curves) in zip(colours(len(models)), models.items(), strict=True):
            if name in curves:
                _draw_curve(panel, curves[name], colour, label)
        panel.set_yscale("log")
        _style(panel, DISTANCES[name], "t", "nats per unit of time" if panel is panels[0] else "")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def start_figure(start: Float[np.ndarray, " starts"], models: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Mean of ln q - ln p against the time that the likelihood's solve starts at, with its error, of each model."""
    figure = Figure(figsize=(7.4, 3.4), layout="constrained")
    panel = figure.subplots()
    for colour, (label, (mean, se)) in zip(colours(len(models)), models.items(), strict=True):
        panel.plot(start, mean, color=colour, linewidth=1.5, label=label)
        panel.fill_between(start, mean - se, mean + se, color=colour, alpha=0.15, linewidth=0)
    panel.set_xscale("log")
    _style(panel, "", "time that the solve starts at", "NLL above that of the data's density, nats")
    shown = np.concatenate([mean for mean, _ in models.values()])
    if shown.max() > 5 * shown.min() > 0:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    return figure


def _draw_curve(panel: Axes, curve: DistanceCurve, colour: str, label: str) -> None:
    t, mean = curve.nodes.t, np.asarray(curve.mean)
    panel.plot(t, mean, color=colour, linewidth=1.5, label=label)
    factor = np.exp(2 * curve.se / mean)  # of the logarithm, as the axis shows it
    panel.fill_between(t, mean / factor, mean * factor, color=colour, alpha=0.15, linewidth=0)


def _style(panel: Axes, title: str, xlabel: str, ylabel: str) -> None:
    panel.set_title(title, fontsize=10, loc="left")
    panel.set_xlabel(xlabel, fontsize=8.5)
    panel.set_ylabel(ylabel, fontsize=8.5)
    panel.tick_params(labelsize=8)
    panel.grid(color="#e3e6ea", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
