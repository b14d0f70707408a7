"""The page of the synthetic experiments, from results made up for it, and what the runs are told."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from build import build
from configs.toy.smoke import get_config
from experiments.reproduce import config_of, equal_time_steps
from experiments.reproduce_page import write_page
from experiments.synthetic import BRANCHES, PROBLEMS, STARTS, Problem
from experiments.toy_step import changed
from infra.files import write_atomic, write_npz

BOARD = next(problem for problem in PROBLEMS if problem.dataset == "checkerboard")
KL = {"order1": (0.5, 0.52, 0.48), "order2": (0.3, 0.31, 0.3), "order3": (0.3, 0.32, 0.28)}
TERMS = ("score_matching", "fisher", "difference", "cross", "second", "third", "entropy_score", "entropy_divergence")
SOURCES = ("source_first", "source_second", "source_third")


def measurements(value: float) -> dict[str, Any]:
    estimate = {"mean": value, "se": 0.01, "n": 100}
    sde = {"kl": value / 2, "end": 0.0, "score_matching": value, "gap": value / 2}
    return {"kl": value} | dict.fromkeys((*TERMS, *SOURCES), estimate) | {"sde": sde}


def write_results(problem: Problem, folder: Path, seed: int) -> None:
    nodes = np.linspace(0.05, 0.95, 4)
    curves = {f"{c}_{part}": nodes for c in ("score_matching", "fisher", "difference") for part in ("mean", "se")}
    variance = {"loss_variance": {"uniform": 30.0, "importance": 2.0}}
    for name in BRANCHES:
        kl = KL.get(name, (0.4,) * 3)[seed - 1]
        result = {"step": 100, "seconds_per_step": 0.002, "nll": kl + 3.466} | measurements(kl) | variance
        write_atomic(folder / f"{name}.json", json.dumps(result))
        grid = np.full(problem.grid**2, 1 / 32)
        points = np.full(10, kl) + np.linspace(-1, 1, 10)
        arrays = {"density": grid, "points_kl": points, "nodes_t": nodes, "nodes_weight": nodes}
        starts = {"start": STARTS, "excess": np.full((len(STARTS), 10), kl)}
        write_npz(folder / f"{name}.npz", **arrays, **curves, **starts)
    paths = dict.fromkeys(("ode_forward", "ode_reverse", "sde_reverse"), np.ones((4, 3)))
    for name in ("order1", "order3"):
        write_npz(folder / f"paths_{name}.npz", t=nodes, **paths)
    write_atomic(folder.parent / "floor.json", json.dumps(measurements(2e-5)))
    write_atomic(folder / "seconds.json", json.dumps({"wall": 60.0, "cpu": 30.0, "commit": f"abc{seed}"}))


def test_page(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write_results(BOARD, tmp_path / "runs" / BOARD.name / f"seed{seed}", seed)
    write_page(PROBLEMS, tmp_path / "runs", tmp_path / "docs")
    path = tmp_path / "docs" / "results" / "synthetic.md"
    text = path.read_text()
    assert f"## {BOARD.title}" in text
    assert "## Mixture, VP" not in text  # nothing of it is there
    assert 'The NLL of "order 2" is 0.1967 ± 0.0088 nats below that of "order 1", beyond two standard errors.' in text
    assert 'The NLL of "order 3" is 0.0033 ± 0.0088 nats below that of "order 2", within two standard errors.' in text
    assert "order 3 against order 1 -0.2000 ± 0.0000" in text  # the spread over points cancels
    assert "| exact score |  |  |  | 2e-05 |" in text  # there is no NLL of the exact score
    assert "tolerance 1e-06" in text
    assert "commits abc1, abc2, abc3" in text
    for kind in ("density", "distances", "starts", "paths"):
        assert (tmp_path / "docs" / "images" / f"synthetic_{BOARD.name}_{kind}.png").stat().st_size > 1000
    write_atomic(path, text + "\nBy hand.\n")
    write_page(PROBLEMS, tmp_path / "runs", tmp_path / "docs")
    assert path.read_text() == text + "\nBy hand.\n"


def test_a_page_without_results_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no complete comparison"):
        write_page(PROBLEMS, tmp_path / "missing", tmp_path / "docs")
    assert not (tmp_path / "docs").exists()


def test_the_longer_run_does_not_change_its_own_length(tmp_path: Path) -> None:
    for name, rate in (("order1", 300.0), ("order3", 100.0)):
        record = {"step": 100, "split": "train", "first": 1.0, "steps_per_second": rate}
        write_atomic(tmp_path / name / "train" / "metrics.jsonl", json.dumps(record) + "\n")
    assert equal_time_steps(BOARD, tmp_path) == 3 * BOARD.steps
    with (tmp_path / "order1" / "train" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 200, "split": "train", "first": 1.0, "steps_per_second": 600.0}) + "\n")
    assert equal_time_steps(BOARD, tmp_path) == 3 * BOARD.steps


def test_a_setting_that_is_no_field_is_refused():
    with pytest.raises(KeyError, match="batchsize"):
        config_of(BOARD, {"training.batchsize": 3})
    with pytest.raises(KeyError, match=r"has no field training.batchsize; did you mean training.batch_size\?'$"):
        changed(get_config(), ["training.batchsize=3"])
    with pytest.raises(ValueError, match=r"--set training.batch_size=a: this is not a value of .*, such as \d+$"):
        changed(get_config(), ["training.batch_size=a"])
    assert changed(get_config(), ["training.batch_size=3"]).training.batch_size == 3


def test_settings_are_a_configuration():
    for problem in PROBLEMS:
        run = build(config_of(problem, problem.settings(3) | {"training.score_matching_order": 3}))
        assert run.config.seed == 3
        assert run.density is not None
        points = run.density.sample(jax.random.key(0), (1000, run.density.dims))
        assert abs(points).max() < problem.limit  # the picture of the density shows all of the data
        # the checkpoint at equal steps must be one of those that are kept
        assert problem.steps % 2 == 0
