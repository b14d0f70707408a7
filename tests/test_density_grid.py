"""The density of a model of points on a grid, and what the report makes of it."""

import numpy as np
import pytest

from build import build
from configs.toy.smoke import get_config
from evaluators.points import PointLikelihoodEvaluator, grid_points
from infra.files import read_npz, write_npz
from infra.workdir import EvaluationFolder, Workdir
from report.page import write_report
from report.run_files import read_run


@pytest.fixture(scope="module")
def params():
    return build(get_config()).fresh_state().ema_params


def evaluator_with(cells: int) -> PointLikelihoodEvaluator:
    config = get_config()
    config.eval.density_grid = cells
    return PointLikelihoodEvaluator(build(config))


def folder_in(path) -> EvaluationFolder:
    return EvaluationFolder(Workdir(path), "eval", "step_7", 7)


def test_is_the_likelihood_of_the_evaluator(params, tmp_path):
    evaluator = evaluator_with(0)
    nll = evaluator(params, folder_in(tmp_path))
    points = evaluator.source.images(np.arange(len(evaluator.source)))
    density = evaluator.model_density(params, points)
    assert -np.log(density).mean() == pytest.approx(nll["mean"], abs=1e-5)
    assert not (tmp_path / "density").exists(), "with no cells, no density is drawn"


def test_grid_of_the_report(params, tmp_path):
    evaluator = evaluator_with(4)
    evaluator(params, folder_in(tmp_path))
    arrays = read_npz(tmp_path / "density" / "step_7.npz")
    x = grid_points(float(arrays["limit"]), 4, 2)
    np.testing.assert_allclose(
        x[1] - x[0], np.array([float(arrays["limit"]) / 2, 0.0])
    )  # the first axis of space runs along rows
    expected = evaluator.model_density(params, x)
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
