import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coordinates import GaussianReference, ReferencePath
from sde_lib import SDES

T_MIN = 1e-3
PATHS = {
    name: ReferencePath(GaussianReference(np.array([0.1, -0.3]), np.array([0.2, 0.6])), SDES[name](), T_MIN)
    for name in SDES
}


@pytest.mark.parametrize("name", PATHS)
def test_tau_covers_the_times_and_is_inverted(name):
    path = PATHS[name]
    taus = jnp.linspace(*path.ends(jnp.dtype(jnp.float32)), 50)
    times = jax.vmap(path.time)(taus)
    np.testing.assert_allclose([times[0], times[-1]], [T_MIN, 1.0], rtol=1e-4)
    assert jnp.all(jnp.diff(times) > 0)
    log_rho = jax.vmap(path.log_noise_level)(taus)
    np.testing.assert_allclose(path.sde.log_noise_level(times), log_rho, atol=1e-4)
    rates = jax.vmap(jax.grad(path.log_noise_level))(taus)
    np.testing.assert_allclose(rates * jax.vmap(path.density)(log_rho), 1.0, rtol=1e-3)


@pytest.mark.parametrize("name", PATHS)
def test_the_change_of_coordinates_and_its_volume(name):
    path, x, t = PATHS[name], jnp.array([[0.3, -1.0], [2.0, 0.1]]), jnp.float32(0.3)
    y = path.normalize(x, t)
    np.testing.assert_allclose(path.unnormalize(y, t), x, rtol=1e-5)
    jacobian = jax.jacfwd(lambda one: path.unnormalize(one[None], t)[0])(y[0])
    np.testing.assert_allclose(path.log_det_jacobian(x, t), np.linalg.slogdet(jacobian)[1], rtol=1e-5, atol=1e-6)


def test_gaussian_data_are_standard_normal_at_every_time():
    path, x0 = PATHS["vpsde"], 0.1 + 0.2 * jax.random.normal(jax.random.key(0), (20_000, 1))
    x0 = jnp.concatenate([x0, -0.3 + 0.6 * jax.random.normal(jax.random.key(1), x0.shape)], axis=1)
    for t in (0.01, 0.2, 0.9):
        mean, sigma = path.sde.marginal(x0, jnp.full(len(x0), t))
        y = path.normalize(mean + sigma[:, None] * jax.random.normal(jax.random.key(2), x0.shape), jnp.float32(t))
        # 5 standard errors of a mean and of a variance of 20,000
        assert jnp.all(jnp.abs(y.mean(0)) < 5 / np.sqrt(20_000))
        assert jnp.all(jnp.abs(y.var(0) - 1) < 5 * np.sqrt(2 / 20_000))
