"""Langevin dynamics, with the exact scores of densities that are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from arrays import as_pytree
from configs.toy.smoke import get_config
from samplers.langevin import LangevinSampler, annealed_langevin_dynamics
from samplers.predictor_corrector import annealed_langevin
from sampling import sampler_from_config
from sde_lib import SDE, VESDE, VPSDE
from sources.densities import far_modes
from tests.analytic import correlated_gaussian
from tests.test_sampling import assert_moments

DATA = correlated_gaussian(2)


def exact_moments(sampler: LangevinSampler, mean, covariance):
    """Returns mean and covariance of the sampler's result for Gaussian data, in float64: each step is affine in y."""
    rhos, d = np.exp(sampler.log_rhos), len(mean)
    prior_rho = np.exp(float(sampler.sde.log_noise_level(jnp.ones(()))))
    prior_alpha, last_alpha = (float(sampler.sde.alpha_sigma(jnp.float32(t))[0]) for t in (1, sampler.smallest_time))
    if sampler.sde.variance_exploding:
        assert prior_rho == pytest.approx(sampler.sde.prior_sigma)
    m, c = np.zeros(d), (sampler.sde.prior_sigma / prior_alpha) ** 2 * np.eye(d)
    for rho in rhos:
        a = sampler.step_size * (rho / rhos[-1]) ** 2
        precision = np.linalg.inv(covariance + rho**2 * np.eye(d))
        shrink = np.eye(d) - 0.5 * a * precision
        for _ in range(sampler.steps_per_level):
            m, c = mean + shrink @ (m - mean), shrink @ c @ shrink + a * np.eye(d)
    if sampler.noise_removal:
        denoise = np.eye(d) - rhos[-1] ** 2 * np.linalg.inv(covariance + rhos[-1] ** 2 * np.eye(d))
        return mean + denoise @ (m - mean), denoise @ c @ denoise
    return last_alpha * m, last_alpha**2 * c


@pytest.mark.parametrize(
    ("sde", "options"),
    [
        (VESDE(0.1, 5.0), {"num_levels": 6, "noise_removal": False}),
        (VPSDE(), {"num_levels": 6, "smallest_time": 0.02}),
        (VESDE(0.3, 2.0), {"num_levels": 1, "steps_per_level": 12}),
    ],
    ids=["VE", "VP", "one level"],
)
def test_moments_of_samples_are_those_of_the_chain(sde: SDE, options):
    sampler = LangevinSampler(sde=sde, **{"steps_per_level": 5, "step_size": 0.004} | options)
    samples = sampler(DATA.score_fn(sde), jax.random.key(0), jnp.arange(40_000), (2,))
    assert_moments(samples.x, *exact_moments(sampler, DATA.mean, DATA.covariance))
    assert samples.nfe == sampler.num_levels * sampler.steps_per_level + sampler.noise_removal


def test_a_step_is_that_of_the_corrector_ald_on_ve():
    """On VE, NCSN's step sizes equal the corrector's step sizes for the snr sqrt(step_size) / (2 sigma_L)."""
    sde, step_size, sigma = VESDE(0.01, 1.0), 2e-5, 0.25
    x, z = jax.random.normal(jax.random.key(0), (2, 8, 2))
    score_fn = as_pytree(DATA.score_fn(sde))
    t = jnp.full(8, sde.time_of_log_noise_level(jnp.log(sigma)))
    corrected, _ = annealed_langevin(score_fn, sde, x, t, z, 10, step_size**0.5 / (2 * sde.sigma_min))
    at_sigma = step_size * (sigma / sde.sigma_min) ** 2
    noise = jax.tree_util.Partial(lambda z, shape, k: z, z)
    one = annealed_langevin_dynamics(score_fn, sde, x, np.log([sigma]), 1, at_sigma, noise)
    np.testing.assert_allclose(one, corrected, rtol=1e-5, atol=1e-5)


def test_langevin_gets_the_weights_of_far_modes_wrong_and_annealing_right():
    """From a symmetric start, each mode gets half of the samples of Langevin dynamics. Annealing moves them."""
    sde, n = VESDE(0.5, 20.0), 4000
    weights = {}
    for num_levels in (1, 10):
        sampler = LangevinSampler(sde=sde, num_levels=num_levels, steps_per_level=600 // num_levels, step_size=0.1)
        x = sampler(far_modes().score_fn(sde), jax.random.key(0), jnp.arange(n), (2,)).x
        weights[num_levels] = float(jnp.mean(x[:, 0] + x[:, 1] < 0))
    assert abs(weights[1] - 0.5) < 5 * 0.5 / n**0.5
    assert abs(weights[10] - 0.2) < 5 * 0.4 / n**0.5


@pytest.mark.parametrize("sde", [VESDE(0.01, 1.0), VPSDE()], ids=["ve", "vp"])
def test_steps_are_stable_up_to_the_stated_size(sde: SDE):
    """All data are at 0, so the score of x is -x / sigma^2."""

    def score_fn(x: Array, t: Array) -> Array:
        return -x / sde.alpha_sigma(t)[1][:, None] ** 2

    stable = LangevinSampler(sde=sde, num_levels=1).stable_step_size
    largest = []
    for factor in (0.95, 1.05):
        sampler = LangevinSampler(sde=sde, num_levels=1, steps_per_level=500, step_size=factor * stable)
        x = sampler(score_fn, jax.random.key(0), jnp.arange(8), (3,)).x
        largest.append(float(jnp.abs(x).max()))
    assert largest[0] < 1
    assert not largest[1] < 1e10


@pytest.mark.parametrize(
    ("field", "value"), [("num_levels", 0), ("steps_per_level", 0), ("step_size", 0.0)], ids=lambda v: str(v)
)
def test_refused_values(field, value):
    with pytest.raises(ValueError, match=f"sampling.{field} must be"):
        LangevinSampler(sde=VESDE(), **{field: value})


def test_samplers_of_a_configuration():
    config = get_config()
    config.sampling.method = "annealed_langevin"
    annealed = sampler_from_config(config, VESDE(), None)
    assert isinstance(annealed, LangevinSampler)
    assert (annealed.num_levels, annealed.steps_per_level, annealed.step_size) == (10, 100, 2e-5)
    assert not annealed.follows_ode
    config.sampling.method = "langevin"
    plain = sampler_from_config(config, VESDE(), None)
    assert isinstance(plain, LangevinSampler)
    np.testing.assert_allclose(np.exp(plain.log_rhos), [0.01], rtol=1e-3)
