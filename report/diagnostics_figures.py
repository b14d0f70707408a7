"""The figure of --mode=diagnose: bits/dim by the noise level of the start, and errors of a model by noise level."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from report.figures import colours, style_panel

PANELS = (
    ("bpd", "likelihood by start time", "ln(sigma / alpha) at the start", "bits/dim"),
    ("difference", "$\\ell_{Diff}$: model's to ODE's score", "ln(sigma / alpha)", "nats per unit of time"),
    ("first", "first-order loss", "ln(sigma / alpha)", "loss (dimensionless)"),
    ("trace_bias", "bias of the trace", "ln(sigma / alpha)", "per dimension"),
)
"""The name of each curve in the results, and the title and axes of its panel."""


def diagnostics_figure(models: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draws a panel for each curve, with a line for each model.

    Bands are plus and minus two standard errors; a single image has none.
    """
    figure = Figure(figsize=(9.2, 6.4), layout="constrained")
    panels = figure.subplots(2, 2).ravel()
    for panel, (name, title, xlabel, ylabel) in zip(panels, PANELS, strict=True):
        for colour, (label, curves) in zip(colours(len(models)), models.items(), strict=True):
            x = curves["start_log_noise_level" if name == "bpd" else "log_noise_level"]
            _draw(panel, x, curves[name], colour, label if panel is panels[0] else "")
        style_panel(panel, title, xlabel, ylabel)
    panels[3].axhline(0, color="#5a6472", linewidth=0.8)
    figure.legend(frameon=False, fontsize=8, loc="outside upper left")
    return figure


def _draw(
    panel: Axes, x: Sequence[float], estimates: Sequence[Mapping[str, float | None]], colour: str, label: str
) -> None:
    # null in the file becomes NaN.
    mean, se = (np.array([estimate[part] for estimate in estimates], np.float64) for part in ("mean", "se"))
    panel.plot(x, mean, ".-", color=colour, linewidth=1.5, label=label)
    panel.fill_between(x, mean - 2 * se, mean + 2 * se, color=colour, alpha=0.15, linewidth=0)
