"""Released checkpoints through the entry points: continued, evaluated and exported, on a tiny network."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import msgpack_restore

import run_lib
from build import Run, build
from configs.default import Config
from configs.digits.smoke import get_config
from evaluators.export import export
from infra.published_checkpoints import write_published_checkpoint
from infra.workdir import Workdir
from tests.forked_main import run_main
from tests.tiny_network import tiny_network
from train_state import TrainState

FIRST_STEP, OWN_STEPS = 30, 5


@pytest.fixture(scope="module", autouse=True)
def in_place_of_ncsnpp() -> Iterator[None]:
    with tiny_network():
        yield


def config_with(**fields: Any) -> Config:
    config = get_config()
    config.training.log_freq = 1
    config.training.snapshot_freq = 1
    config.training.n_iters = FIRST_STEP + 2
    config.eval.enable_sampling = False
    config.eval.num_repeats = 1
    config.eval.max_examples = 16
    config.eval.batch_size = 16
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


def trained_state(run: Run) -> TrainState:
    """Parameters away from the nearly zero first ones, averages unlike them, a step in the middle of training."""
    state = run.fresh_state()
    leaves, tree = jax.tree.flatten(state.params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    noise = tree.unflatten([0.05 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)])
    params = jax.tree.map(jnp.add, state.params, noise)
    ema_params = jax.tree.map(lambda p, n: p - 0.5 * n, params, noise)
    step = jnp.int32(FIRST_STEP)
    opt_state = jax.tree.map(lambda a: jnp.full_like(a, 0.01) if a.ndim else step.copy(), state.opt_state)
    return TrainState(step, params, ema_params, opt_state)


@pytest.fixture(scope="module")
def released_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("released") / "checkpoint_26"
    write_published_checkpoint(path, trained_state(build(config_with())), lr=2e-4, ema_rate=0.999)
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose own checkpoint is the same state."""
    workdir, run = tmp_path_factory.mktemp("own") / "run", build(config_with())
    with run.open_checkpoints(Workdir(workdir)) as checkpoints:
        checkpoints.save(trained_state(run))
    return workdir


def test_an_export_is_a_published_checkpoint(own: Path) -> None:
    """Round trip: the exported file is read as the same state, and holds what the published code reads."""
    run = build(config_with())
    path = export(config_with(), own)
    assert path == own / "exported" / f"checkpoint_{FIRST_STEP}"
    for a, b in zip(jax.tree.leaves(run.load_state(path)), jax.tree.leaves(run.load_state(own)), strict=True):
        np.testing.assert_array_equal(a, b)
    content: Any = msgpack_restore(path.read_bytes())
    assert (float(content["lr"]), float(content["ema_rate"])) == (config_with().optim.lr, config_with().model.ema_rate)
    with pytest.raises(FileNotFoundError, match="no dequantizer in"):
        export(config_with(eval__dequantizer=True), own)


@pytest.fixture(scope="module")
def continued(released_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of order 3 from the released file."""
    workdir = tmp_path_factory.mktemp("continued") / "run"
    run_lib.train(config_with(training__score_matching_order=3, training__init_from=str(released_file)), workdir)
    return workdir


def train_records(workdir: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (workdir / "train" / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["split"] == "train"]


def test_a_released_checkpoint_goes_on_at_order_3(continued: Path, own: Path, tmp_path: Path) -> None:
    """The first losses are computed with the original parameters, on the same batch and noise."""
    run_lib.train(config_with(training__score_matching_order=3, training__init_from=str(own)), tmp_path / "run")
    records, want = train_records(continued), train_records(tmp_path / "run")
    assert [record["step"] for record in records] == [FIRST_STEP + 1, FIRST_STEP + 2]
    for name in ("order", "total", "first", "third", "grad_norm"):
        assert [record[name] for record in records] == [record[name] for record in want]
        assert np.isfinite(records[0][name])
        assert records[0][name] > 0
    assert records[0]["order"] == 3


def test_starting_from_a_step_of_a_run(continued: Path, released_file: Path) -> None:
    run = build(config_with())
    first, last = FIRST_STEP + 1, FIRST_STEP + 2
    assert int(run.load_state(continued).step) == last
    assert int(run.load_state(continued / "checkpoints" / str(first)).step) == first
    config = config_with(training__init_from=str(released_file), training__init_reset="step,opt,ema")
    state = run_lib.initial_state(build(config))
    assert int(state.step) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
    for params in (state.params, state.ema_params):
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, trained_state(run).params)))


def result_files(workdir: Path) -> list[Path]:
    return [path for path in (workdir / "eval").glob("*.json") if not path.stem.endswith("_seconds")]


def test_a_released_file_is_evaluated_directly(released_file: Path, own: Path, continued: Path, tmp_path: Path) -> None:
    """The same bits/dim as from a run whose checkpoint is that state, stamped with file and hash."""
    run_lib.evaluate(config_with(eval__checkpoint=str(released_file)), tmp_path / "released", "eval")
    (path,) = result_files(tmp_path / "released")
    result = json.loads(path.read_text())
    assert path.name.startswith("checkpoint_26_")
    assert result["checkpoint"] == str(released_file)
    assert result["checkpoint_sha256"] == hashlib.sha256(released_file.read_bytes()).hexdigest()
    assert result["checkpoint_step"] == FIRST_STEP
    assert result["bpd"]["n"] == 16
    assert (tmp_path / "released" / "report.html").exists()
    assert json.loads((tmp_path / "released" / "config.json").read_text())["eval"]["checkpoint"] == str(released_file)

    run_lib.evaluate(config_with(), own, "eval")
    of_own = json.loads((own / "eval" / f"step_{FIRST_STEP}.json").read_text())
    assert of_own["bpd"]["mean"] == result["bpd"]["mean"]

    other = continued / "checkpoints" / str(FIRST_STEP + 1)
    run_lib.evaluate(config_with(eval__checkpoint=str(other)), tmp_path / "released", "eval")
    results = [json.loads(path.read_text()) for path in result_files(tmp_path / "released")]
    assert sorted(r["checkpoint_step"] for r in results) == [FIRST_STEP, FIRST_STEP + 1]


def test_a_released_checkpoint_is_continued_and_its_last_step_evaluated(released_file: Path, tmp_path: Path) -> None:
    """As the README does it: some steps of order 3 from a file in the released format, with the published eval fields.

    The configuration names the checkpoint at which the run starts, but the last step is evaluated.
    """
    config = config_with(
        training__score_matching_order=3,
        training__init_from=str(released_file),
        training__n_iters=10,  # far before the start
        training__n_iters_from_start=OWN_STEPS,
        training__snapshot_freq=FIRST_STEP,
        training__snapshot_sampling=False,
        eval__begin_ckpt=1,
        eval__end_ckpt=1,
        eval__enable_loss=True,
        eval__enable_bpd=False,
    )
    end = FIRST_STEP + OWN_STEPS
    run_lib.train(config, tmp_path)
    run_lib.evaluate(config, tmp_path, "eval")
    (path,) = result_files(tmp_path)
    result = json.loads(path.read_text())
    assert path.name == f"step_{end}.json"
    assert (result["checkpoint_step"], result["own_steps"], result["order"]) == (end, OWN_STEPS, 3)
    assert (result["started_from"], result["start_step"]) == (str(released_file), FIRST_STEP)
    assert result["loss"]["third"]["mean"] > 0
    run_lib.train(config, tmp_path)  # resumes at the end: nothing is left to do
    assert int(build(config).load_state(tmp_path).step) == end


def test_what_the_command_says(released_file: Path, tmp_path: Path) -> None:
    """One line for a file that does not fit or is not there, and nothing written."""
    missing, run = tmp_path / "checkpoint_27", tmp_path / "run"
    command = ["--config=configs/digits/smoke.py", f"--workdir={run}", "--mode=eval"]
    cases = {
        "of another shape": (released_file, "--config.model.nf=16"),
        "which does not exist": (missing, "--config.model.nf=8"),
    }
    ended = run_main(
        {said: [*command, f"--config.eval.checkpoint={path}", field] for said, (path, field) in cases.items()}
    )
    for said, (path, _) in cases.items():
        (line,) = ended[said].said
        assert ended[said].code == 2
        assert said in line
        assert str(path) in line
    assert not run.exists()
