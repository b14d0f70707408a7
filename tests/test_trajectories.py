import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from analysis.trajectories import ode_path, sde_path
from sde_lib import VPSDE
from sources.densities import paper_mixture
from sources.marginals import sample_at

MIXTURE, VP = paper_mixture(), VPSDE()
SCORE = MIXTURE.score_fn(VP)
TIMES = jnp.linspace(1e-3, 1, 1001)
N = 4000


def moments(t: float) -> tuple[float, float]:
    """Mean and variance of x_t."""
    alpha, sigma = (float(a) for a in VP.alpha_sigma(jnp.asarray(t)))
    return alpha * float(MIXTURE.mean[0]), alpha**2 * float(MIXTURE.covariance[0, 0]) + sigma**2


def test_sde_has_the_marginals_in_both_directions():
    data = sample_at(MIXTURE, VP, jax.random.key(0), jnp.full(N, 1e-3))
    forward = np.asarray(sde_path(SCORE, VP, data, TIMES, jax.random.key(1)))
    reverse = np.asarray(
        sde_path(SCORE, VP, VP.prior_sample(jax.random.key(2), (N, 1)), TIMES[::-1], jax.random.key(3))
    )
    for path, t in ((forward[400], TIMES[400]), (forward[-1], 1.0), (reverse[600], TIMES[400]), (reverse[-1], 1e-3)):
        mean, variance = moments(float(t))
        assert abs(path.mean() - mean) < 5 * np.sqrt(variance / N) + 0.01
        assert abs(path.var() - variance) < 5 * variance * np.sqrt(2 / N) + 0.01 * variance


def rank(x: np.ndarray, t: float) -> np.ndarray:
    """The distribution function of q_t."""
    alpha, sigma = (float(a) for a in VP.alpha_sigma(jnp.asarray(t)))
    spread = np.sqrt(alpha**2 * MIXTURE.covariances[:, 0, 0] + sigma**2)
    return special.ndtr((x - alpha * MIXTURE.means[:, 0]) / spread) @ MIXTURE.weights


def test_ode_keeps_ranks_and_comes_back():
    """In one dimension the flow of the exact score carries quantiles to quantiles."""
    x = jnp.array([[-0.8], [-0.3], [0.6]])
    path = ode_path(SCORE, VP, x, TIMES)
    for k in (400, 1000):
        ranks = rank(np.asarray(path[k], np.float64), float(TIMES[k]))
        np.testing.assert_allclose(ranks, rank(np.asarray(x), 1e-3), atol=0.01)
    np.testing.assert_allclose(ode_path(SCORE, VP, path[-1], TIMES[::-1])[-1], x, atol=0.02)
