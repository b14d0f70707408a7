"""Figures of the synthetic experiments: paths between data and prior, distances between scores, starting times."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.score_distances import DistanceCurve
from report.figures import colours, log_axis, style_panel

DISTANCES = {
    "score_matching": "model's score to the data's, $\\ell_{SM}$",
    "fisher": "ODE's score to the data's, $\\ell_{Fisher}$",
    "difference": "model's score to the ODE's, $\\ell_{Diff}$",
}
"""Titles of the panels, by the names of the fields of `score_distances.Distances`."""


def trajectories(t: Float[np.ndarray, " times"], panels: Mapping[str, Float[np.ndarray, "times _"]]) -> Figure:
    """Draws paths in one dimension against time, two panels in a row. Paths of VE must be divided by their scale."""
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(9.2, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, (label, paths) in zip(axes, panels.items(), strict=False):
        order = np.argsort(paths[0])
        shades = np.linspace(0, 1, paths.shape[1])
        for shade, path in zip(shades, paths[:, order].T, strict=True):
            panel.plot(t, path, color=(0.15 + 0.7 * shade, 0.35, 0.75 - 0.55 * shade), linewidth=0.7, alpha=0.8)
        style_panel(panel, label, "t", "x / standard deviation of $x_t$")
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    return figure


def distance_figure(models: Mapping[str, Mapping[str, DistanceCurve]]) -> Figure:
    """Draws distances between scores against time, plus and minus two standard errors: a panel for each distance."""
    names = [name for name in DISTANCES if any(name in curves for curves in models.values())]
    figure = Figure(figsize=(3.9 * len(names), 3.3), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        for colour, (label, curves) in zip(colours(len(models)), models.items(), strict=True):
            if name in curves:
                _draw_curve(panel, curves[name], colour, label)
        panel.set_yscale("log")
        style_panel(panel, DISTANCES[name], "t", "nats per unit of time" if panel is panels[0] else "")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def start_figure(start: Float[np.ndarray, " starts"], models: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Draws the mean of ln q - ln p and its error against the time at which the likelihood's solve starts."""
    figure = Figure(figsize=(7.4, 3.4), layout="constrained")
    panel = figure.subplots()
    for colour, (label, (mean, se)) in zip(colours(len(models)), models.items(), strict=True):
        panel.plot(start, mean, color=colour, linewidth=1.5, label=label)
        panel.fill_between(start, mean - se, mean + se, color=colour, alpha=0.15, linewidth=0)
    panel.set_xscale("log")
    style_panel(panel, "", "time that the solve starts at", "NLL above that of the data's density, nats")
    shown = np.concatenate([mean for mean, _ in models.values()])
    if shown.max() > 5 * shown.min() > 0:
        log_axis(panel, subs=(1, 2, 5))
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    return figure


def _draw_curve(panel: Axes, curve: DistanceCurve, colour: str, label: str) -> None:
    t, mean = curve.nodes.t, np.asarray(curve.mean)
    panel.plot(t, mean, color=colour, linewidth=1.5, label=label)
    factor = np.exp(2 * curve.se / mean)  # the axis is logarithmic
    panel.fill_between(t, mean / factor, mean * factor, color=colour, alpha=0.15, linewidth=0)
