"""A training state divided among the devices: the same steps, less memory, and checkpoints for both placements."""

import jax
import numpy as np
import pytest

from build import TRAIN_KEY, Run, build
from configs.toy.smoke import get_config
from infra import parallel
from infra.workdir import Workdir
from train_state import TrainState


def run_with(shard_state: bool) -> Run:
    config = get_config()
    config.training.n_jitted_steps = 1
    config.training.shard_state = shard_state
    return build(config)


def after_steps(run: Run, state: TrainState, count: int) -> tuple[TrainState, list[float]]:
    steps, losses = run.train_steps(), []
    for number in range(count):
        points = np.random.default_rng(number).standard_normal((1, run.config.training.batch_size, 2), np.float32)
        state, metrics = steps(state, parallel.global_array(run.mesh, points, axis=1), run.key(TRAIN_KEY))
        losses.append(float(metrics["total"]))
    return state, losses


@pytest.fixture(scope="module")
def runs() -> dict[bool, tuple[Run, TrainState, list[float]]]:
    """Three steps with the whole state on each device, and with a divided state."""
    trained = {}
    for shard_state in (False, True):
        run = run_with(shard_state)
        state = jax.device_put(run.fresh_state(), run.state_shardings())
        trained[shard_state] = (run, *after_steps(run, state, 3))
    return trained


def bytes_of_a_device(state: TrainState) -> int:
    return sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(state))


def test_steps_are_those_of_a_whole_state(runs):
    """The sums over the batch may be in another order, which changes 32-bit floats by 1e-7 of their size."""
    (_, whole, losses), (_, divided, divided_losses) = runs[False], runs[True]
    np.testing.assert_allclose(divided_losses, losses, rtol=1e-5)
    moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), whole.params, runs[False][0].fresh_state().params)
    largest = max(jax.tree.leaves(moved))
    for name in ("params", "ema_params"):
        for a, b in zip(*(jax.tree.leaves(getattr(s, name)) for s in (whole, divided)), strict=True):
            np.testing.assert_allclose(b, a, atol=1e-3 * largest)


def test_a_device_holds_its_part(runs):
    """Parameters are whole, and moments and average are divided, except for the few arrays that four devices cannot."""
    whole, divided = (bytes_of_a_device(runs[kind][1]) for kind in (False, True))
    assert divided / whole == pytest.approx((1 + 3 / jax.device_count()) / 4, rel=0.05)
    placed = jax.tree.map(lambda a: a.sharding, runs[True][1])
    assert jax.tree.leaves(placed) == jax.tree.leaves(runs[True][0].state_shardings())


@pytest.mark.parametrize("first", [False, True])
def test_runs_resume_with_either_placement(first, runs, tmp_path):
    (run, state, _), (other, _, _) = runs[first], runs[not first]
    with run.open_checkpoints(Workdir(tmp_path)) as checkpoints:
        checkpoints.save(state)
    with other.open_checkpoints(Workdir(tmp_path)) as checkpoints:
        resumed = checkpoints.resume()
    assert resumed is not None
    assert jax.tree.leaves(jax.tree.map(lambda a: a.sharding, resumed)) == jax.tree.leaves(other.state_shardings())
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_evaluation_sees_whole_parameters(runs):
    average = parallel.whole(runs[True][1].ema_params)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(average))


@pytest.mark.parametrize(
    ("shape", "axis"), [((3, 3, 8, 12), 3), ((3, 3, 8, 6), 2), ((4, 4), 0), ((3, 2), None), ((), None)]
)
def test_the_largest_axis_is_divided(shape, axis):
    mesh = parallel.device_mesh()
    expected = parallel.replicated(mesh) if axis is None else parallel.along_batch(mesh, axis)
    assert parallel.along_largest_axis(mesh, shape) == expected
