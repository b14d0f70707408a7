"""The page about preconditioned scores, from stored results."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import main_calls, preconditioning
from experiments.noise_levels import SIGMAS, levels_file
from experiments.preconditioning import LEVEL_BATCHES, MODELS, QUANTITIES, SEEDS, folder_of, page_parts, run_model
from infra.files import write_atomic, write_npz
from infra.workdir import Workdir

IMAGES = 8


def write_run(runs: Path, name: str, seed: int) -> None:
    """Writes what the page reads: bits/dim of the second model are 0.2 lower, and its gap is smaller."""
    folder = folder_of(runs, name, seed)
    rates = [{"step": step, "split": "train", "first": 1.0, "steps_per_second": 4.0} for step in (100, 200)]
    write_atomic(folder / "train" / "metrics.jsonl", "".join(json.dumps(rate) + "\n" for rate in rates))
    write_atomic(folder / "environment.json", json.dumps({"commits": ["1a2b3c4"]}))
    means = {"ODE at x": 2.0, "ODE at x_tmin": 2.12, "bound at x_tmin": 2.1}
    images = np.linspace(-0.5, 0.5, IMAGES) + seed / 100
    for quantity, (evaluation, part) in QUANTITIES.items():
        lower = 0.0 if name == "published" else 0.22 if "ODE" in quantity else 0.2
        write_npz(folder / evaluation / part / "repeat0_batch0.npz", bpd=images + means[quantity] - lower)
        path = folder / evaluation / "step_4000.json"
        result = json.loads(path.read_text()) if path.exists() else {"samples": {"fid": 1.5}}
        result[part] = {"values": part, "errors": {"solver_error": -0.001}}
        write_atomic(path, json.dumps(result))
    terms = np.full((len(SIGMAS), IMAGES), 0.2 if name == "published" else 0.1)
    write_npz(levels_file(folder), first=terms, second=terms, step=0, batches=LEVEL_BATCHES)


def test_the_page(tmp_path: Path) -> None:
    for name in MODELS:
        for seed in SEEDS:
            write_run(tmp_path, name, seed)
    parts = page_parts(tmp_path, tmp_path / "images")
    lines = parts["results"].splitlines()
    assert (
        "| published | 0.250 | 2.020 ± 0.006 | 2.140 ± 0.006 | 2.120 ± 0.006 | +0.020 ± 0.000 | 1.500 ± 0.000 |"
        in lines
    )
    assert "| preconditioned | ODE at x | +0.2200 ± 0.0000 | 0.0000 |" in lines
    assert "| preconditioned | bound at x_tmin | +0.2000 ± 0.0000 | 0.0000 |" in lines
    assert "| 0.012 | 0.20000 | 0.10000 | -50.0% ± 0.0% |" in lines
    assert "1 / (2 d) = 0.0078" in parts["results"]
    assert "1a2b3c4" in parts["provenance"]
    assert (tmp_path / "images" / "preconditioning.png").stat().st_size > 1000


def test_what_exists_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def call(*arguments: str) -> None:
        calls.append(arguments[2:4])
        if "--eval_folder=eval_bound" in arguments and interrupted:
            raise KeyboardInterrupt

    for module in (preconditioning, main_calls):
        monkeypatch.setattr(module, "call_main", call)
    write_run(tmp_path, "published", 1)
    folder, interrupted = folder_of(tmp_path, "published", 1), True
    training, evaluation = ("--config.seed=1", "--mode=train"), ("--mode=eval", "--eval_folder=eval")
    bound = ("--mode=eval", "--eval_folder=eval_bound")
    with pytest.raises(KeyboardInterrupt):
        run_model("published", 1, folder)
    assert calls == [training, evaluation, bound], "a result may have only some of its parts"
    (Workdir(folder).checkpoints / "4000").mkdir(parents=True)
    write_npz(levels_file(folder), first=np.ones(1), second=np.ones(1), step=4000, batches=LEVEL_BATCHES)
    interrupted = False
    run_model("published", 1, folder)
    assert calls[3:] == [evaluation, bound], "the checkpoint is another one"
    run_model("published", 1, folder)
    assert len(calls) == 5, "the same calls again"
