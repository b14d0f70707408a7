import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from sde_lib import SDES, VESDE, VPSDE
from sources.densities import DENSITIES
from sources.marginals import log_normal_mass, marginals_of, sample_at

BOARD = DENSITIES["checkerboard"]
MARGINALS = marginals_of(BOARD)
assert MARGINALS is not None


LOG_DENSITY, SCORE = (jax.jit(f, static_argnums=0) for f in (MARGINALS.log_density, MARGINALS.score))


def on_grid(t: float, limit: float, n: int = 121):
    """Returns the points of a square grid, their times, and the area of a cell."""
    side = np.linspace(-limit, limit, n)
    x = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    return jnp.asarray(x, jnp.float32), jnp.full(n * n, t), (side[1] - side[0]) ** 2


@pytest.mark.parametrize(("name", "t"), [("vesde", 0.6), ("subvpsde", 0.3)])
def test_checkerboard_is_a_density_with_its_score(name, t):
    sde = SDES[name]()
    x, times, cell = on_grid(t, 12)
    log_density = LOG_DENSITY(sde, x, times)
    np.testing.assert_allclose(np.sum(np.exp(np.asarray(log_density, np.float64))) * cell, 1, atol=1e-4)
    few = x[::397]
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(LOG_DENSITY(sde, x, times[: len(few)]))))(few)
    score = SCORE(sde, few, times[: len(few)])
    np.testing.assert_allclose(score, gradient, atol=1e-3 * float(jnp.max(jnp.abs(score))))


def test_checkerboard_without_noise_is_the_data_and_with_much_a_gaussian():
    sde = VESDE()
    x = BOARD.sample(jax.random.key(0), (500, 2))
    away = jnp.all(jnp.abs(x - 2 * jnp.round(x / 2)) > 0.1, axis=1)  # far from edges
    log_density = LOG_DENSITY(sde, x, jnp.full(500, 1e-5))
    np.testing.assert_allclose(log_density[away], -np.log(32), atol=1e-5)
    x = 50 * jax.random.normal(jax.random.key(1), (500, 2))
    score = SCORE(sde, x, jnp.ones(500))
    # The variance of the checkerboard is 16/3 in each direction.
    np.testing.assert_allclose(score, -x / (50**2 + 16 / 3), atol=1e-4)  # the scores are about 0.02


def test_points_have_the_marginals():
    """E[score(x_t)] = 0 and E[x . score] = -d for points of q_t, within 5 standard errors."""
    t = jnp.full(20_000, 0.2)
    for sde in (VESDE(), VPSDE()):
        x = sample_at(BOARD, sde, jax.random.key(2), t)
        score = np.asarray(SCORE(sde, x, t), np.float64)
        along = np.sum(np.asarray(x) * score, axis=1)
        for values, truth in ((score[:, 0], 0), (score[:, 1], 0), (along, -2)):
            assert abs(values.mean() - truth) < 5 * values.std() / np.sqrt(len(values))


def test_log_normal_mass_in_both_tails():
    below, above = np.array([-30.0, -1.0, 0.5, 20.0, -0.01]), np.array([-20.0, 2.0, 0.51, 30.0, 0.01])
    # SciPy's log_ndtr does not underflow.
    upper = special.log_ndtr(np.where(below + above > 0, -below, above))
    lower = special.log_ndtr(np.where(below + above > 0, -above, below))
    expected = upper + np.log(-np.expm1(lower - upper))
    actual = jax.jit(log_normal_mass)(jnp.asarray(below, jnp.float32), jnp.asarray(above, jnp.float32))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4)


def test_mixtures_are_their_own_marginals():
    assert marginals_of(DENSITIES["mixture"]) is DENSITIES["mixture"]
