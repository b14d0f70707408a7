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

from arrays import Batch, PerExample, per_example
from densities import GaussianMixture, paper_mixture
from likelihood import Probes, draw_probes, ode_log_likelihood
from ode import require_success
from score_ode import Curve, TimeNodes, distance_curves, distances, kl_identity, ode_score, ode_score_path, time_nodes
from sde_lib import SDE, SDES, VESDE, VPSDE
from tests.analytic import asymmetric_mixture


class Tolerance(TypedDict):
    rtol: float
    atol: float


VE, VP = VESDE(), VPSDE()
T_MIN = 1e-3


def imperfect(density: GaussianMixture, sde: SDE, strength: Float[Array, ""], x: Batch, t: PerExample) -> Batch:
    """A score off the density's by a smooth field that is no gradient, of the scores' own size at each time."""
    scale = per_example(1 / jnp.sqrt(1 + sde.alpha_sigma(t)[1] ** 2), x)
    return density.score(sde, x, t) + strength * scale * jnp.sin(2 * scale * x[:, ::-1] + 1)


def score_of(density: GaussianMixture, sde: SDE, strength: float):
    return jax.tree_util.Partial(partial(imperfect, density, sde), jnp.asarray(strength))


def log_likelihood_gradient(score_fn, sde: SDE, x: Batch, probes: Probes | None, t_min: float) -> np.ndarray:
    """grad_x ln p(x) in two dimensions, by central differences of the likelihood, all of its solves in one batch."""
    step = 1e-4 * np.array([[1, 0], [-1, 0], [0, 1], [0, -1]])
    shifted = (x[None] + step[:, None]).reshape(-1, 2)
    repeated = None if probes is None else jnp.tile(probes, (1, 4, 1))
    solve = {"t_min": t_min, "method": "rk4_log", "num_steps": 200}
    logp = np.asarray(ode_log_likelihood(score_fn, sde, shifted, repeated, **solve).logp).reshape(4, -1)
    return np.stack([logp[0] - logp[1], logp[2] - logp[3]], axis=1) / 2e-4


def points(n: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.6, (n, 2))


def assert_close(scores: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(scores, expected, atol=1e-3 * np.max(np.abs(expected)), rtol=0)


def test_is_the_gradient_of_the_log_likelihood_along_the_path():
    """VE and exact derivatives, at the start of a path and on it."""
    with jax.enable_x64(True):
        score_fn = score_of(asymmetric_mixture(2), VE, 0.3)
        x, times = jnp.asarray(points(6)), np.array([T_MIN, 0.5, 1.0])
        path = ode_score_path(score_fn, VE, x, times, rtol=1e-8, atol=1e-8)
        require_success(path.info)
        for k in (0, 1):
            expected = log_likelihood_gradient(score_fn, VE, path.x[k], None, times[k])
            assert_close(np.asarray(path.score[k]), expected)
        np.testing.assert_allclose(path.x[0], x, atol=1e-5)
        np.testing.assert_array_equal(path.score[2], -path.x[2] / VE.prior_sigma**2)
        of_model = np.asarray(score_fn(x, jnp.full(6, T_MIN)))
        assert np.max(np.abs(path.score[0] - of_model)) > 0.1  # it is not the model's score


def test_with_probes_is_the_gradient_of_their_log_likelihood():
    with jax.enable_x64(True):
        score_fn, x = score_of(asymmetric_mixture(2), VP, 0.3), jnp.asarray(points(6))
        probes = draw_probes(jax.random.key(1), "gaussian", x.shape, 2)
        result = ode_score(score_fn, VP, x, jnp.full(6, T_MIN), probes, rtol=1e-8, atol=1e-8)
        require_success(result.info)
        assert_close(np.asarray(result.score), log_likelihood_gradient(score_fn, VP, x, probes, T_MIN))
        np.testing.assert_allclose(result.returned, x, atol=1e-6)


def test_probes_are_unbiased_on_images():
    # In two dimensions (1, 1) and (1, -1) are all Rademacher probes there are, up to signs that do not matter: the mean
    # of their results is the exact one, and that of Gaussian probes must be as well.
    n = 4000
    score_fn = score_of(asymmetric_mixture(2), VP, 0.3)

    def of_images(x: Batch, t: PerExample) -> Batch:
        return score_fn(x.reshape(-1, 2), t).reshape(x.shape)

    gaussian = draw_probes(jax.random.key(5), "gaussian", (n, 1, 2, 1))
    assert gaussian is not None
    signs = jnp.array([[1.0, 1.0], [1.0, -1.0]]).reshape(1, 2, 1, 2, 1)
    x = jnp.broadcast_to(jnp.array([0.3, -0.2]).reshape(1, 1, 2, 1), (n + 2, 1, 2, 1))
    result = ode_score(of_images, VP, x, jnp.full(n + 2, 0.01), jnp.concatenate([signs, gaussian], axis=1))
    require_success(result.info)
    scores = np.asarray(result.score, np.float64).reshape(n + 2, 2)
    exact, estimates = scores[:2].mean(0), scores[2:]
    se = estimates.std(0) / math.sqrt(n)
    assert np.max(np.abs(scores[0] - scores[1])) > 20 * np.max(se)
    assert np.all(np.abs(estimates.mean(0) - exact) < 5 * se + 1e-4)


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


def test_kl_identity_and_curves_of_an_imperfect_and_the_exact_score():
    """[L22] Theorem 3.1 on the paper's mixture: both sides agree within 1 %, and neither is zero."""
    times, count = 20, 200
    with jax.enable_x64(True):
        density, nodes = paper_mixture(), time_nodes(VE, T_MIN, times)
        sampler, solve = Quantiles(density, VE), Tolerance(rtol=1e-5, atol=1e-5)
        score_fn, exact = score_of(density, VE, 0.3), density.score_fn(VE)
        both = kl_identity(score_fn, VE, density, sampler, t_min=T_MIN, num_points=count, num_times=times, **solve)
        assert both.start.mean > 0.02
        assert abs(both.right.mean / both.start.mean - 1) < 0.01
        assert abs(both.end.mean) < 0.1 * both.integral.mean

        curves = distance_curves(score_fn, VE, sampler, nodes, count, data_score=exact, **solve)
        assert curves["cross"].integral == both.integral
        t = jnp.asarray(np.repeat(nodes.t, count))
        values = distances(score_fn, VE, sampler(t), t, data_score=exact, **solve)
        # |s - p|^2 = |s - q|^2 - 2 (s - q).(p - q) + |p - q|^2
        combined = np.asarray(values.score_matching) - 2 * np.asarray(values.cross) + np.asarray(values.fisher)
        np.testing.assert_allclose(values.difference, combined, rtol=1e-6, atol=1e-9)
        assert distance_curves(score_fn, VE, sampler, nodes, count, **solve).keys() == {"difference"}

        curves = distance_curves(score_of(density, VE, 0.0), VE, sampler, nodes, count, data_score=exact, **solve)
        assert np.max(curves["score_matching"].mean) < 1e-20
        assert 0 < curves["fisher"].integral.mean < 1e-3  # all of it the prior's mismatch


def test_integral_of_a_curve():
    nodes = TimeNodes(np.array([0.2, 0.6]), np.array([0.5, 0.25]))
    integral = Curve(nodes, mean=np.array([2.0, 4.0]), se=np.array([0.6, 1.6]), num_points=10).integral
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
    with pytest.raises(ValueError, match="t_min"):
        time_nodes(VP, 0.0, 4)
    with pytest.raises(ValueError, match="at least 2 points"):
        distance_curves(score_fn, VP, lambda t: x, TimeNodes(np.array([0.1]), np.ones(1)), 1)


def test_a_failed_solve_names_time_and_example():
    def broken(x: Batch, t: PerExample) -> Batch:
        return jnp.where(per_example((t > 0.55) & (t < 0.9), x) & (x > 2), jnp.nan, 0.0) * x

    result = ode_score(broken, VE, jnp.array([[1.0], [3.0]]), jnp.array([0.1, 0.5]))
    assert int(result.info.suspect) == 1
    assert 0.5 <= float(result.info.t) <= 0.6
    with pytest.raises(RuntimeError, match=r"broke down at t = 0\.5"):
        require_success(result.info)
