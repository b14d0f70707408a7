"""Released checkpoints: what is read is what the file holds, and what does not fit is named."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.serialization import msgpack_restore, msgpack_serialize
from flax.traverse_util import flatten_dict, unflatten_dict

import run_lib
from build import Run, build
from configs.default import Config
from configs.digits.smoke import get_config
from infra.published_checkpoints import read_published_checkpoint, write_published_checkpoint
from infra.workdir import Workdir
from models.score import ScoreModel, build_network
from sde_lib import VESDE
from tests.golden_common import golden_config
from train_state import TrainState, create_state, optimizer_from_config

ROOT = Path(__file__).parent.parent
GOLDEN = {sde: ROOT / "tests" / "golden" / f"released_checkpoint_{sde}" for sde in ("ve", "vp")}
STEP, OWN_STEPS = 1234, 5


def config_of(sde: str) -> Config:
    return golden_config(np.load(GOLDEN[sde].with_suffix(".npz")))


def state_like(config: Config) -> TrainState:
    size = config.data.image_size
    network, shape = build_network(config), (size, size, config.data.num_channels)
    optimizer = optimizer_from_config(config.optim, config.training.n_iters)
    return jax.eval_shape(lambda: create_state(ScoreModel(network, VESDE()).init(jax.random.key(0), shape), optimizer))


def raw_leaves(path: Path) -> dict[str, Any]:
    return flatten_dict(msgpack_restore(path.read_bytes()), sep="/", keep_empty_nodes=True)


def flat(tree: Any, prefix: str = "") -> dict[str, np.ndarray]:
    return {prefix + name: np.asarray(leaf) for name, leaf in flatten_dict(tree, sep="/").items()}


@pytest.mark.parametrize("sde", GOLDEN)
def test_every_leaf_is_where_it_belongs(sde: str) -> None:
    """Values as in the file; GroupNorm's, of shape (1, 1, 1, C) in the older one, as the network has them."""
    raw, config = raw_leaves(GOLDEN[sde]), config_of(sde)
    like = state_like(config)
    state = read_published_checkpoint(GOLDEN[sde], like)
    assert jax.tree.structure(state) == jax.tree.structure(like)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
    counts = [np.asarray(leaf) for leaf in jax.tree.leaves(state.opt_state) if leaf.dtype == jnp.int32]
    assert int(state.step) == STEP
    assert counts == [STEP, STEP], "Adam's and the learning rate's"
    opt_state: Any = state.opt_state
    (adam,) = (part for part in opt_state if isinstance(part, optax.ScaleByAdamState))
    moments = "optimizer/state/param_states/"
    got = flat(state.params, "optimizer/target/") | flat(state.ema_params, "params_ema/")
    got |= {f"{name}/grad_ema": leaf for name, leaf in flat(adam.mu, moments).items()}
    got |= {f"{name}/grad_sq_ema": leaf for name, leaf in flat(adam.nu, moments).items()}
    assert len(got) == len([leaf for leaf in raw.values() if getattr(leaf, "ndim", 0) and leaf.dtype == np.float32])
    for name, leaf in got.items():
        np.testing.assert_array_equal(leaf, raw[name].reshape(leaf.shape), err_msg=name)
    stored = {raw[name].ndim for name in got if re.search(r"GroupNorm_\d/scale$", name)}
    assert stored == ({4} if sde == "vp" else {1})


def test_the_next_step_is_that_of_the_raw_moments() -> None:
    """Adam by hand in float64, from the file's moments and step: warm-up, clipping and weight decay included."""
    config = config_of("vp")
    config.optim.weight_decay = 0.01
    state = read_published_checkpoint(GOLDEN["vp"], state_like(config))
    leaves, tree = jax.tree.flatten(state.params)
    rng = np.random.default_rng(0)
    gradient = tree.unflatten([jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])
    updates, _ = jax.jit(optimizer_from_config(config.optim, config.training.n_iters).update)(
        gradient, state.opt_state, state.params
    )

    raw, gradients = raw_leaves(GOLDEN["vp"]), flat(gradient)
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
    assert norm > config.optim.grad_clip
    rate, n = config.optim.lr * STEP / config.optim.warmup, STEP + 1
    for name, update in flat(updates).items():
        g = gradients[name].astype(np.float64) * config.optim.grad_clip / norm
        old = [raw[f"optimizer/state/param_states/{name}/{m}"].reshape(g.shape) for m in ("grad_ema", "grad_sq_ema")]
        first = (0.9 * old[0] + 0.1 * g) / (1 - 0.9**n)
        second = (0.999 * old[1] + 0.001 * g**2) / (1 - 0.999**n)
        decay = 0.01 * raw[f"optimizer/target/{name}"].reshape(g.shape)
        want = -rate * (first / (np.sqrt(second) + config.optim.eps) + decay)
        np.testing.assert_allclose(update, want, rtol=1e-4, atol=1e-4 * rate, err_msg=name)


def test_written_as_it_was_read(tmp_path: Path) -> None:
    """A released file read and written again holds the same leaves, the random key aside."""
    path = tmp_path / "checkpoint_1"
    write_published_checkpoint(
        path, read_published_checkpoint(GOLDEN["ve"], state_like(config_of("ve"))), lr=2e-4, ema_rate=0.999
    )
    before, after = raw_leaves(GOLDEN["ve"]), raw_leaves(path)
    assert before.keys() == after.keys()
    for name in before.keys() - {"rng", "model_state"}:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)
        assert np.asarray(before[name]).dtype == np.asarray(after[name]).dtype


def changed(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    leaves = raw_leaves(GOLDEN["ve"])
    change(leaves)
    path = tmp_path / "changed"
    path.write_bytes(msgpack_serialize(unflatten_dict(leaves, sep="/")))
    return path


KERNEL = "optimizer/target/Conv_0/kernel"
CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda t: t.pop("params_ema/Conv_0/bias"), r"leaves missing \(1\): params_ema/Conv_0/bias$"),
    "no step": (lambda t: t.pop("step"), r"leaves missing \(1\): step$"),
    "unexpected": (lambda t: t.update({KERNEL + "s": np.ones(3)}), rf"leaves unexpected \(1\): {KERNEL}s$"),
    "network state": (
        lambda t: t.update({"model_state": {"mean": np.ones(3)}}),
        r"unexpected \(1\): model_state/mean$",
    ),
    "shape": (
        lambda t: t.update({KERNEL: t[KERNEL].swapaxes(2, 3)}),
        rf"leaves of another shape \(1\): {KERNEL} is float32\[3, 3, 8, 3\], not float32\[3, 3, 3, 8\]$",
    ),
    "row": (lambda t: t.update({KERNEL: t[KERNEL][None]}), rf"{KERNEL} is float32\[1, 3, 3, 3, 8\]"),
    "integers": (lambda t: t.update({KERNEL: t[KERNEL].astype(np.int32)}), rf"{KERNEL} is int32\[3, 3, 3, 8\]"),
    "text": (lambda t: t.update({KERNEL: "none"}), f"{KERNEL} is str, not"),
    "fraction of a step": (lambda t: t.update({"step": 1.5}), "step is float, not int32"),
    "NaN": (lambda t: t.update({KERNEL: t[KERNEL] * np.nan}), f"damaged: not all values are finite in {KERNEL}$"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_does_not_fit_is_named(name: str, tmp_path: Path) -> None:
    change, message = CHANGES[name]
    path = changed(tmp_path, change)
    with pytest.raises(ValueError, match=message) as error:
        read_published_checkpoint(path, state_like(config_of("ve")))
    assert str(error.value).startswith(str(path))


def test_steps_may_be_plain_numbers(tmp_path: Path) -> None:
    """As in files written from the host's copy of the state."""
    path = changed(tmp_path, lambda t: t.update({"step": STEP, "optimizer/state/step": np.int64(STEP)}))
    assert int(read_published_checkpoint(path, state_like(config_of("ve"))).step) == STEP


def test_another_network_is_refused_in_one_readable_line() -> None:
    config = config_of("ve")
    config.model.nf = 16
    config.model.num_res_blocks = 2
    with pytest.raises(ValueError, match="does not fit the network of the configuration") as error:
        read_published_checkpoint(GOLDEN["ve"], state_like(config))
    message = str(error.value)
    assert re.search(r"leaves missing \(\d+\): optimizer/target/\w+", message)
    assert re.search(r"of another shape \(\d+\): .* is float32\[\d.*; and \d+ more$", message)
    assert "\n" not in message
    assert len(message) < 2500


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut short": lambda content: content[:-1],
    "cut at the start": lambda content: content[:100],
    "two files in one": lambda content: content + content[:50],
    "web page": lambda content: b"<!DOCTYPE html><html>Sign in</html>",
    "other msgpack": lambda content: msgpack_serialize([1, 2]),
    "numbers as names": lambda content: b"\x81\xa4step\x81\x01\x02",
    "array's header": lambda content: content.replace(b"float32", b"float99"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_26"
    path.write_bytes(DAMAGED[name](GOLDEN["ve"].read_bytes()))
    with pytest.raises(
        ValueError, match=r"checkpoint_26 is not a published checkpoint \(a training state in msgpack\), or"
    ):
        read_published_checkpoint(path, state_like(config_of("ve")))


# --- through the entry points, on the smallest network ---

FIRST_STEP = 30


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
    path = run_lib.export(config_with(), own)
    assert path == own / "exported" / f"checkpoint_{FIRST_STEP}"
    for a, b in zip(jax.tree.leaves(run.load_state(path)), jax.tree.leaves(run.load_state(own)), strict=True):
        np.testing.assert_array_equal(a, b)
    content: Any = msgpack_restore(path.read_bytes())
    assert (float(content["lr"]), float(content["ema_rate"])) == (config_with().optim.lr, config_with().model.ema_rate)
    with pytest.raises(FileNotFoundError, match="no dequantizer in"):
        run_lib.export(config_with(eval__dequantizer=True), own)


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
    """The losses, the first above all, are those of the original parameters on the same batch and noise."""
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

    The configuration names the checkpoint at which the run starts, but the result is that of the last step.
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


@pytest.mark.parametrize("network", ["--config.model.nf=16", None])
def test_what_the_command_says(network: str | None, released_file: Path, tmp_path: Path) -> None:
    """One line for a file that does not fit or is not there, and nothing written."""
    path = released_file if network else tmp_path / "checkpoint_27"
    command = [sys.executable, "main.py", "--config=configs/digits/smoke.py", f"--workdir={tmp_path / 'run'}"]
    command += ["--mode=eval", f"--config.eval.checkpoint={path}", *([network] if network else [])]
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if not re.match(r"[IW]\d{4} ", line)]
    assert done.returncode == 2
    assert len(said) == 1, done.stderr
    assert ("of another shape" if network else "which does not exist") in said[0]
    assert str(path) in said[0]
    assert not (tmp_path / "run").exists()
