import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh

from configs.digits.smoke import get_config
from infra import parallel
from infra.checkpoints import Checkpoints, DamagedCheckpointError, abstract_state
from objectives.residuals import ResidualTable
from train_state import TrainState, create_state, optimizer_from_config, reset_parts

# Orbax abandons reads of a damaged checkpoint. They warn when they are garbage-collected, perhaps in another test.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

OPTIMIZER = optax.adam(1e-3)


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


def state_at(step, value=1.0):
    state = create_state({"w": jnp.full((4, 2), value)}, OPTIMIZER)
    return state.replace(step=jnp.asarray(step, jnp.int32))


def whole(devices=None):
    return parallel.replicated(Mesh(devices or jax.devices(), ("data",)))


def like(devices=None, state: TrainState | None = None) -> TrainState:
    """The shapes of these tests' states, on all devices or some."""
    shapes = jax.eval_shape(lambda: state_at(0)) if state is None else state
    return abstract_state(shapes, whole(devices))


def test_restored_on_another_number_of_devices(tmp_path):
    with Checkpoints(tmp_path, {"nf": 8}, like()) as checkpoints:
        checkpoints.save(jax.device_put(state_at(3, 0.25), whole()))
    with Checkpoints(tmp_path, {"nf": 8}, like(jax.devices()[:1]), read_only=True) as checkpoints:
        restored = checkpoints.restore(3)
    assert restored.step == 3
    assert jnp.array_equal(restored.params["w"], jnp.full((4, 2), 0.25))
    assert jax.tree.all(jax.tree.map(lambda a: len(a.devices()) == 1, restored))


class StateOfOldVersions(flax.struct.PyTreeNode):
    """A training state from before residuals were part of it."""

    step: Any
    params: Any
    ema_params: Any
    opt_state: Any


def save_as_old_versions_did(folder, state):
    handlers = {"state": ocp.StandardCheckpointHandler(), "description": ocp.JsonCheckpointHandler()}
    old = StateOfOldVersions(state.step, state.params, state.ema_params, state.opt_state)
    with ocp.CheckpointManager(folder, item_handlers=handlers) as manager:
        items = ocp.args.Composite(state=ocp.args.StandardSave(old), description=ocp.args.JsonSave({}))
        manager.save(int(state.step), args=items)


def test_residuals_are_restored_or_start_anew(tmp_path):
    """Checkpoints with and without residuals serve runs with and without them, also checkpoints of old versions."""
    table = ResidualTable(jnp.full(64, 2.0), jnp.full(64, 4.0))
    save_as_old_versions_did(tmp_path / "old", state_at(3))
    for name, residuals in (("without", None), ("with", table)):
        with Checkpoints(tmp_path / name, {}, like()) as checkpoints:
            checkpoints.save(state_at(3).replace(residuals=residuals))
    for name, expected in (("old", 1.0), ("without", 1.0), ("with", 0.5)):
        for wanted in (None, table):
            target = like(state=state_at(0).replace(residuals=wanted))
            with Checkpoints(tmp_path / name, {}, target, read_only=True) as checkpoints:
                restored = checkpoints.restore(3)
            assert restored.step == 3
            assert jnp.array_equal(restored.params["w"], jnp.ones((4, 2)))
            assert jax.tree.structure(restored) == jax.tree.structure(target)
            if wanted is not None:
                assert restored.residuals is not None
                np.testing.assert_allclose(restored.residuals.values(), expected)


def test_the_newest_and_every_nth_are_kept(tmp_path):
    with Checkpoints(tmp_path, {}, like(), keep_every=4) as checkpoints:
        for step in (2, 4, 6, 8, 10):
            checkpoints.save(state_at(step))
        checkpoints.save(state_at(10))  # there already
    with Checkpoints(tmp_path, {}, like(), read_only=True) as checkpoints:
        assert list(checkpoints.steps()) == [4, 8, 10]
        assert checkpoints.newest() == 10


def test_what_was_kept_stays_when_others_are_to_be_kept(tmp_path):
    with Checkpoints(tmp_path, {}, like(), keep_every=4) as checkpoints:
        for step in (4, 8, 10):
            checkpoints.save(state_at(step))
    with Checkpoints(tmp_path, {}, like(), keep_every=6) as checkpoints:
        for step in (11, 12, 13):
            checkpoints.save(state_at(step))
        assert list(checkpoints.steps()) == [4, 8, 12, 13]


def test_another_network_is_refused_and_a_newer_field_is_not(tmp_path):
    with Checkpoints(tmp_path, {"nf": 8, "ch_mult": (1, 2)}, like()) as checkpoints:
        checkpoints.save(state_at(1))
    refused = pytest.raises(ValueError, match=f"{tmp_path}/1 belongs to another network: nf is 8 there, but 16 in the")
    with Checkpoints(tmp_path, {"nf": 16, "ch_mult": (1, 2)}, like(), read_only=True) as checkpoints, refused:
        checkpoints.restore(1)
    with Checkpoints(tmp_path, {"nf": 8, "ch_mult": (1, 2), "new": 0}, like(), read_only=True) as checkpoints:
        assert checkpoints.restore(1).step == 1


def test_an_unfinished_save_is_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path, {}, like()) as checkpoints:
        checkpoints.save(state_at(1))
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path, {}, like()) as checkpoints:
        assert list(checkpoints.steps()) == [1]


def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path):
    with Checkpoints(tmp_path, {}, like()) as checkpoints:
        checkpoints.save(state_at(1))
    of_another_optimizer = jax.eval_shape(lambda: create_state({"w": jnp.ones((4, 2))}, optax.sgd(1e-3)))
    damaged_or_other = pytest.raises(
        ValueError, match=rf"the checkpoint {tmp_path}/1 is damaged, or comes from another"
    )
    with (
        Checkpoints(tmp_path, {}, like(state=of_another_optimizer), read_only=True) as checkpoints,
        damaged_or_other,
    ):
        checkpoints.restore(1)
    with Checkpoints(tmp_path, {}, like(), read_only=True) as checkpoints:
        (tmp_path / "1" / "description" / "metadata").write_bytes(b"{")
        with pytest.raises(ValueError, match=rf"the checkpoint {tmp_path}/1 is damaged"):
            checkpoints.restore(1)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x55
    path.write_bytes(bytes(data))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # from tensorstore, after a failure
def test_a_flipped_byte_is_found_or_harmless(tmp_path):
    """In three places of each file of a checkpoint. Most files are metadata, parts of which nobody reads."""
    with Checkpoints(tmp_path / "run", {"nf": 8}, like()) as checkpoints:
        checkpoints.save(state_at(1, 0.7))
    found = set()
    for path in files_of(tmp_path / "run" / "1"):
        for position in {0, path.stat().st_size // 2, path.stat().st_size - 1}:
            flip(path, position)
            with Checkpoints(tmp_path / "run", {"nf": 8}, like(), read_only=True) as checkpoints:
                try:
                    state = checkpoints.restore(1)
                except DamagedCheckpointError:
                    found.add(path.name)
                else:
                    jax.tree.map(np.testing.assert_array_equal, state, state_at(1, 0.7))
            flip(path, position)
    assert len(found) >= 3


def test_arrays_that_changed_are_found(tmp_path, monkeypatch):
    """As if the file system had returned other numbers, in files whose format has no checksums."""
    with Checkpoints(tmp_path, {}, like()) as checkpoints:
        checkpoints.save(state_at(1))
    read = Checkpoints._read

    def changed(self, step, **item):
        content = read(self, step, **item)
        return content if "description" in item else content | {"params": {"w": content["params"]["w"] + 1e-7}}

    monkeypatch.setattr(Checkpoints, "_read", changed)
    damaged = pytest.raises(DamagedCheckpointError, match=f"{tmp_path}/1 is damaged: 1 of its arrays have changed")
    with Checkpoints(tmp_path, {}, like(), read_only=True) as checkpoints, damaged:
        checkpoints.restore(1)


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(tmp_path, caplog):
    with Checkpoints(tmp_path, {}, like()) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(state_at(step))
    for step in (2, 3):
        (tmp_path / str(step) / "description" / "metadata").write_bytes(b"{")
    with Checkpoints(tmp_path, {}, like(), read_only=True) as checkpoints:
        assert checkpoints.restore_newest()[0] == 1
    with caplog.at_level("WARNING"), Checkpoints(tmp_path, {}, like()) as checkpoints:
        state = checkpoints.resume()
        assert state is not None
        assert state.step == 1
        checkpoints.save(state_at(2, 0.5))  # the run comes to these steps again
    assert f"{tmp_path}/3 is damaged" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "2.damaged", "3.damaged"}
    for step in (1, 2):
        (tmp_path / str(step) / "description" / "metadata").write_bytes(b"{")
    with (
        Checkpoints(tmp_path, {}, like()) as checkpoints,
        pytest.raises(ValueError, match=f"{tmp_path}/2 is damaged"),
    ):
        checkpoints.resume()
    assert (tmp_path / "2").exists(), "nothing is set aside if nothing can be read"


def test_a_checkpoint_removed_by_a_training_beside_is_no_failure(tmp_path, caplog):
    with Checkpoints(tmp_path, {}, like(), keep_every=100) as training:
        training.save(state_at(1))
        training._manager.wait_until_finished()
        with Checkpoints.existing(tmp_path, {}, like()) as checkpoints:
            assert list(checkpoints.steps()) == [1]
            training.save(state_at(2))
            training._manager.wait_until_finished()
            assert not (tmp_path / "1").exists()
            with caplog.at_level("WARNING"):
                assert checkpoints.restore_newest()[0] == 2
    assert "damaged" not in caplog.text


def test_a_checkpoint_removed_while_it_is_read_is_named_as_such(tmp_path):
    with Checkpoints(tmp_path, {}, like()) as checkpoints, pytest.raises(ValueError, match="/7 was removed while"):
        checkpoints.restore(7)


def test_a_full_disk_is_one_line_also_at_the_end(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError('RESOURCE_EXHAUSTED: Error writing "params.w/0" in OCDBT database: No space left on device [')

    full = pytest.raises(OSError, match=f"^cannot write a checkpoint to {tmp_path}: No space left on device$")
    with full, Checkpoints(tmp_path, {}, like()) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fail)
        checkpoints.save(state_at(1))
    with full, Checkpoints(tmp_path, {}, like()) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", fail)
        monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fail)
        checkpoints.save(state_at(2))
    interrupted = pytest.raises(KeyboardInterrupt)
    with interrupted, Checkpoints(tmp_path, {}, like()) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fail)
        raise KeyboardInterrupt


def test_parameters_that_are_not_finite_are_refused(tmp_path):
    with Checkpoints(tmp_path, {}, like()) as checkpoints:
        checkpoints.save(state_at(1))
        checkpoints.save(state_at(2, jnp.inf))
        with pytest.raises(ValueError, match=f"{tmp_path}/2 has parameters that are not finite: its training has div"):
            checkpoints.resume()
        assert checkpoints.restore(1).step == 1


def test_checkpoints_without_checksums_are_read(tmp_path, monkeypatch):
    """As older versions wrote them."""
    with Checkpoints(tmp_path, {"nf": 8}, like()) as checkpoints:
        checkpoints.save(state_at(1))
    path = tmp_path / "1" / "description" / "metadata"
    path.write_text(json.dumps({"nf": 8}))
    with Checkpoints(tmp_path, {"nf": 8}, like()) as checkpoints:
        assert checkpoints.restore(1).step == 1


@pytest.mark.parametrize(("parts", "warm"), [("", 0.7), ("opt", 0.7), ("ema", 0.7), ("step", 0.0), ("step,opt", 0.0)])
def test_the_warm_up_starts_again_with_the_step(parts, warm):
    """The next step's learning rate is what [S21a]'s code would work out from the state's step."""
    optim = get_config().optim
    optim.lr, optim.warmup, optim.eps = 1.0, 10, 1e-8
    optimizer = optimizer_from_config(optim, 100)
    params: Any = {"w": jnp.ones(3)}
    old = create_state(params, optimizer)
    for _ in range(7):
        old = old.updated(params, optimizer, 0.9)
    state = reset_parts(old, create_state(params, optimizer), parts)
    updates: Any = optimizer.update(params, state.opt_state, state.params)[0]
    assert jnp.allclose(updates["w"], -warm, rtol=1e-3), "of equal gradients Adam makes steps of the learning rate"


def test_parts_of_a_state_are_reset():
    old, fresh = state_at(7, 2.0), state_at(0, 1.0)
    old = old.replace(ema_params={"w": jnp.full((4, 2), 3.0)}, opt_state=jax.tree.map(lambda a: a + 1, old.opt_state))
    kept = reset_parts(old, fresh, "")
    assert kept.step == 7
    assert kept.ema_params["w"][0, 0] == 3
    reset = reset_parts(old, fresh, "step,opt,ema")
    assert reset.step == 0
    assert reset.params["w"][0, 0] == 2
    assert reset.ema_params["w"][0, 0] == 2, "the average starts from the parameters"
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.array_equal(a, b), reset.opt_state, fresh.opt_state))
    with pytest.raises(ValueError, match="init_reset names 'lr'; it takes any of step,opt,ema"):
        reset_parts(old, fresh, "lr")
