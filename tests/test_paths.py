import jax
import jax.numpy as jnp
import numpy as np

from densities import paper_mixture
from marginals import sample_at
from ode import require_success
from paths import ode_path, sde_path
from score_ode import ode_score_path
from sde_lib import VPSDE

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


def test_ode_is_the_solvers_path_and_back_again():
    x = jnp.array([[-0.8], [-0.3], [0.6]])
    path = ode_path(SCORE, VP, x, TIMES)
    solved = ode_score_path(SCORE, VP, x, np.asarray(TIMES[::500]))
    require_success(solved.info)
    np.testing.assert_allclose(path[::500], solved.x, atol=0.02)
    np.testing.assert_allclose(ode_path(SCORE, VP, path[-1], TIMES[::-1])[-1], x, atol=0.02)
