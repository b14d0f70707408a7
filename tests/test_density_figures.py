"""Figures of points, densities, paths and distances: their panels, axes and content."""

import io

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from analysis.score_distances import DistanceCurve, TimeNodes
from experiments.synthetic_figures import DISTANCES, distance_figure, trajectories
from report.density_figures import density_curves, density_maps, point_figure
from report.figures import figure_png

X = np.linspace(-2, 2, 50)
BELL = np.exp(-0.5 * X**2) / np.sqrt(2 * np.pi)


def checked(figure: Figure) -> Figure:
    """Returns the figure after a check that it has more than one colour and that every panel has labels."""
    with Image.open(io.BytesIO(figure_png(figure))) as image:
        assert len(np.unique(np.asarray(image.convert("L")))) > 10
    for panel in figure.axes:
        assert panel.get_xlabel() or panel.get_ylabel()
    return figure


def test_density_curves_have_a_line_for_each_run():
    figure = checked(density_curves(X, BELL, {"order 1": [BELL, 2 * BELL], "order 3": [BELL]}))
    assert [len(panel.lines) for panel in figure.axes] == [2, 1]
    np.testing.assert_array_equal(figure.axes[0].lines[1].get_ydata(), 2 * BELL)
    assert [panel.get_title(loc="left") for panel in figure.axes] == ["order 1", "order 3"]


def test_there_is_a_panel_and_a_colour_for_any_number_of_models():
    models = {f"order {k}": [BELL] for k in range(7)}
    assert [len(panel.lines) for panel in checked(density_curves(X, BELL, models)).axes] == [1] * 7
    nodes = TimeNodes(np.linspace(0.01, 0.99, 8), np.full(8, 0.125))
    curve = DistanceCurve(nodes, np.linspace(1, 2, 8), np.full(8, 0.1), 10)
    (panel,) = checked(distance_figure({label: {"fisher": curve} for label in models})).axes
    assert len(panel.lines) == 7


def test_density_maps_share_their_colours():
    data = np.outer(BELL, BELL)
    figure = checked(density_maps(2.0, data, {"order 1": 0.5 * data}))
    images = [panel.images[0] for panel in figure.axes if panel.images]
    assert len(images) == 2
    assert images[0].get_clim() == images[1].get_clim()
    np.testing.assert_array_equal(images[1].get_array(), 0.5 * data)


def test_points_are_drawn_around_the_data():
    clouds = {"data": np.array([[0.0, 2.0], [-4.0, 1.0]]), "model": np.array([[1.0, 1.0], [100.0, 0.0]])}
    figure = checked(point_figure(clouds))
    assert [panel.get_xlim() for panel in figure.axes] == [(-6, 6)] * 2
    np.testing.assert_array_equal(figure.axes[1].lines[0].get_xydata(), clouds["model"])
    figure = checked(point_figure({"data": np.linspace(-1, 1, 61)[:, None]}))
    assert figure.axes[0].get_ylabel() == "density"


def test_trajectories():
    t = np.linspace(0, 1, 20)
    paths = np.random.default_rng(0).normal(size=(20, 7))
    figure = checked(trajectories(t, {"SDE": paths, "ODE": 2 * paths}))
    assert [len(panel.lines) for panel in figure.axes] == [7, 7]


def test_distances_are_drawn_where_they_are_known():
    nodes = TimeNodes(np.linspace(0.01, 0.99, 8), np.full(8, 0.125))
    curve = DistanceCurve(nodes, np.linspace(1, 2, 8), np.full(8, 0.1), 10)
    figure = checked(distance_figure({"order 1": dict.fromkeys(DISTANCES, curve), "order 2": {"difference": curve}}))
    assert [len(panel.lines) for panel in figure.axes] == [1, 1, 2]
    assert [panel.get_title(loc="left") for panel in figure.axes] == list(DISTANCES.values())
