"""The experiment behind `make ncsn`: its ladders, and what it measures."""

from pathlib import Path

import numpy as np
import pytest

from build import build
from configs.digits.ncsn import get_config as digits
from configs.toy.far_modes_ve import get_config as far_modes
from evaluators.extractor import Features
from experiments.ncsn_cases import (
    IMAGE_CASES,
    IMAGE_STEPS,
    LONG_CASES,
    POINT_CASES,
    POINT_STEPS,
    SAMPLING_SEEDS,
    Case,
)
from experiments.ncsn_page import class_error, point_row, write_page
from infra.files import write_npz
from report.formatting import MISSING
from samplers.langevin import LangevinSampler


@pytest.mark.parametrize(
    ("default", "steps", "cases"),
    [(far_modes, POINT_STEPS, (*POINT_CASES, *LONG_CASES)), (digits, IMAGE_STEPS, IMAGE_CASES)],
    ids=["points", "digits"],
)
def test_ladders_of_the_cases(default, steps, cases):
    """Every ladder ends at its smallest level, with NCSN's ratio of step size and level, and has the same length."""
    for case in cases:
        sampler = build(case.configure(default(), steps)).sampler()
        assert isinstance(sampler, LangevinSampler)
        rhos = np.exp(sampler.log_rhos)
        assert len(rhos) == case.levels
        np.testing.assert_allclose(rhos[-1], case.smallest, rtol=1e-3)
        if case.levels > 1:
            np.testing.assert_allclose(rhos[0], sampler.sde.prior_sigma, rtol=1e-4)
        assert sampler.step_size / case.smallest**2 == pytest.approx(2e-5 / 0.01**2)  # [SE19] Sec. 5
        assert sampler.noise_removal == case.denoised
        assert case.total_steps(steps) == case.levels * sampler.steps_per_level
        assert case.total_steps(steps) == pytest.approx(case.longer * steps, rel=0.04)
    assert len({case.name for case in cases}) == len(cases)


def test_the_row_of_a_case(tmp_path):
    """Of 4 points, 1, 2, 0, 1, 1 lie in the small mode in the five runs: the mean is 1 / 4, and the spread is known."""
    case = Case(3, 0.5)
    for kind, counts in (("exact", (1, 2, 0, 1, 1)), ("network", (1, 1, 1))):
        for seed, count in enumerate(counts):
            points = np.repeat([[-5.0, -5.0], [5.0, 5.0]], [count, 4 - count], axis=0)
            write_npz(tmp_path / kind / f"{case.name}_seed{seed}.npz", samples=points)
    error = np.std([0.25, 0.5, 0, 0.25, 0.25], ddof=1) / 5**0.5
    assert point_row(tmp_path, case) == ["3 levels to 0.5", "999", f"0.2500 ± {error:.4f}", "0.2500 ± 0.0000"]


@pytest.mark.parametrize("kinds", [(), ("exact",), ("network",)], ids=str)
def test_the_page_without_some_samples(kinds: tuple[str, ...], tmp_path: Path) -> None:
    for kind in kinds:
        for case in POINT_CASES:
            for seed in SAMPLING_SEEDS:
                result = {"samples": np.full((4, 2), 5.0), "seconds": 60.0, "commit": "1a2b3c4"}
                write_npz(tmp_path / "runs" / kind / f"{case.name}_seed{seed}.npz", **result)
    write_page(tmp_path / "runs", tmp_path / "docs")
    page = (tmp_path / "docs" / "results" / "ncsn.md").read_text()
    cells = ["0.0000 ± 0.0000" if kind in kinds else MISSING for kind in ("exact", "network")]
    assert f"| 30 levels to 0.5 | 990 | {' | '.join(cells)} |" in page.splitlines()
    assert ("1a2b3c4" in page) == bool(kinds)
    assert "The part with digits has not been run yet." in page
    assert (tmp_path / "docs" / "images" / "ncsn_points.png").stat().st_size > 1000


def test_the_error_of_the_classes():
    """Half of the images are in one of four classes, and half in another: two classes are too frequent by 1 / 4."""
    logits = np.eye(4)[[0, 0, 1, 1]]
    assert class_error(Features(np.zeros((4, 2)), logits)) == 0.5
    assert class_error(Features(np.zeros((4, 2)), np.eye(4))) == 0
