"""Released checkpoints: what is read is what the file holds, and what does not fit is named."""

import functools
import re
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

from configs.default import Config
from infra.published_checkpoints import read_published_checkpoint, write_published_checkpoint
from models.score import ScoreModel, build_network
from sde_lib import VESDE
from tests.golden_common import golden_config
from train_state import TrainState, create_state, optimizer_from_config

ROOT = Path(__file__).parent.parent
GOLDEN = {sde: ROOT / "tests" / "golden" / f"released_checkpoint_{sde}" for sde in ("ve", "vp")}
STEP = 1234


def config_of(sde: str) -> Config:
    return golden_config(np.load(GOLDEN[sde].with_suffix(".npz")))


@functools.cache
def shapes_of(sde: str) -> TrainState:
    """The shapes of the state that the file for this SDE holds."""
    return state_like(config_of(sde))


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
    raw, like = raw_leaves(GOLDEN[sde]), shapes_of(sde)
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
    write_published_checkpoint(path, read_published_checkpoint(GOLDEN["ve"], shapes_of("ve")), lr=2e-4, ema_rate=0.999)
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
        read_published_checkpoint(path, shapes_of("ve"))
    assert str(error.value).startswith(str(path))


def test_steps_may_be_plain_numbers(tmp_path: Path) -> None:
    """As in files written from the host's copy of the state."""
    path = changed(tmp_path, lambda t: t.update({"step": STEP, "optimizer/state/step": np.int64(STEP)}))
    assert int(read_published_checkpoint(path, shapes_of("ve")).step) == STEP


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
        read_published_checkpoint(path, shapes_of("ve"))
