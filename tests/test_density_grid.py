"""The density of a model of points on a grid, and what the report makes of it."""

import numpy as np
import pytest

from build import build
from configs.toy.smoke import get_config
from files import read_npz
from passes.density import DensityPass
from passes.density_grid import CELLS_OF_A_LINE, draw_density, grid_points, model_density
from report import write_report
from run_files import read_run


def of_points(dataset: str):
    """A run of an untrained model, its likelihood pass and its parameters."""
    config = get_config()
    config.update_from_flattened_dict({"data.dataset": dataset, "data.random_flip": False})
    run = build(config)
    return run, DensityPass(run), run.fresh_state().ema_params


def test_is_the_likelihood_of_the_pass(tmp_path):
    run, density_pass, params = of_points("checkerboard")
    nll = density_pass(params, tmp_path)
    points = density_pass.source.images(np.arange(len(density_pass.source)))
    density = model_density(run, density_pass, params, points)
    assert -np.log(density).mean() == pytest.approx(nll["mean"], abs=1e-5)


@pytest.mark.parametrize(("dataset", "shape"), [("checkerboard", (4, 4)), ("mixture", (4 * CELLS_OF_A_LINE,))])
def test_grid_of_the_report(dataset, shape, tmp_path):
    run, density_pass, params = of_points(dataset)
    draw_density(run, density_pass, params, 4, "step_7", 7, tmp_path)
    arrays = read_npz(tmp_path / "density" / "step_7.npz")
    limit, cell = float(arrays["limit"]), np.prod([2 * float(arrays["limit"]) / n for n in shape])
    assert arrays["density"].shape == arrays["data"].shape == shape
    x = grid_points(limit, shape[0], len(shape))
    expected = model_density(run, density_pass, params, x)
    np.testing.assert_allclose(arrays["density"].ravel(), expected, rtol=1e-6)
    if dataset == "mixture":
        assert arrays["data"].sum() * cell == pytest.approx(1, abs=0.05)
    else:  # the first axis of space runs along rows
        assert np.argmax(x[1] - x[0]) == 0
    grid = read_run(tmp_path).density
    assert grid is not None
    assert (grid.step, grid.limit) == (7, limit)
    write_report(tmp_path)
    assert "<h2>Density</h2>" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "figures" / "density.png").stat().st_size > 1000


def test_nothing_is_drawn_with_no_cells(tmp_path):
    run, density_pass, params = of_points("checkerboard")
    draw_density(run, density_pass, params, 0, "step_7", 7, tmp_path)
    assert list(tmp_path.iterdir()) == []
