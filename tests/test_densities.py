import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sources.densities import DENSITIES, Checkerboard, GaussianMixture, noisy_curve, paper_mixture, swiss_roll

N = 10_000


@pytest.mark.parametrize("name", DENSITIES)
def test_samples_have_the_density_and_the_entropy(name):
    """The mean of -ln q over samples is the entropy, if that is known, and q integrates to 1 on a grid."""
    density = DENSITIES[name]
    x = density.sample(jax.random.key(0), (N, density.dims))
    assert x.shape == (N, density.dims)
    assert density.log_density_of_data is not None
    log_density = jax.jit(density.log_density_of_data)
    information = -np.asarray(log_density(x), np.float64)
    assert np.isfinite(information).all()
    if density.entropy is not None:
        error = information.std() / math.sqrt(N)
        assert abs(information.mean() - density.entropy) <= 5 * error + 1e-5
    step = 0.01 if density.dims == 1 else 0.1
    edge = 10 if name == "far_modes" else 5
    axis = np.arange(-edge + step / 2, edge, step, dtype=np.float32)
    grid = np.stack(np.meshgrid(*[axis] * density.dims), axis=-1).reshape(-1, density.dims)
    mass = np.concatenate([np.exp(log_density(part)) for part in np.split(grid, 4)])
    np.testing.assert_allclose(np.sum(mass) * step**density.dims, 1, atol=1e-3)


@pytest.mark.parametrize("name", DENSITIES)
def test_samples_fill_cells_as_the_density_says(name):
    """The shares of samples in some boxes agree with the density within 5 standard errors."""
    density = DENSITIES[name]
    x = np.asarray(density.sample(jax.random.key(1), (N, density.dims)))
    step, width = 0.05, 1.0
    corners = {1: [[-1.0], [-0.5], [0.5]], 2: [[-4.0, -2.0], [-1.0, 1.0], [0.0, -3.0], [1.0, 1.0]]}[density.dims]
    assert density.log_density_of_data is not None
    log_density = jax.jit(density.log_density_of_data)
    for corner in corners:
        axes = [np.arange(low + step / 2, low + width, step) for low in corner]
        grid = jnp.asarray(np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, density.dims), jnp.float32)
        share = float(np.sum(np.exp(log_density(grid)))) * step**density.dims
        counted = np.mean(np.all((x >= corner) & (x < np.array(corner) + width), axis=1))
        # 2e-3 allows for the error of the midpoint rule.
        assert abs(counted - share) < 5 * math.sqrt(max(share * (1 - share), 1e-6) / N) + 2e-3


def test_known_entropies():
    assert Checkerboard().entropy == pytest.approx(3.4657, abs=1e-4)
    assert paper_mixture().entropy == pytest.approx(-0.1289, abs=1e-4)
    narrow = GaussianMixture(np.ones(1), np.zeros((1, 2)), 0.01 * np.eye(2)[None])
    assert narrow.entropy == pytest.approx(math.log(2 * math.pi * math.e * 0.01))
    # Two components with the same mean and covariance are one.
    doubled = GaussianMixture(np.array([0.2, 0.8]), np.ones((2, 1)), np.full((2, 1, 1), 0.04))
    assert doubled.entropy == pytest.approx(0.5 * math.log(2 * math.pi * math.e * 0.04), abs=1e-12)
    assert swiss_roll().entropy is None


def test_a_curve_has_no_ripple():
    """The density of Gaussians along a line, one standard deviation apart, is constant along its middle."""
    line = noisy_curve(np.stack([np.linspace(-4, 4, 81), np.zeros(81)], axis=1), 0.1)
    x = jnp.stack([jnp.linspace(-1, 1, 101), jnp.zeros(101)], axis=1)
    expected = -math.log(8.1) - 0.5 * math.log(2 * math.pi * 0.01)
    np.testing.assert_allclose(line.log_density_of_data(x), expected, atol=1e-5)
    means = swiss_roll().means
    assert np.linalg.norm(np.diff(means, axis=0), axis=1).max() < 0.1


def test_the_checkerboard_is_empty_between_its_squares():
    board = Checkerboard()
    x = jnp.array([[-3.9, -3.9], [-3.9, -1.9], [0.1, 0.1], [2.1, 0.1], [2.1, -1.9], [4.1, 0.1], [-4.1, -3.0]])
    inside = [True, False, True, False, True, False, False]
    np.testing.assert_array_equal(jnp.isfinite(board.log_density_of_data(x)), inside)
    np.testing.assert_allclose(board.log_density_of_data(x)[jnp.array(inside)], -math.log(32), rtol=1e-6)
