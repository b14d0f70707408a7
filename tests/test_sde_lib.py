import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.checks import RANGES
from sde_lib import (
    MOST_BETA,
    MOST_SIGMA,
    SDES,
    VESDE,
    VPSDE,
    LinearGammaSDE,
    LinearGammaVPSDE,
    LinearVESDE,
    StraightPathSDE,
    SubVPSDE,
)
from sources.marginals import sample_at
from tests.analytic import asymmetric_mixture

TIMES = jnp.array([1e-5, 1e-3, 0.05, 0.3, 0.7, 1.0])
LINEAR_GAMMA = (LinearGammaVPSDE(), StraightPathSDE())
EACH_SDE = pytest.mark.parametrize("sde", [cls() for cls in SDES.values()], ids=SDES)
EACH_LINEAR_GAMMA = pytest.mark.parametrize("sde", LINEAR_GAMMA, ids=lambda sde: type(sde).__name__)


@EACH_SDE
def test_marginals_solve_the_moment_equations(sde):
    """d alpha / dt = f alpha and d sigma^2 / dt = 2 f sigma^2 + g^2: the closed forms are those of the SDE."""

    def moments(t):
        alpha, sigma = sde.alpha_sigma(t)
        return alpha, sigma**2

    with jax.enable_x64():
        times = jnp.array([1e-3, 0.05, 0.3, 0.7, 1.0])
        (alpha, variance), (d_alpha, d_variance) = jax.vmap(lambda t: jax.jvp(moments, (t,), (1.0,)))(times)
        drift, diffusion = sde.drift_coeff(times), sde.diffusion(times)
        np.testing.assert_allclose(d_alpha, drift * alpha, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(d_variance, 2 * drift * variance + diffusion**2, rtol=1e-10)


@EACH_SDE
def test_float32_is_exact_near_zero(sde):
    """Forms such as 1 - exp(-x) are wrong by up to a percent at t = 1e-5 in float32."""
    single = [*sde.alpha_sigma(TIMES), sde.diffusion(TIMES), sde.log_noise_level(TIMES)]
    with jax.enable_x64():
        times = jnp.asarray(np.asarray(TIMES, np.float64))
        double = [*sde.alpha_sigma(times), sde.diffusion(times), sde.log_noise_level(times)]
    for one, two in zip(single, double, strict=True):
        # a few roundings; the exponent of exp(-B / 2) amplifies them by up to B / 2 = 5
        np.testing.assert_allclose(one, two, rtol=3e-6)


@EACH_SDE
def test_noise_level_and_its_inverse(sde):
    alpha, sigma = sde.alpha_sigma(TIMES)
    np.testing.assert_allclose(sde.log_noise_level(TIMES), jnp.log(sigma / alpha), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sde.time_of_log_noise_level(sde.log_noise_level(TIMES)), TIMES, rtol=1e-4, atol=1e-7)


@EACH_SDE
def test_times_of_quantiles_are_not_before_the_smallest_time(sde):
    """32 bits cannot tell ln rho at the smallest times from ln rho at 0."""
    for t_min in (1e-9, 2e-8):
        times = sde.time_of_quantile(jnp.float32([0.0, sde.importance_weight(jnp.float32(sde.t_max), t_min)]), t_min)
        assert jnp.float32(t_min) <= times[0] <= times[1] <= sde.t_max


@EACH_SDE
def test_importance_sampling_follows_its_density(sde):
    """Z is the integral of g^2 / sigma^2, by quadrature, and the quantiles invert it."""
    t_min = 1e-3
    with jax.enable_x64():
        log_t = jnp.linspace(np.log(t_min), 0.0, 200_001)
        times = jnp.exp(log_t)
        integrand = times * (sde.diffusion(times) / sde.alpha_sigma(times)[1]) ** 2
        total = jnp.trapezoid(integrand, log_t)
        np.testing.assert_allclose(sde.importance_weight(jnp.array(1.0), t_min), total, rtol=1e-6)
        quantiles = jnp.linspace(0.0, 1.0, 7) * total
        times = sde.time_of_quantile(quantiles, t_min)
        np.testing.assert_allclose(sde.importance_weight(times, t_min), quantiles, atol=1e-6)
        assert times[0] == pytest.approx(t_min)
        assert times[-1] == pytest.approx(1.0)


@EACH_SDE
def test_prior_density_is_normalised_and_sampled(sde):
    grid = jnp.linspace(-10, 10, 4001) * sde.prior_sigma
    density = jnp.exp(sde.prior_logp(grid[:, None]))
    assert jnp.trapezoid(density, grid) == pytest.approx(1, abs=1e-5)
    samples = sde.prior_sample(jax.random.key(0), (20_000, 2)) / sde.prior_sigma
    assert abs(jnp.var(samples) - 1) < 5 * np.sqrt(2 / samples.size)


@EACH_SDE
@pytest.mark.parametrize("num_steps", [100, 1000])
def test_discrete_chain_approaches_the_sde(sde, num_steps):
    """f_i N and G_i^2 N tend to the drift and g^2, with an error that falls as 1 / N."""
    t = jnp.array([0.2, 0.5, 0.9])
    x = jnp.ones((3, 2))
    drift, diffusion = sde.discretize(x, t, num_steps)
    np.testing.assert_allclose(drift * num_steps, sde.drift(x, t), rtol=12 / num_steps, atol=1e-6)
    np.testing.assert_allclose(diffusion**2 * num_steps, sde.diffusion(t) ** 2, rtol=25 / num_steps)


@EACH_LINEAR_GAMMA
def test_times_by_velocity_weight_follow_their_density(sde: LinearGammaSDE):
    """The weight is the integral of alpha^2 d gamma, by quadrature, and the quantiles invert it."""
    with jax.enable_x64():
        times = jnp.linspace(0.0, 1.0, 200_001)
        density = sde.alpha_sigma(times)[0] ** 2 * sde.gamma_range
        total = jnp.trapezoid(density, times)
        np.testing.assert_allclose(sde.velocity_weight(jnp.array(0.0)), total, rtol=1e-7)
        quantiles = jnp.linspace(0.0, 1.0, 9)
        drawn = sde.time_of_velocity_quantile(quantiles, 0.0)
        np.testing.assert_allclose(1 - sde.velocity_weight(drawn) / total, quantiles, atol=1e-7)
        later = sde.velocity_weight(sde.time_of_velocity_quantile(quantiles, 0.2))
        np.testing.assert_allclose(1 - later / sde.velocity_weight(jnp.array(0.2)), quantiles, atol=1e-7)
    single = sde.time_of_velocity_quantile(jnp.asarray(np.asarray(quantiles, np.float32)), 0.0)
    np.testing.assert_allclose(single, drawn, atol=1e-6)


@EACH_LINEAR_GAMMA
def test_velocities_give_the_noise_back(sde: LinearGammaSDE):
    """The noise follows from x_t and F. An error in F is multiplied by sqrt(k) alpha."""
    with jax.enable_x64():
        keys = jax.random.split(jax.random.key(0), 3)
        x0, noise, error = (jax.random.normal(key, (5, 3), jnp.float64) for key in keys)
        t = jnp.linspace(0.0, 1.0, 5)
        alpha, sigma = sde.alpha_sigma(t)
        x, velocity = alpha[:, None] * x0 + sigma[:, None] * noise, sde.velocity(x0, noise, t)
        np.testing.assert_allclose(sde.noise_of_velocity(x, velocity, t), noise, atol=1e-12)
        wrong = sde.noise_of_velocity(x, velocity + error, t) - noise
        np.testing.assert_allclose(wrong, np.sqrt(sde.k) * alpha[:, None] * error, atol=1e-12)


def test_the_schedules_of_linear_gamma():
    for sde, power in zip(LINEAR_GAMMA, (2, 1), strict=True):
        alpha, sigma = sde.alpha_sigma(TIMES)
        np.testing.assert_allclose(alpha**power + sigma**power, 1, rtol=1e-6)
        assert sde.prior_sigma == pytest.approx(float(sigma[-1]), rel=1e-6)


def test_vp_chain_is_ddpm():
    sde, steps = VPSDE(), 1000
    betas = np.linspace(0.1 / steps, 20 / steps, steps)
    t = jnp.linspace(0, 1, steps)
    x = jnp.ones((steps, 1))
    drift, diffusion = sde.discretize(x, t + 1e-7, steps)
    np.testing.assert_allclose(diffusion, np.sqrt(betas), rtol=1e-5)
    np.testing.assert_allclose(drift[:, 0], np.sqrt(1 - betas) - 1, rtol=1e-5)


@pytest.mark.parametrize(("sde", "expected"), [(VESDE(), 1), (LinearVESDE(), 1)])
def test_step_alpha_without_drift(sde, expected):
    np.testing.assert_allclose(sde.step_alpha(TIMES, 1000), expected)


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE()])
@pytest.mark.parametrize("num_steps", [10, 1000])
def test_step_alpha_is_that_of_the_marginals(sde, num_steps):
    """1 - beta_i for many steps; for few, where that is negative, still between 0 and 1."""
    t = jnp.array([0.1, 0.5, 1.0])
    factor = sde.step_alpha(t, num_steps)
    assert jnp.all((factor > 0) & (factor < 1))
    if num_steps == 1000:
        np.testing.assert_allclose(factor, 1 - sde.beta(t) / num_steps, rtol=3e-4)


@EACH_SDE
def test_probability_flow_keeps_the_marginals(sde):
    """The continuity equation, d ln q / dt = -div h - h . grad ln q, for the exact score of a mixture."""
    density = asymmetric_mixture(2)
    with jax.enable_x64():
        t = jnp.array([0.05, 0.3, 0.8])
        x = sample_at(density, sde, jax.random.key(1), t).astype(jnp.float64)
        score_fn = density.score_fn(sde)
        _, time_derivative = jax.jvp(lambda t: density.log_density(sde, x, t), (t,), (jnp.ones_like(t),))
        flow = sde.probability_flow(score_fn, x, t)
        jacobian = jax.vmap(jax.jacfwd(lambda x, t: sde.probability_flow(score_fn, x[None], t[None])[0]))(x, t)
        divergence = jnp.trace(jacobian, axis1=1, axis2=2)
        expected = -divergence - jnp.sum(flow * score_fn(x, t), axis=1)
        np.testing.assert_allclose(time_derivative, expected, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(sde.drift_divergence(x, t), 2 * sde.drift_coeff(t))


@pytest.mark.parametrize(
    "make",
    [
        lambda: VESDE(sigma_min=0),
        lambda: VESDE(1, 1),
        lambda: LinearVESDE(-1),
        lambda: VPSDE(2, 1),
        lambda: VPSDE(0.1, 400),
        lambda: StraightPathSDE(1, 1),
    ],
)
def test_impossible_constants_are_refused(make):
    with pytest.raises(ValueError, match="need"):
        make()


@pytest.mark.parametrize("build", [lambda sigma: VESDE(0.01, sigma), LinearVESDE])
def test_the_largest_noise_has_a_prior_density_in_32_bits(build):
    assert np.isfinite(build(MOST_SIGMA).prior_logp(jnp.full((1, 3072), MOST_SIGMA))[0])
    with pytest.raises(ValueError, match=r"sigma_max <= 1e\+16"):
        build(2 * MOST_SIGMA)


def test_the_largest_constants_have_noise_levels_in_32_bits():
    """Samplers divide by alpha, and bounds on the likelihood take the logarithm of rho^2."""
    low, high = (float(RANGES[f"model.gamma_{end}"][1:-1].split(", ")[end == "max"]) for end in ("min", "max"))
    most = MOST_BETA / 2
    largest = VPSDE(0.0, MOST_BETA), VPSDE(most, most), SubVPSDE(most, most)
    for sde in (*largest, LinearGammaVPSDE(low, high), StraightPathSDE(low, high)):
        t = jnp.array([1e-5, 1.0], jnp.float32)
        alpha, sigma = sde.alpha_sigma(t)
        found = np.asarray(jnp.stack([1 / alpha, 1 / sigma, jnp.exp(2 * sde.log_noise_level(t))]))
        assert found.dtype == np.float32
        assert np.all(np.isfinite(found) & (found > 0)), sde
