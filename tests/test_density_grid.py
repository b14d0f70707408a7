"""The density of a model of points on a grid, and what the report makes of it."""

import numpy as np
import pytest

from build import build
from configs.toy.smoke import get_config
from files import read_npz, write_npz
from passes.density import DensityPass
from passes.density_grid import draw_density, grid_points, model_density
from report import write_report
from run_files import read_run


@pytest.fixture(scope="module")
def untrained():
    """A run of a model of points, its likelihood pass and its parameters."""
    run = build(get_config())
    return run, DensityPass(run), run.fresh_state().ema_params


def test_is_the_likelihood_of_the_pass(untrained, tmp_path):
    run, density_pass, params = untrained
    nll = density_pass(params, tmp_path)
    points = density_pass.source.images(np.arange(len(density_pass.source)))
    density = model_density(run, density_pass, params, points)
    assert -np.log(density).mean() == pytest.approx(nll["mean"], abs=1e-5)


def test_grid_of_the_report(untrained, tmp_path):
    run, density_pass, params = untrained
    draw_density(run, density_pass, params, 4, "step_7", 7, tmp_path)
    arrays = read_npz(tmp_path / "density" / "step_7.npz")
    x = grid_points(float(arrays["limit"]), 4, 2)
    np.testing.assert_allclose(
        x[1] - x[0], np.array([float(arrays["limit"]) / 2, 0.0])
    )  # the first axis of space runs along rows
    expected = model_density(run, density_pass, params, x)
    np.testing.assert_allclose(arrays["density"], expected.reshape(4, 4), rtol=1e-6)
    assert arrays["data"].shape == (4, 4)
    assert arrays["data"].mean() == pytest.approx(1 / 64)  # every second cell
    check_report(tmp_path, float(arrays["limit"]))


def test_report_of_one_dimension(tmp_path):
    density = np.exp(-0.5 * grid_points(2.0, 40, 1)[:, 0] ** 2)
    write_npz(tmp_path / "density" / "step_3.npz", density=density, data=density, limit=9.0, step=3)
    write_npz(tmp_path / "density" / "step_7.npz", density=density, data=density, limit=2.0, step=7)
    check_report(tmp_path, 2.0)


def check_report(workdir, limit: float) -> None:
    grid = read_run(workdir).density
    assert grid is not None
    assert (grid.step, grid.limit) == (7, limit)  # the newest
    write_report(workdir)
    assert "<h2>Density</h2>" in (workdir / "report.html").read_text()
    assert (workdir / "figures" / "density.png").stat().st_size > 1000


def test_nothing_is_drawn_with_no_cells(untrained, tmp_path):
    run, density_pass, params = untrained
    draw_density(run, density_pass, params, 0, "step_7", 7, tmp_path)
    assert list(tmp_path.iterdir()) == []
