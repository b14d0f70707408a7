import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrays import as_pytree
from solvers import dormand_prince
from solvers.ode import ADAPTIVE, FIXED_STEP, Info, integrate

METHODS = (*ADAPTIVE, *FIXED_STEP)

# A damped rotation by example, with the integral of its first component: known in closed form.
RATES = np.array([0.5, 1.0, 3.0])
START = {"x": np.array([[1.0, 0.0], [0.5, -1.0], [-2.0, 1.0]], np.float32), "integral": np.zeros(3, np.float32)}


def spiral(t, y):
    rotated = jnp.stack([-y["x"][:, 1], y["x"][:, 0]], axis=1)
    rates = jnp.asarray(RATES, y["x"].dtype)  # a NumPy constant would be kept in the precision of its first trace
    dx = 2 * t * rates[:, None] * rotated - y["x"]
    return {"x": dx, "integral": jnp.cos(rates * t)}


def spiral_solution(t: float) -> dict:
    angle = RATES * t**2
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x0, x1 = START["x"].T
    x = jnp.exp(-t) * jnp.stack([cos * x0 - sin * x1, sin * x0 + cos * x1], axis=1)
    return {"x": x, "integral": jnp.sin(RATES * t) / RATES}


@pytest.mark.parametrize("method", METHODS)
def test_reaches_the_closed_form_forward_and_back(method):
    y, info = integrate(spiral, START, 0.0, 1.5, method=method, num_steps=200)
    info.require_success()
    # The tolerance bounds the error of a step; a few dozen of them add up.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), y, spiral_solution(1.5))
    back, info = integrate(spiral, y, 1.5, 0.0, method=method, num_steps=200)
    info.require_success()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=4e-4), back, START)


def test_dopri5_takes_the_steps_of_scipy():
    _, ours = integrate(spiral, START, 0.0, 1.5, method="dopri5")
    _, scipy = integrate(spiral, START, 0.0, 1.5, method="scipy")
    assert abs(int(ours.steps) - int(scipy.steps)) <= 0.2 * int(scipy.steps)
    assert int(scipy.nfe) == 6 * int(scipy.steps) + 2


def test_tighter_tolerances_cost_more_and_are_closer():
    errors, costs = [], []
    for tolerance in (1e-2, 1e-3, 1e-4):
        y, info = integrate(spiral, START, 0.0, 1.5, rtol=tolerance, atol=tolerance)
        errors.append(float(jnp.max(jnp.abs(y["x"] - spiral_solution(1.5)["x"]))))
        costs.append(int(info.nfe))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert costs == sorted(set(costs))


@pytest.mark.parametrize("method", ["rk4", "adams"])
def test_fixed_steps_are_of_fourth_order(method):
    with jax.enable_x64(True):
        start = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), START)
        errors = []
        for num_steps in (64, 128, 256):
            y, _ = integrate(spiral, start, 0.0, 1.5, method=method, num_steps=num_steps)
            errors.append(float(jnp.sqrt(jnp.mean((y["x"] - spiral_solution(1.5)["x"]) ** 2))))
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    np.testing.assert_allclose(orders, 4, atol=0.25)


@pytest.mark.parametrize("method", ["rk4", "adams"])
def test_the_error_estimate_is_the_size_of_the_error_of_a_rough_field(method):
    # What a network that resolves time finely adds: too fast for the steps, so that its phases there are random.
    frequencies = np.random.default_rng(0).uniform(600, 3000, (64, 20))

    def rough(t, y):
        return -y + jnp.cos(frequencies * t)

    with jax.enable_x64(True):
        y0 = jnp.zeros((64, 20))
        y, info = integrate(rough, y0, 0.0, 1.0, method=method, num_steps=60)
        w = frequencies
        truth = (jnp.cos(w) + w * jnp.sin(w) - jnp.exp(-1.0)) / (1 + w**2)
        error, error_estimate = (float(jnp.sqrt(jnp.mean(a**2))) for a in (y - truth, info.error_estimate))
    assert 0.5 < error_estimate / error < 3


@pytest.mark.parametrize("num_steps", [4, 8, 20])
def test_the_error_estimate_bounds_the_error_of_a_smooth_field(num_steps):
    y, info = integrate(spiral, START, 0.0, 0.7, method="rk4", num_steps=num_steps)
    error = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), y, spiral_solution(0.7))
    for name in ("x", "integral"):
        assert error[name] < float(jnp.max(jnp.abs(info.error_estimate[name]))) + 1e-6


@pytest.mark.parametrize(("method", "evaluations_of_a_step"), [("dopri5", 6), ("scipy", 6), ("rk4", 4), ("adams", 1)])
def test_counts_evaluations(method, evaluations_of_a_step):
    calls = []

    def field(t, y):
        jax.debug.callback(lambda: calls.append(1))
        return -y

    _, info = jax.block_until_ready(integrate(field, jnp.ones((2, 3)), 0.0, 1.0, method=method, num_steps=6))
    jax.effects_barrier()
    # Choosing the first step costs two; the compiler may merge one of them with a stage.
    assert len(calls) <= int(info.nfe) <= len(calls) + 1
    assert int(info.nfe) - evaluations_of_a_step * int(info.steps) == (1 if method in FIXED_STEP else 2)


@jax.tree_util.register_pytree_node_class
class CountingField:
    """A field with a weight, that counts how often it is traced."""

    traces = 0

    def __init__(self, weight):
        self.weight = weight

    def tree_flatten(self):
        return (self.weight,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)

    def __call__(self, t, y):
        CountingField.traces += 1
        return self.weight * y


@pytest.mark.parametrize("method", METHODS)
def test_new_weights_trace_nothing_anew(method):
    results = []
    for weight in (-1.0, -2.0):
        y, _ = integrate(CountingField(jnp.float32(weight)), jnp.ones((2, 1)), 0.0, 1.0, method=method)
        results.append((float(y[0, 0]), CountingField.traces))
    np.testing.assert_allclose([r[0] for r in results], np.exp([-1.0, -2.0]), rtol=1e-4)
    assert results[0][1] == results[1][1]


def test_wraps_plain_functions_only():
    field = CountingField(jnp.float32(1.0))
    assert as_pytree(field) is field
    assert jax.tree.leaves(as_pytree(spiral)) == []


def not_a_number_after_half(t, y):
    return y * jnp.where(t > 0.5, jnp.array([1.0, jnp.nan, 1.0])[:, None], 1.0)


def blows_up(t, y):
    return y**2 * jnp.array([0.1, 0.2, 2.0])[:, None]  # 1 / (1 - 2 t): infinite at t = 1/2, in example 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("field", "worst_example"), [(not_a_number_after_half, 1), (blows_up, 2)])
def test_failure_is_data_and_named_on_request(method, field, worst_example):
    _, info = integrate(field, jnp.ones((3, 2)), 0.0, 1.0, method=method)
    assert not info.success
    assert float(info.t) == pytest.approx(0.5, abs=0.06)
    assert int(info.worst_example) == worst_example
    with pytest.raises(RuntimeError, match=rf"at t = 0\.\d+ after \d+ steps; example {worst_example} "):
        info.require_success()


@pytest.mark.parametrize("method", ["dopri5", "scipy"])
def test_steps_may_be_as_small_as_the_time(method):
    """dy/dt = y / (2 t): the first steps are about as long as t, and y grows as its root."""
    y, info = integrate(lambda t, y: 0.5 * y / t, jnp.ones((2, 3)), 1e-9, 1.0, method=method)
    info.require_success()
    np.testing.assert_allclose(y, 1e-9**-0.5, rtol=1e-3)


@pytest.mark.parametrize("method", ["dopri5", "scipy"])
def test_too_many_steps_are_a_failure(method):
    y, info = integrate(spiral, START, 0.0, 1.5, method=method, max_steps=4)
    assert np.isfinite(y["x"]).all()
    assert not info.success
    assert 0 < float(info.t) < 1.5
    assert 4 <= int(info.steps) <= 6  # SciPy goes on until a step is accepted


@pytest.mark.parametrize("method", METHODS)
def test_not_finite_from_the_start(method):
    _, info = integrate(lambda t, y: y, jnp.array([[1.0], [jnp.nan]]), 0.0, 1.0, method=method)
    assert not info.success
    assert int(info.worst_example) == 1


@pytest.mark.parametrize("method", ["dopri5", "rk4", "adams"])
def test_inside_jit(method):
    y, info = jax.jit(lambda y0: integrate(spiral, y0, 0.0, 1.5, method=method))(START)
    assert isinstance(info, Info)
    np.testing.assert_allclose(y["x"], spiral_solution(1.5)["x"], atol=2e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_solve_in_parts_is_the_same_and_can_be_stopped(method, monkeypatch):
    monkeypatch.setattr("arrays.PART_SECONDS", 0.0)  # single steps
    reports = []
    whole = integrate(spiral, START, 1.5, 0.0, method=method, num_steps=20)
    parts = integrate(spiral, START, 1.5, 0.0, method=method, num_steps=20, progress=lambda *n: reports.append(n))
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    assert len(reports) > 10
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)
    assert reports[-1][0] == reports[-1][1] == (20 if method in FIXED_STEP else 100)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        integrate(spiral, START, 0.0, 1.5, method=method, progress=stop)


def test_a_solve_in_parts_goes_on_after_a_step_just_before_its_end(monkeypatch):
    """The part of the way that is done rounds to 100 % before the end is reached."""
    monkeypatch.setattr("arrays.PART_SECONDS", 0.0)  # single steps
    times, reports, one_step = [], [], dormand_prince._steps_until
    even_in_log_t = as_pytree(lambda t, y: jnp.cos(8 * jnp.log(t)) / t * jnp.ones_like(y))

    def watched_step(*args):
        solve = one_step(*args)
        times.append(-float(solve.t))
        return solve

    def solve(end, progress):
        return integrate(even_in_log_t, jnp.ones((1, 1)), 1.0, end, rtol=1e-6, atol=1e-6, progress=progress)

    monkeypatch.setattr(dormand_prince, "_steps_until", watched_step)
    solve(1e-5, lambda *_: None)
    accepted_at_once = [t for before, t in itertools.pairwise(times) if times.count(before) == 1 and 2e-5 < t < 1e-4]
    just_before = 0
    for end in np.array(accepted_at_once[::4]) - 3e-9:
        y, info = solve(end, lambda *done: reports.append(done))
        assert info.success
        assert [done for done, _ in reports[-2:]] == [99, 100]
        np.testing.assert_array_equal(y, solve(end, None)[0])
        just_before += abs(times[-3] - end) < 4e-9  # the step before the last; the solve without parts is one call
    assert just_before


def test_a_failed_solve_in_parts_ends():
    _, info = integrate(not_a_number_after_half, jnp.ones((3, 2)), 0.0, 1.0, progress=lambda *_: None)
    assert not info.success
    _, info = integrate(spiral, START, 0.0, 1.5, max_steps=4, progress=lambda *_: None)
    assert (bool(info.success), int(info.steps)) == (False, 4)


def test_several_processes_cannot_share_scipys_solver(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"method asks for SciPy's solver, .* but there are 2: use dopri5"):
        integrate(spiral, START, 0.0, 1.5, method="scipy")
    integrate(spiral, START, 0.0, 1.5, method="dopri5")


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"unknown ODE method 'euler'; known: dopri5, scipy, rk4, adams"):
        integrate(spiral, START, 0.0, 1.0, method="euler")
    with pytest.raises(ValueError, match=r'num_steps of "adams" must be even, got 5'):
        integrate(spiral, START, 0.0, 1.0, method="adams", num_steps=5)
    with pytest.raises(ValueError, match="positive rtol"):
        integrate(spiral, START, 0.0, 1.0, rtol=0.0)
