import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrays import append_dims
from configs.default import Config, get_config
from datasets import training_preprocess
from samplers import few_step
from samplers.few_step import DPMSolverSampler, FastSampler, HeunSampler, multistep_coefficients, noise_levels
from samplers.langevin import LangevinSampler
from samplers.predictor_corrector import CORRECTORS, PREDICTORS
from samplers.probability_flow import ODESampler
from samplers.sampler import Sampler, denoise, image_keys, prior_samples
from sampling import PredictorCorrector, sampler_from_config
from sde_lib import SDE, VESDE, VPSDE, LinearVESDE, SubVPSDE
from sources.marginals import sample_at
from tests.analytic import GaussianMixture, asymmetric_mixture, correlated_gaussian

SMALLEST_TIMES = {VESDE(0.01, 10): 1e-5, LinearVESDE(5): 1e-3, VPSDE(): 1e-3, SubVPSDE(): 1e-2}
ALL_SDES = pytest.mark.parametrize("sde", SMALLEST_TIMES, ids=lambda sde: type(sde).__name__)
DATA = correlated_gaussian(2)
MIXTURE = asymmetric_mixture(2)


def allowed(sde: SDE, predictor: str, corrector: str) -> bool:
    ancestral = predictor == "ancestral_sampling" and not isinstance(sde, VESDE | VPSDE)
    return not ancestral and not predictor == corrector == "none"


PAIRS = [(s, p, c) for s in SMALLEST_TIMES for p in PREDICTORS for c in CORRECTORS if allowed(s, p, c)]


def for_pairs(pairs):
    ids = [f"{type(sde).__name__}-{predictor}-{corrector}" for sde, predictor, corrector in pairs]
    return pytest.mark.parametrize(("sde", "predictor", "corrector"), pairs, ids=ids)


# For Gaussian data and its exact score every update is affine, so the samples are Gaussian with known moments.


def affine_parts(update, t, d):
    """A [n, d, d], b [n, d] and g [n] of update(x, t, noise) = (A x + b + g noise, A x + b), at every time."""
    x = jnp.tile(jnp.concatenate([jnp.zeros((1, d)), jnp.eye(d)]), (len(t), 1))
    noisy, mean = (np.asarray(a).reshape(len(t), d + 1, d) for a in update(x, jnp.repeat(t, d + 1), jnp.ones_like(x)))
    return np.swapaxes(mean[:, 1:] - mean[:, :1], 1, 2), mean[:, 0], (noisy - mean)[:, 0, 0]


NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(40)


def mean_norm(mean, covariance):
    """E|s| for s ~ N(mean, covariance) in 2-D, by Gauss-Hermite quadrature."""
    z = np.stack(np.meshgrid(NODES, NODES), axis=-1).reshape(-1, 2)
    weights = np.outer(WEIGHTS, WEIGHTS).reshape(-1) / WEIGHTS.sum() ** 2
    return weights @ np.linalg.norm(mean + z @ np.linalg.cholesky(covariance).T, axis=1)


def exact_moments(sampler: PredictorCorrector, data: GaussianMixture):
    """Mean and covariance of what the sampler returns, in float64; for Langevin in the limit of large batches."""
    sde, n, d = sampler.sde, sampler.num_steps, len(data.mean)
    predict, correct = PREDICTORS[sampler.predictor], CORRECTORS[sampler.corrector]
    with jax.enable_x64(True):
        t, score_fn = jnp.linspace(sde.t_max, sampler.smallest_time, n), data.score_fn(sde)
        step_alpha = np.asarray(sde.step_alpha(t, n))
        updates = []
        if sampler.corrector == "ald":
            updates = [lambda x, t, z: correct(score_fn, sde, x, t, z, n, sampler.snr)]
        if sampler.corrector == "langevin":
            updates = [lambda x, t, z: (score_fn(x, t),) * 2]
        updates = updates * sampler.corrector_steps
        if predict is not None:
            updates += [lambda x, t, z: predict(score_fn, sde, x, t, z, n, sampler.probability_flow)]
        parts = [affine_parts(update, t, d) for update in updates]
    mean, covariance = np.zeros(d), sde.prior_sigma**2 * np.eye(d)
    quiet = covariance
    for i in range(n):
        for k, (a, b, g) in enumerate(parts):
            a, b, g = a[i], b[i], g[i]
            if sampler.corrector == "langevin" and k < sampler.corrector_steps:
                ratio = mean_norm(np.zeros(2), np.eye(2)) / mean_norm(a @ mean + b, a @ covariance @ a.T)
                step = 2 * step_alpha[i] * (sampler.snr * ratio) ** 2
                a, b, g = np.eye(d) + step * a, step * b, np.sqrt(2 * step)
            mean, quiet = a @ mean + b, a @ covariance @ a.T
            covariance = quiet + g**2 * np.eye(d)
    return mean, quiet if sampler.noise_removal else covariance


def assert_moments(x, mean, covariance):
    """Within 5 standard errors, those of independent draws from N(mean, covariance)."""
    x, n = np.asarray(x, np.float64), len(x)
    variances = np.diag(covariance)
    assert np.all(np.abs(x.mean(0) - mean) < 5 * np.sqrt(variances / n))
    errors = np.sqrt((np.outer(variances, variances) + covariance**2) / n)
    assert np.all(np.abs(np.cov(x.T) - covariance) < 5 * errors)


def pair_sampler(sde, predictor, corrector, **kwargs):
    return PredictorCorrector(
        sde=sde, predictor=predictor, corrector=corrector, smallest_time=SMALLEST_TIMES[sde], **kwargs
    )


@for_pairs(PAIRS)
def test_moments_of_samples_are_those_of_the_chain(sde, predictor, corrector):
    sampler = pair_sampler(sde, predictor, corrector, num_steps=25)
    samples = sampler(DATA.score_fn(sde), jax.random.key(0), jnp.arange(50_000), (2,))
    assert_moments(samples.x, *exact_moments(sampler, DATA))


@pytest.mark.parametrize(
    "options", [{"noise_removal": False}, {"corrector_steps": 2}, {"probability_flow": True}], ids=str
)
def test_moments_with_options(options):
    sampler = pair_sampler(VPSDE(), "euler_maruyama", "ald", num_steps=25, **options)
    samples = sampler(DATA.score_fn(sampler.sde), jax.random.key(0), jnp.arange(50_000), (2,))
    assert_moments(samples.x, *exact_moments(sampler, DATA))


# Correctors alone lag behind the falling noise level: see the test of their invariant density.
@for_pairs([pair for pair in PAIRS if pair[1] != "none"])
def test_moments_of_the_chain_are_those_of_the_data(sde, predictor, corrector):
    """Up to the discretisation, in units of the largest variance."""
    # first-order errors in 1 / num_steps, and what is left to do at smallest_time
    tolerance = 0.015
    if corrector == "langevin":
        tolerance += 1.5 * 0.16**2  # see the test of the invariant density: step / 2C is about snr^2
    mean, covariance = exact_moments(pair_sampler(sde, predictor, corrector, num_steps=1000), DATA)
    scale = np.max(np.diag(DATA.covariance))
    assert np.max(np.abs(mean - DATA.mean)) < tolerance * np.sqrt(scale)
    assert np.max(np.abs(covariance - DATA.covariance)) < tolerance * scale


@ALL_SDES
@pytest.mark.parametrize("corrector", ["langevin", "ald"])
def test_correctors_leave_the_marginal_invariant(sde, corrector):
    """N(m, C_t) but for the discretisation, which is known: x + step score + sqrt(2 step) noise leaves invariant the
    covariance C with C = (I - step P) C (I - step P) + 2 step I, P the inverse of C_t, so C = C_t (I - step P / 2)^-1.
    """
    with jax.enable_x64(True):
        t = jnp.array([0.02, 0.3, 0.8])
        snr, score_fn = 0.2, DATA.score_fn(sde)
        for i in range(3):
            alpha, sigma = (float(a[i]) for a in sde.alpha_sigma(t))
            marginal = alpha**2 * DATA.covariance + sigma**2 * np.eye(2)
            step_alpha = float(sde.step_alpha(t, 50)[i])
            step = 2 * step_alpha * (snr * sigma) ** 2
            if corrector == "langevin":
                ratio = mean_norm(np.zeros(2), np.eye(2)) / mean_norm(np.zeros(2), np.linalg.inv(marginal))
                step = 2 * step_alpha * (snr * ratio) ** 2
            invariant = marginal @ np.linalg.inv(np.eye(2) - 0.5 * step * np.linalg.inv(marginal))
            normal = np.random.default_rng(0).normal(size=(2, 50_000, 2))
            x = alpha * DATA.mean + normal[0] @ np.linalg.cholesky(invariant).T
            noise, times = jnp.asarray(normal[1]), jnp.full(50_000, t[i])
            moved, _ = CORRECTORS[corrector](score_fn, sde, jnp.asarray(x), times, noise, 50, snr)
            assert_moments(moved, alpha * DATA.mean, invariant)
            assert float(jnp.mean((moved - x) ** 2)) > step


# The ODE


def gaussian_flow(sde, x, t0, t1):
    """The probability flow of Gaussian data from t0 to t1: it stretches the principal axes."""
    variances, axes = np.linalg.eigh(DATA.covariance)
    (alpha0, sigma0), (alpha1, sigma1) = (
        [np.asarray(a, np.float64) for a in sde.alpha_sigma(jnp.asarray(t))] for t in (t0, t1)
    )
    stretch = np.sqrt((alpha1**2 * variances + sigma1**2) / (alpha0**2 * variances + sigma0**2))
    return alpha1 * DATA.mean + (x - alpha0 * DATA.mean) @ (axes * stretch) @ axes.T


@ALL_SDES
def test_denoise_is_the_posterior_mean_of_a_gaussian(sde):
    t = jnp.array([0.05, 0.4, 0.9])
    x = sample_at(DATA, sde, jax.random.key(0), t)
    for i in range(3):
        alpha, sigma = (float(a[i]) for a in sde.alpha_sigma(t))
        gain = alpha * DATA.covariance @ np.linalg.inv(alpha**2 * DATA.covariance + sigma**2 * np.eye(2))
        expected = DATA.mean + gain @ (np.asarray(x[i]) - alpha * DATA.mean)
        # float32 rounding of x / alpha
        tolerance = 1e-5 * (1 + float(jnp.max(jnp.abs(x[i]))) / alpha)
        np.testing.assert_allclose(denoise(DATA.score_fn(sde), sde, x, t)[i], expected, atol=tolerance)


@ALL_SDES
def test_ode_sampler_follows_the_flow(sde):
    score_fn, key, numbers = DATA.score_fn(sde), jax.random.key(0), jnp.arange(100)
    t = SMALLEST_TIMES[sde]
    start = prior_samples(sde, image_keys(key, numbers), (2,))
    expected = gaussian_flow(sde, np.asarray(start), sde.t_max, t)
    sampler = ODESampler(sde=sde, smallest_time=t, noise_removal=False)
    samples = sampler(score_fn, key, numbers, (2,))
    # the prior's scale counts: errors made there shrink with the flow, but relative tolerances refer to it
    np.testing.assert_allclose(samples.x, expected, atol=1e-3)
    denoised = dataclasses.replace(sampler, noise_removal=True)(score_fn, key, numbers, (2,))
    assert denoised.nfe == samples.nfe + 1
    np.testing.assert_allclose(denoised.x, denoise(score_fn, sde, samples.x, jnp.full(100, t)), atol=1e-5)


def test_failure_of_the_ode_solver_is_an_error():
    sampler = ODESampler(sde=VPSDE())
    with pytest.raises(RuntimeError, match="the ODE solve failed"):
        sampler(lambda x, t: x * jnp.inf, jax.random.key(0), jnp.arange(2), (2,))


# Fast samplers


@ALL_SDES
@pytest.mark.parametrize("schedule", few_step.SCHEDULES)
def test_noise_levels(sde, schedule):
    levels = noise_levels(sde, SMALLEST_TIMES[sde], 11, schedule, 7.0)
    times = np.asarray(sde.time_of_log_noise_level(jnp.asarray(levels)))
    np.testing.assert_allclose(times[[0, -1]], [1, SMALLEST_TIMES[sde]], rtol=1e-4, atol=2e-7)
    grid = {"log_snr": levels, "power": np.exp(levels / 7), "time": times}[schedule]
    np.testing.assert_allclose(np.diff(grid), (grid[-1] - grid[0]) / 10, rtol=1e-4)


def test_power_schedule_has_no_overflow_and_no_cancellation():
    sde = VESDE(0.01, 50)
    uniform = noise_levels(sde, 1e-5, 6, "log_snr", 7.0)
    np.testing.assert_allclose(noise_levels(sde, 1e-5, 6, "power", 1e12), uniform, rtol=1e-9)
    smallest = noise_levels(sde, 1e-5, 6, "power", 1e-3)
    np.testing.assert_allclose(smallest[:-1], uniform[0] + 1e-3 * np.log1p(-np.arange(5) / 5), rtol=1e-12)
    assert smallest[-1] == uniform[-1]


LAMBDAS = np.array([-2.0, -1.2, -0.6, 0.1, 0.8, 1.4])


@pytest.mark.parametrize("eta", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_multistep_is_exact_for_polynomials(order, eta):
    """If D is a polynomial p, dy / dlambda = c (D - y) has the solution p - p'/c + p''/c^2 - ... + b exp(-c lambda)."""
    c = 1 + eta**2
    p = np.polynomial.Polynomial([0.3, -0.8, 0.5][:order])
    particular = p - p.deriv() / c + p.deriv(2) / c**2
    solution = particular(LAMBDAS) + 1.7 * np.exp(-c * LAMBDAS)
    decay, weights, _ = multistep_coefficients(-LAMBDAS, order, False, eta)
    for i in range(order - 1, 5):
        y = decay[i] * solution[i] + weights[i] @ p(LAMBDAS[i - np.arange(order)])
        np.testing.assert_allclose(y, solution[i + 1], rtol=1e-12)


def test_long_steps_have_a_lower_order():
    """With equal steps in time, the last step in lambda is longer than all before it, where polynomials diverge."""
    score_fn, numbers = MIXTURE.score_fn(VPSDE()), jnp.arange(64)
    exact = ODESampler(sde=VPSDE(), smallest_time=1e-3)(score_fn, jax.random.key(0), numbers, (2,)).x

    def error(order: int, schedule: str) -> float:
        settings = {"max_nfe": 10, "schedule": schedule, "order": order, "noise_removal": True}
        x = DPMSolverSampler(sde=VPSDE(), smallest_time=1e-3, **settings)(score_fn, jax.random.key(0), numbers, (2,)).x
        return float(jnp.sqrt(jnp.mean(jnp.square(x - exact))))

    assert max(error(2, "time"), error(3, "time")) < error(1, "time")
    weights = multistep_coefficients(noise_levels(VPSDE(), 1e-3, 10, "log_snr", 7.0), 3, False).weights
    assert np.all(weights[2:] != 0)  # steps of equal length have the full order


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0, 1.5])
def test_multistep_noise_keeps_the_noise_level(eta):
    """Where all data are 0, so is D, and y is normal with standard deviation rho at every level."""
    rho = np.exp(-LAMBDAS)
    decay, _, noise = multistep_coefficients(-LAMBDAS, 2, False, eta)
    np.testing.assert_allclose(decay**2 * rho[:-1] ** 2 + noise**2, rho[1:] ** 2, rtol=1e-12)
    assert np.all(noise > 0) == (eta > 0)


def test_multistep_to_zero_ends_with_the_denoiser():
    decay, weights, noise = multistep_coefficients(np.linspace(2, -4, 7), 3, True, 1.0)
    assert decay[-1] == noise[-1] == 0
    np.testing.assert_array_equal(weights[-1], [1, 0, 0])


@ALL_SDES
def test_moments_of_fast_samples_are_those_of_the_data(sde):
    """Within 5 standard errors and what is left of the discretisation after 80 evaluations, in units of the largest
    variance; denoised at the end, samples lack the posterior variance at smallest_time, far below that.
    """
    sampler = DPMSolverSampler(sde=sde, smallest_time=SMALLEST_TIMES[sde], max_nfe=80, eta=1.0)
    x = np.asarray(sampler(DATA.score_fn(sde), jax.random.key(0), jnp.arange(50_000), (2,)).x, np.float64)
    variances = np.diag(DATA.covariance)
    scale = np.max(variances)
    assert np.all(np.abs(x.mean(0) - DATA.mean) < 5 * np.sqrt(variances / len(x)) + 0.01 * np.sqrt(scale))
    errors = np.sqrt((np.outer(variances, variances) + DATA.covariance**2) / len(x))
    assert np.all(np.abs(np.cov(x.T) - DATA.covariance) < 5 * errors + 0.01 * scale)


def test_the_sde_forgets_what_the_ode_keeps():
    """A score that is wrong at large noise only moves the ODE's samples much further than the SDE's."""
    sde, moved = VESDE(0.01, 10), {}

    def wrong(x, t):
        sigma = sde.alpha_sigma(t)[1][:, None]
        return DATA.score_fn(sde)(x, t) + jnp.where(sigma > 2, 0.3 / sigma, 0.0)

    for eta in (0.0, 1.0):
        sampler = DPMSolverSampler(sde=sde, smallest_time=1e-3, max_nfe=40, eta=eta)
        x = sampler(wrong, jax.random.key(0), jnp.arange(20_000), (2,)).x
        moved[eta] = np.linalg.norm(np.mean(x, axis=0) - DATA.mean)
    assert moved[1.0] < 0.5 * moved[0.0], moved


@pytest.mark.parametrize(("sde", "predictor"), [(VPSDE(), "reverse_diffusion"), (LinearVESDE(), "euler_maruyama")])
def test_steps_that_are_longer_than_the_noise_cause_a_concern_and_its_advice_helps(sde, predictor):
    """With the exact score of two points, every sample must end at one of them."""
    points = GaussianMixture(np.full(2, 0.5), np.array([[-1.0], [1.0]]), np.zeros((2, 1, 1)))
    distances = []
    for smallest_time in (1e-5, 1e-2):
        settings = {"smallest_time": smallest_time, "num_steps": 200, "predictor": predictor, "corrector": "none"}
        sampler = PredictorCorrector(sde=sde, **settings)
        concerns = sampler.concerns(discrete=False)
        assert len(concerns) == (smallest_time == 1e-5)
        assert all("raise sampling.smallest_time (to about 0.0" in concern for concern in concerns)
        assert not sampler.concerns(discrete=True)
        x = sampler(points.score_fn(sde), jax.random.key(0), jnp.arange(200), (1,)).x
        distances.append(float(jnp.sqrt(jnp.mean((jnp.abs(x) - 1) ** 2))))
    assert distances[1] < 0.5 < 10 < distances[0]


@pytest.mark.parametrize("kind", [DPMSolverSampler, HeunSampler])
def test_denoised_images_are_held_in_the_range_of_the_data(kind):
    def draw(data_range):
        sampler = kind(sde=VESDE(0.01, 10), smallest_time=1e-3, data_range=data_range)
        return np.asarray(sampler(MIXTURE.score_fn(sampler.sde), jax.random.key(0), jnp.arange(200), (2,)).x)

    narrow, wide, free = draw((-0.25, 0.5)), draw((-100.0, 100.0)), draw(None)
    assert (narrow.min(), narrow.max()) == (-0.25, 0.5)
    assert free.min() < -0.25
    np.testing.assert_allclose(wide, free, atol=1e-5)


@functools.cache
def precise_flow(sde):
    """The mixture's flow to t = 0.01 by a tight adaptive solve."""
    sampler = ODESampler(sde=sde, smallest_time=1e-2, noise_removal=False, rtol=1e-9, atol=1e-9)
    return sampler(MIXTURE.score_fn(sde), jax.random.key(0), jnp.arange(100), (2,)).x


ORDERS = [(VPSDE(), DPMSolverSampler, order, order) for order in (1, 2, 3)]
ORDERS += [(VPSDE(), HeunSampler, None, 2), (VESDE(), DPMSolverSampler, 3, 3), (VESDE(), HeunSampler, None, 2)]


@pytest.mark.parametrize(
    ("sde", "kind", "option", "order"), ORDERS, ids=[f"{type(s).__name__}-{k.__name__}-{o}" for s, k, _, o in ORDERS]
)
def test_order_of_convergence(sde, kind, option, order):
    """The error falls as steps^-order, by regression over 40 to 160 evaluations."""
    evaluations, errors = (40, 80, 160), []
    options = {"sde": sde, "smallest_time": 1e-2, "noise_removal": False, "schedule": "log_snr"}
    if option:
        options["order"] = option
    with jax.enable_x64(True):
        for n in evaluations:
            samples = kind(**options, max_nfe=n)(MIXTURE.score_fn(sde), jax.random.key(0), jnp.arange(100), (2,))
            assert samples.nfe == n
            errors.append(float(jnp.sqrt(jnp.mean((samples.x - precise_flow(sde)) ** 2))))
    slope = np.polyfit(np.log(evaluations), np.log(errors), 1)[0]
    # higher-order terms still count at 40 evaluations
    assert abs(-slope - order) < 0.15, errors


# What all samplers share


def all_samplers(sde: SDE) -> dict[str, Sampler]:
    common = {"sde": sde, "smallest_time": 1e-3}
    return {
        "reverse_diffusion": PredictorCorrector(**common, corrector="none", num_steps=25),
        "ald": PredictorCorrector(**common, corrector="ald", num_steps=25, corrector_steps=2),
        "langevin": PredictorCorrector(**common, num_steps=25),
        "ode": ODESampler(**common),
        "dpm_solver": DPMSolverSampler(**common, order=3),
        "dpm_solver_sde": DPMSolverSampler(**common, eta=1.0),
        "heun": HeunSampler(**common),
    }


@pytest.mark.parametrize("name", ["reverse_diffusion", "ald", "dpm_solver", "dpm_solver_sde", "heun"])
def test_an_image_depends_on_its_number_only(name):
    sde = VPSDE()
    sampler, score_fn, key = all_samplers(sde)[name], MIXTURE.score_fn(sde), jax.random.key(3)
    together = sampler(score_fn, key, jnp.arange(8), (2,)).x
    apart = jnp.concatenate([sampler(score_fn, key, jnp.arange(*ends), (2,)).x for ends in ((0, 4), (4, 8))])
    reversed_ = sampler(score_fn, key, jnp.arange(8)[::-1], (2,)).x[::-1]
    # programs for other batch sizes may round differently
    np.testing.assert_allclose(apart, together, atol=1e-5)
    np.testing.assert_allclose(reversed_, together, atol=1e-5)
    assert len(np.unique(np.round(np.asarray(together), 3), axis=0)) == 8
    other = sampler(score_fn, jax.random.key(4), jnp.arange(8), (2,)).x
    assert np.min(np.abs(other - together)) > 1e-4


@pytest.mark.parametrize("name", ["langevin", "ode", "dpm_solver_sde"])
def test_images_do_not_depend_on_the_number_of_devices(name):
    sampler, key, numbers = all_samplers(VPSDE())[name], jax.random.key(3), jnp.arange(8)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    sharded = jax.device_put(numbers, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    on_one = sampler(MIXTURE.score_fn(sampler.sde), key, numbers, (2,))
    on_all = sampler(MIXTURE.score_fn(sampler.sde), key, sharded, (2,))
    assert len(jax.devices()) > 1
    assert len(on_all.x.sharding.device_set) == len(jax.devices())
    # The adaptive solver's steps follow an error norm that rounds differently: agreement to within its tolerances.
    np.testing.assert_allclose(on_all.x, on_one.x, atol=1e-4 if name == "ode" else 1e-5)


@pytest.mark.parametrize("name", all_samplers(VPSDE()))
def test_parts_change_nothing_and_can_be_stopped(name, monkeypatch):
    monkeypatch.setattr("arrays.PART_SECONDS", 0.0)  # single steps
    sde = VPSDE()
    sampler, score_fn, seen = all_samplers(sde)[name], MIXTURE.score_fn(sde), []
    plain = sampler(score_fn, jax.random.key(0), jnp.arange(8), (2,))
    watched = sampler(score_fn, jax.random.key(0), jnp.arange(8), (2,), lambda *done: seen.append(done))
    np.testing.assert_array_equal(watched.x, plain.x)
    assert len(seen) >= 4
    assert seen[-1][0] == seen[-1][1]

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler(score_fn, jax.random.key(0), jnp.arange(8), (2,), stop)


@pytest.mark.parametrize("name", all_samplers(VPSDE()))
def test_evaluations_are_counted_and_new_weights_compile_nothing(name):
    calls, traces, results = [], [], []
    sampler = all_samplers(VPSDE())[name]

    def score_fn(weight, x, t):
        traces.append(None)
        jax.debug.callback(lambda: calls.append(None))
        return -weight * x

    for weight in (1.0, 1.5):
        traces.clear()
        calls.clear()
        weighted = jax.tree_util.Partial(score_fn, jnp.float32(weight))
        results.append(sampler(weighted, jax.random.key(0), jnp.arange(2), (2,)))
        jax.effects_barrier()
        if name != "ode":  # ode.integrate counts for itself
            assert results[-1].nfe == len(calls)
    assert not traces
    assert np.min(np.abs(results[0].x - results[1].x)) > 1e-4


@pytest.mark.parametrize("name", ["dpm_solver", "heun", "annealed_langevin"])
def test_times_from_noise_levels_are_not_before_the_smallest_time(name):
    """32 bits cannot tell ln rho at the smallest time from ln rho at 0, where labels like ln t are infinite."""
    sde, smallest_time = VESDE(0.01, 10), 1e-9
    assert sde.time_of_log_noise_level(sde.log_noise_level(jnp.float32(smallest_time))) == 0
    common = {"sde": sde, "smallest_time": smallest_time}
    sampler = {
        "dpm_solver": DPMSolverSampler(**common, max_nfe=6),
        "heun": HeunSampler(**common, max_nfe=6),
        "annealed_langevin": LangevinSampler(**common, num_levels=3, steps_per_level=2),
    }[name]
    times = []

    def score_fn(x, t):
        jax.debug.callback(lambda t: times.append(float(np.min(t))), t)
        return -x / (1 + append_dims(sde.alpha_sigma(t)[1], x) ** 2)

    sampler(score_fn, jax.random.key(0), jnp.arange(2), (2,))
    jax.effects_barrier()
    assert min(times) == np.float32(smallest_time)


# From the configuration


def default_config() -> Config:
    return get_config()


def test_samplers_from_the_configuration():
    config, sde = default_config(), VESDE()
    sampler = sampler_from_config(config, sde, None)
    assert sampler == PredictorCorrector(sde=sde, num_steps=config.model.num_scales)
    config.sampling.num_steps, config.sampling.smallest_time = 50, 1e-3
    sampler = sampler_from_config(config, sde, None)
    assert sampler == PredictorCorrector(sde=sde, num_steps=50, smallest_time=1e-3)
    for method, kind in (("ode", ODESampler), ("dpm_solver", DPMSolverSampler), ("heun", HeunSampler)):
        config.sampling.method = method
        sampler = sampler_from_config(config, sde, (0.0, 1.0))
        assert type(sampler) is kind
        assert sampler.smallest_time == 1e-3
        if isinstance(sampler, FastSampler):
            assert sampler.data_range == (0.0, 1.0)
            samples = sampler(MIXTURE.score_fn(sde), jax.random.key(0), jnp.arange(2), (2,))
            assert samples.nfe <= config.sampling.max_nfe


@pytest.mark.parametrize(
    ("method", "field", "value", "message"),
    [
        ("pd", "n_steps_each", 1, "sampling.method must be one of pc, ode, dpm_solver, heun, langevin, .*got 'pd'"),
        ("pc", "predictor", "euler", "sampling.predictor must be one of euler_maruyama, reverse_diffusion, .*'euler'"),
        ("pc", "corrector", "mala", "sampling.corrector must be one of langevin, ald, none, got 'mala'"),
        ("pc", "predictor", "ancestral_sampling", "needs training.sde vesde or vpsde, got SubVPSDE"),
        ("pc", "num_steps", -1, "sampling.num_steps must be at least 1, got -1"),
        ("pc", "n_steps_each", 0, "sampling.n_steps_each must be at least 1, got 0"),
        ("pc", "snr", -0.1, "sampling.snr must be positive, got -0.1"),
        ("pc", "smallest_time", 0.02, "sampling.smallest_time is 0.02, but .* must be at most 0.01"),
        ("pc", "smallest_time", 1.0, "sampling.smallest_time must lie between 0 and 1.0, got 1.0"),
        ("ode", "ode_solver", "euler", "sampling.ode_solver must be one of dopri5, scipy, got 'euler'"),
        ("ode", "rtol", 0.0, "sampling.rtol must be positive, got 0.0"),
        ("dpm_solver", "eta", -0.5, "sampling.eta must not be negative, got -0.5"),
        ("dpm_solver", "order", 4, "sampling.order must be one of 1, 2, 3, got 4"),
        ("heun", "schedule", "cosine", "sampling.schedule must be one of auto, log_snr, power, time, got 'cosine'"),
        ("heun", "max_nfe", 2, "sampling.max_nfe must be at least 3, got 2"),
    ],
)
def test_bad_configurations_are_refused(method, field, value, message):
    config = default_config()
    config.sampling.method = method
    config.sampling[field] = value
    with pytest.raises(ValueError, match=message):
        sampler_from_config(config, SubVPSDE(), None)


def test_several_processes_are_refused_scipys_solver(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"sampling.ode_solver asks for SciPy's solver, .* but there are 2"):
        ODESampler(sde=VPSDE(), method="scipy")


def test_the_range_of_the_data():
    config = default_config()
    config.sampling.method = "heun"
    for dataset, centered, expected in (("CIFAR10", True, (-1.0, 1.0)), ("checkerboard", False, None)):
        config.data.update(dataset=dataset, centered=centered)
        sampler = sampler_from_config(config, VESDE(), training_preprocess(config).data_range)
        assert isinstance(sampler, FastSampler)
        assert sampler.data_range == expected
    config.data.dataset, config.sampling.clip_denoised = "CIFAR10", False
    sampler = sampler_from_config(config, VESDE(), (0.0, 1.0))
    assert isinstance(sampler, FastSampler)
    assert sampler.data_range is None


def test_ancestral_sampling_follows_no_ode():
    with pytest.raises(ValueError, match="no probability_flow"):
        PredictorCorrector(sde=VPSDE(), predictor="ancestral_sampling", probability_flow=True)


@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral_sampling"])
def test_too_short_a_chain_is_refused(predictor):
    PredictorCorrector(sde=VPSDE(), predictor=predictor, num_steps=21)
    with pytest.raises(ValueError, match=r"sampling.num_steps is too small: .*more than 20.0 steps, got 20"):
        PredictorCorrector(sde=VPSDE(), predictor=predictor, num_steps=20)
    PredictorCorrector(sde=VESDE(), predictor=predictor, num_steps=2)
    with pytest.raises(ValueError, match=r"sampling.num_steps is too small: .*at least 2 steps, got 1"):
        PredictorCorrector(sde=VESDE(), predictor=predictor, num_steps=1)


def test_none_twice_is_refused():
    with pytest.raises(ValueError, match="both none"):
        PredictorCorrector(sde=VPSDE(), predictor="none", corrector="none")
