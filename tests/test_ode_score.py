import dataclasses
import math
from functools import partial
from typing import TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float
from scipy import special

from analysis.likelihood_gradient import likelihood_gradients
from analysis.ode_score import _total, likelihood_by_start, ode_score, ode_score_path
from analysis.score_distances import (
    DistanceCurve,
    TimeNodes,
    distance_curves,
    distances,
    error_sources,
    kl_identity,
    order_errors,
    time_nodes,
)
from arrays import Batch, PerExample, append_dims, as_pytree
from likelihood import GaussianReference, Probes, draw_probes, ode_log_likelihood
from sde_lib import SDE, SDES, VESDE, VPSDE
from solvers.ode import Info
from sources.densities import GaussianMixture, paper_mixture
from tests.analytic import asymmetric_mixture


class Tolerance(TypedDict):
    rtol: float
    atol: float


VE, VP = VESDE(), VPSDE()
T_MIN = 1e-3
REFERENCE = GaussianReference(0.1, 0.5)


def imperfect(density: GaussianMixture, sde: SDE, strength: Float[Array, ""], x: Batch, t: PerExample) -> Batch:
    """A score off the density's by a smooth field that is no gradient, of the scores' own size at each time."""
    scale = append_dims(1 / jnp.sqrt(1 + sde.alpha_sigma(t)[1] ** 2), x)
    return density.score(sde, x, t) + strength * scale * jnp.sin(2 * scale * x[:, ::-1] + 1)


def score_of(density: GaussianMixture, sde: SDE, strength: float):
    return jax.tree_util.Partial(partial(imperfect, density, sde), jnp.asarray(strength))


def log_likelihood_gradient(score_fn, sde: SDE, x: Batch, probes: Probes | None, **solve) -> np.ndarray:
    """grad_x ln p(x) by central differences of the likelihood, all of its solves in one batch."""
    n, d = x.shape[0], x[0].size
    steps = 1e-4 * np.concatenate([np.eye(d), -np.eye(d)]).reshape(2 * d, 1, *x.shape[1:])
    repeated = None if probes is None else jnp.tile(probes, (1, 2 * d, *(1,) * (x.ndim - 1)))
    result = ode_log_likelihood(score_fn, sde, (x[None] + steps).reshape(-1, *x.shape[1:]), repeated, **solve)
    logp = np.asarray(result.logp).reshape(2, d, n)
    return ((logp[0] - logp[1]) / 2e-4).T.reshape(x.shape)


def assert_close(scores: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(scores, expected, atol=1e-3 * np.max(np.abs(expected)), rtol=0)


def test_with_probes_it_is_the_gradient_of_their_likelihood_and_unbiased():
    """On images of two pixels, VP, along a path.

    In two dimensions (1, 1) and (1, -1) are all Rademacher probes there are, up to signs that do not matter: the mean
    of their results is the exact one, and that of Gaussian probes must be as well.
    """
    few, n = 6, 1500
    with jax.enable_x64(True):
        score_fn = score_of(asymmetric_mixture(2), VP, 0.3)

        def of_images(x: Batch, t: PerExample) -> Batch:
            return score_fn(x.reshape(-1, 2), t).reshape(x.shape)

        probes = draw_probes(jax.random.key(5), "gaussian", (few + 2 + n, 1, 2, 1))
        assert probes is not None
        signs = jnp.array([[1.0, 1.0], [1.0, -1.0]]).reshape(1, 2, 1, 2, 1)
        probes = jnp.concatenate([probes[:, :few], signs, probes[:, few + 2 :]], axis=1)
        x = np.concatenate([np.random.default_rng(0).normal(0, 0.6, (few, 2)), np.tile([0.3, -0.2], (2 + n, 1))])
        x = jnp.asarray(x.reshape(-1, 1, 2, 1))
        path = ode_score_path(of_images, VP, x, np.array([T_MIN, 0.3, 1.0]), probes, rtol=1e-6, atol=1e-6)
        path.info.require_success()
        solve = {"t_min": T_MIN, "method": "rk4_log", "num_steps": 150}
        expected = log_likelihood_gradient(of_images, VP, x[:few], probes[:, :few], **solve)
        assert_close(np.asarray(path.score[0, :few]), expected)
        kept = likelihood_gradients(of_images, VP, x[:few], T_MIN, probes[:, :few], reference=REFERENCE, num_steps=200)
        assert_close(np.asarray(kept[0]), expected)
        np.testing.assert_allclose(path.x[0], x, atol=1e-4)
        np.testing.assert_allclose(path.score[2], -path.x[2], rtol=1e-12)  # the prior's
        scores = np.asarray(path.score[0, few:]).reshape(-1, 2)
    exact, estimates = scores[:2].mean(0), scores[2:]
    se = estimates.std(0) / math.sqrt(n)
    assert np.max(np.abs(scores[0] - scores[1])) > 20 * np.max(se)
    assert np.all(np.abs(estimates.mean(0) - exact) < 5 * se)


@dataclasses.dataclass(frozen=True)
class Quantiles:
    """Points of q_t at equal steps of its distribution, of a mixture in one dimension: expectations without noise."""

    density: GaussianMixture
    sde: SDE

    def __call__(self, t: PerExample) -> Batch:
        times, counts = np.unique(np.asarray(t), return_counts=True)  # increasing, as the times come
        rows = [self._of_time(time, count) for time, count in zip(times, counts, strict=True)]
        return jnp.asarray(np.concatenate(rows)[:, None], t.dtype)

    def _of_time(self, time: float, count: int) -> np.ndarray:
        alpha, sigma = (float(a) for a in self.sde.alpha_sigma(jnp.asarray(time)))
        means = alpha * self.density.means[:, 0]
        spread = np.sqrt(alpha**2 * self.density.covariances[:, 0, 0] + sigma**2)
        grid = np.linspace((means - 8 * spread).min(), (means + 8 * spread).max(), 20_001)
        cumulative = special.ndtr((grid[:, None] - means) / spread) @ self.density.weights
        return np.interp((np.arange(count) + 0.5) / count, cumulative, grid)


def test_kl_identity_gradient_and_distances():
    """[L22] Theorem 3.1 on the paper's mixture: both sides agree within 1 %, and neither is zero.

    With an imperfect score and the exact one, VE; calls have the same shapes, so that they compile once.
    """
    times, count = 16, 150
    with jax.enable_x64(True):
        density, nodes = paper_mixture(), time_nodes(VE, T_MIN, times)
        sampler, solve = Quantiles(density, VE), Tolerance(rtol=3e-7, atol=3e-7)
        score_fn, exact = score_of(density, VE, 0.3), density.score_fn(VE)
        both = kl_identity(score_fn, VE, density, sampler, t_min=T_MIN, num_points=count, num_times=times, **solve)
        assert both.start.mean > 0.02
        assert abs(both.right.mean / both.start.mean - 1) < 0.01
        assert abs(both.end.mean) < 0.1 * both.integral.mean

        spread = np.sqrt(density.covariances[:, 0, 0])
        x = jnp.asarray((density.means[:, 0] + spread * np.linspace(-2, 2, count // 6)[:, None]).reshape(-1, 1))
        expected = log_likelihood_gradient(score_fn, VE, x, None, t_min=T_MIN, **solve)
        t = jnp.full(times * count, T_MIN)
        result = ode_score(score_fn, VE, jnp.tile(x, (2 * times, 1)), t, **solve)
        scores = np.asarray(result.score)[: count // 2]
        assert_close(scores, expected)
        assert np.max(np.abs(scores - np.asarray(score_fn(x, t[: count // 2])))) > 0.1  # it is not the model's score

        # the likelihood against the start of the solve
        logp, info = likelihood_by_start(score_fn, VE, x, np.array([T_MIN, 0.3]), **solve)
        info.require_success()
        same = ode_log_likelihood(score_fn, VE, jnp.tile(x, (2, 1)), None, t_min=T_MIN, **solve).logp
        np.testing.assert_allclose(logp[0], same[: count // 2], atol=1e-4)
        logp, _ = likelihood_by_start(score_of(density, VE, 0.0), VE, x, np.array([T_MIN, 0.3]), **solve)
        for row, start in zip(logp, (T_MIN, 0.3), strict=True):
            np.testing.assert_allclose(
                row, density.log_density(VE, x, jnp.full(len(x), start)), atol=2e-2
            )  # the prior's mismatch

        t = jnp.asarray(np.repeat(nodes.t, count))
        values = distances(score_fn, VE, sampler(t), t, data_score=exact, **solve)
        cross = np.asarray(values.cross).reshape(times, count).mean(axis=1)
        assert nodes.weight @ cross == pytest.approx(both.integral.mean)
        # |s - p|^2 = |s - q|^2 - 2 (s - q).(p - q) + |p - q|^2
        combined = np.asarray(values.score_matching) - 2 * np.asarray(values.cross) + np.asarray(values.fisher)
        np.testing.assert_allclose(values.difference, combined, rtol=1e-6, atol=1e-9)

        curves = distance_curves(score_of(density, VE, 0.0), VE, sampler, nodes, count, data_score=exact, **solve)
        assert np.max(curves["score_matching"].mean) < 1e-20
        assert 0 < curves["fisher"].integral.mean < 1e-3  # all of it the prior's mismatch


@partial(jax.jit, static_argnums=(1, 4))
def _in_one_dimension(score_fn, exact, x: PerExample, t: PerExample, sde: SDE):
    """Returns, at each point, the flow of the data, the slope of the model's flow, the score of the data, the error
    of the score with its two derivatives, g and sigma."""

    def at_point(x: Array, t: Array) -> tuple[Array, ...]:
        def entry(field, x: Array) -> Array:
            return field(x[None, None], t[None])[0, 0]

        def model_flow(x: Array) -> Array:
            return entry(partial(sde.probability_flow, score_fn), x)

        def error(x: Array) -> Array:
            return entry(score_fn, x) - entry(exact, x)

        first, second = jax.grad(error), jax.grad(jax.grad(error))
        of_data = entry(partial(sde.probability_flow, exact), x), jax.grad(model_flow)(x), entry(exact, x)
        return *of_data, error(x), first(x), second(x)

    return *jax.vmap(at_point)(x, t), sde.diffusion(t), sde.alpha_sigma(t)[1]


def test_what_drives_the_score_of_the_ode() -> None:
    """dr/dt + (grad h)^T r along a path of the data's ODE, by central differences, is the sum of the sources.

    In one dimension the terms are numbers. The errors of the orders are derivatives of the same error of the score.
    """
    dt, t0 = 1e-4, 0.4
    with jax.enable_x64(True):
        density = paper_mixture()
        score_fn, exact = score_of(density, VP, 0.3), density.score_fn(VP)
        points, t = np.array([-0.6, 0.1, 0.7, 0.3, -0.2, 0.5]), jnp.full(6, t0)
        x = jnp.asarray(points[:, None])
        terms = jax.tree.map(np.asarray, _in_one_dimension(score_fn, exact, points, t, VP))
        flow, slope, data_score, e, de, dde, g, sigma = terms
        # The sources of 6 points need the ODE's score at 12, and so do the central differences of 4: one program.
        few = slice(0, 4)
        nearby = np.stack([points + step * flow for step in (-dt, 0, dt)])[:, few]
        grid = jnp.asarray(nearby.reshape(-1, 1)), jnp.asarray(np.repeat([t0 - dt, t0, t0 + dt], 4))
        scores = ode_score(score_fn, VP, *grid, rtol=1e-9, atol=1e-9).score, jax.jit(exact)(*grid)
        before, now, after = (np.asarray(scores[0]) - np.asarray(scores[1])).reshape(3, 4)
        left = (after - before) / (2 * dt) + slope[few] * now
        sources = error_sources(score_fn, exact, VP, x, t, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(sources.third, sigma**3 * np.abs(dde), rtol=1e-6)
        np.testing.assert_allclose(sources.second, sigma**3 * np.abs(de * data_score), rtol=1e-6)
        curvature = (left / (0.5 * g**2)[few] - (dde + de * data_score)[few]) / e[few]
        np.testing.assert_allclose(sources.first[few], (sigma**3)[few] * np.abs(curvature * e[few]), rtol=1e-3)
        orders = order_errors(as_pytree(score_fn), as_pytree(exact), x, t, sde=VP)
        np.testing.assert_allclose(orders.second, 0.5 * (g * sigma * de) ** 2, rtol=1e-6)
        np.testing.assert_allclose(orders.third, 0.5 * (g * sigma**2 * dde) ** 2, rtol=1e-6)


def test_a_path_that_does_not_return_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    """In a valley, with a solve back (which probes need) and a coarse tolerance."""
    density = paper_mixture()
    x, t = jnp.asarray([[-0.04], [0.57]]), jnp.full(2, T_MIN)
    probes = jnp.ones((1, 2, 1))
    with caplog.at_level("WARNING"):
        lost = distances(density.score_fn(VP), VP, x, t, probes, data_score=density.score_fn(VP), rtol=1e-3, atol=1e-3)
    assert lost.returned is not None
    assert lost.fisher is not None
    assert float(lost.returned[0]) > 0.1
    assert "do not return" in caplog.text
    kept = distances(density.score_fn(VP), VP, x, t, data_score=density.score_fn(VP), rtol=1e-3, atol=1e-3)
    assert kept.fisher is not None
    assert float(kept.fisher[0]) < 0.05 * float(lost.fisher[0])


def test_integral_of_a_curve():
    nodes = TimeNodes(np.array([0.2, 0.6]), np.array([0.5, 0.25]))
    integral = DistanceCurve(nodes, mean=np.array([2.0, 4.0]), se=np.array([0.6, 1.6]), num_points=10).integral
    np.testing.assert_allclose(integral, (2.0, 0.5, 20))


@pytest.mark.parametrize("name", SDES)
def test_time_nodes_integrate(name):
    sde, t_min = SDES[name](), 1e-2
    nodes = time_nodes(sde, t_min, 20)
    assert np.all(np.diff(nodes.t) > 0)
    assert t_min < nodes.t[0]
    assert nodes.t[-1] < 1
    np.testing.assert_allclose(nodes.weight.sum(), 1 - t_min, rtol=1e-3)
    np.testing.assert_allclose(nodes.weight @ nodes.t**2, (1 - t_min**3) / 3, rtol=1e-3)


def test_bad_input_is_refused():
    x, score_fn = jnp.ones((2, 1)), score_of(paper_mixture(), VP, 0.0)
    with pytest.raises(ValueError, match="times must increase"):
        ode_score_path(score_fn, VP, x, np.array([0.5, 0.1]))
    with pytest.raises(ValueError, match="starts must lie"):
        likelihood_by_start(score_fn, VP, x, np.array([0.1, 1.0]))
    with pytest.raises(ValueError, match="t_min"):
        time_nodes(VP, 0.0, 4)
    with pytest.raises(ValueError, match="at least 2 points"):
        distance_curves(score_fn, VP, lambda t: x, TimeNodes(np.array([0.1]), np.ones(1)), 1)


def test_a_failed_start_names_the_example_not_its_repetition():
    def breaks(x, t):
        return jnp.where((t[:, None] > 0.5) & (x > 1), jnp.nan, -x)

    _, info = likelihood_by_start(breaks, VP, jnp.array([[0.0], [0.0], [3.0]]), np.array([0.1, 0.6]))
    assert int(info.worst_example) == 2  # of three; in the second of two starts
    assert float(info.t) == pytest.approx(0.6)


def test_a_failed_solve_names_time_and_example():
    def info(success: list[bool], t: list[float], worst_example: list[int]) -> Info:
        n = jnp.arange(1, len(t) + 1)
        return Info(n, n, jnp.array(success), jnp.array(t), jnp.array(worst_example, jnp.int32))

    forward = jax.tree.map(lambda a: a[0], info([True], [1.0], [-1]))
    start = jnp.array([0.1, 0.5])
    # segments are solved from the last to the first: the second here fails before the first one
    back = info([False, False, True], [0.1, 0.4, 0.8], [0, 1, -1])
    total = _total(forward, back, start, VE)
    assert (int(total.worst_example), int(total.nfe)) == (1, 1 + 6)
    with pytest.raises(RuntimeError, match=r"failed at t = 0\.7 .* example 1"):
        total.require_success()
    total = _total(forward, info([True] * 2, [0.5, 0.0], [-1, -1]), start, VE)
    assert bool(total.success)
    assert int(total.worst_example) == -1
