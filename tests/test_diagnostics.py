"""--mode=diagnose: an exact score has no errors, and a run's diagnosis resumes and reaches the report."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import run_lib
from build import build
from configs.digits.smoke import get_config
from configs.toy.smoke import get_config as points
from dequantization.noise import dequantizer_from_config
from dequantization.training import evaluation_dequantizer
from evaluators.bits_per_dim import BitsPerDimEvaluator
from evaluators.diagnostics import DiagnosticsEvaluator
from experiments import diagnostics
from infra import parallel
from infra.files import write_atomic, write_npz
from infra.workdir import EvaluationFolder, Workdir
from tests.tiny_network import tiny_network


@pytest.fixture(autouse=True)
def in_place_of_ncsnpp() -> Iterator[None]:
    with tiny_network():
        yield


def test_start_times_begin_at_that_of_the_evaluation() -> None:
    """`eval.start_time` moves the first start time, and must leave room for others."""
    config = get_config()
    config.eval.start_time = 0.02
    run = build(config)
    dequantizer = dequantizer_from_config(config, run.sde)
    assert DiagnosticsEvaluator(run, dequantizer).starts[0] == 0.02
    with pytest.raises(ValueError, match=r"up to t = 0.3, but eval.dequantization=uniform starts at t = 0.4"):
        DiagnosticsEvaluator(run, dataclasses.replace(dequantizer, t_min=0.4))


def test_diagnosis_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model: its curves are finite, stored, read again, and drawn."""
    config = get_config()
    fields = {"batch_size": 4, "diagnose_images": 8, "diagnose_times": 2, "diagnose_starts": 2, "max_examples": 8}
    config.update_from_flattened_dict({f"eval.{name}": value for name, value in fields.items()})
    run = build(config)
    with run.open_checkpoints(Workdir(tmp_path)) as checkpoints:
        checkpoints.save(run.fresh_state())
    run_lib.diagnose(config, tmp_path)
    path = tmp_path / "eval" / "step_0.json"
    first = path.read_bytes()
    result = json.loads(first)["diagnostics"]
    assert (result["n"], len(result["bpd"]), len(result["difference"])) == (8, 2, 2)
    assert all(np.isfinite(estimate["mean"]) for name in ("bpd", "difference", "first") for estimate in result[name])
    assert result["trace_bias"][-1]["mean"] == pytest.approx(0, abs=0.2)  # an untrained network is 0 at large noise
    evaluator = BitsPerDimEvaluator(run, evaluation_dequantizer(run, Workdir(tmp_path / "deq")))
    folder = EvaluationFolder(Workdir(tmp_path), "bpd", "step_0", 0)
    bits = evaluator(run.load_state(tmp_path).ema_params, folder)["mean"]
    assert result["bpd"][0]["mean"] == pytest.approx(bits, rel=1e-5)  # the start of --mode=eval
    run_lib.diagnose(config, tmp_path)  # from the stored batches
    assert path.read_bytes() == first
    assert (tmp_path / "figures" / "diagnostics.png").stat().st_size > 1000
    assert "Diagnostics" in (tmp_path / "report.html").read_text()
    reports = []

    def check() -> None:
        reports.append(None)
        if len(reports) == 2:  # before the batch, and after the first step of the first solve
            raise KeyboardInterrupt

    monkeypatch.setattr(parallel, "check_stop", check)
    with pytest.raises(KeyboardInterrupt):
        run_lib.diagnose(config, tmp_path, "stopped")
    assert not list((tmp_path / "stopped").glob("*/*.npz"))
    with pytest.raises(ValueError, match="--mode=diagnose is for images"):
        run_lib.diagnose(points(), tmp_path)


def test_the_page_names_the_commits_of_its_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, folder in enumerate(diagnostics.MODELS.values()):
        write_atomic(Workdir(tmp_path / folder).environment, json.dumps({"commits": [f"abc{number}"]}))
        write_npz(tmp_path / folder / "eval" / "values" / "batch0_time0.npz", seconds=np.array(10.0 * number))
    monkeypatch.setattr(diagnostics, "commit", lambda: "def0")
    models = {name: {"values": "values"} for name in diagnostics.MODELS}
    part = diagnostics.provenance_part(tmp_path, models, {"commit": np.array("abc9"), "seconds": np.array(5.0)})
    assert "commits abc0, abc1, abc2, abc9, def0," in " ".join(part.split())
    assert "20 s (order 3), and the floor took 5 s." in " ".join(part.split())
