"""A new SDE, sampler, objective and network, each defined and registered as docs/extending.md describes.

Each is a class and an entry of one table, without any other change."""

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

import likelihood
import losses
import sampling
import sde_lib
from arrays import Batch, PerExample, ReportProgress, ScoreFn, append_dims, mean_square
from build import Run, build
from configs.default import Config
from configs.toy.smoke import get_config
from evaluators.estimators import ode_estimator_from_config
from likelihood import Method, ode_log_likelihood
from models.score import POINT_NETWORKS
from objectives.objective import Residual, TrainingObjective, require_first_order
from objectives.times import TimeDistribution, times_from_config
from samplers.sampler import DataRange, ImageKeys, Sampler, Samples, denoise
from sde_lib import SDE, Times, sde_from_config
from solvers.ode import FIXED_STEP, FixedStep, integrate
from solvers.solve import combine
from tests.analytic import asymmetric_mixture, gaussian

TIMES = jnp.array([1e-5, 1e-3, 0.05, 0.3, 0.7, 1.0])


# A new SDE


@dataclasses.dataclass(frozen=True)
class ConstantBetaSDE(SDE):
    """Variance preserving with a constant rate: dx = -rate x / 2 dt + sqrt(rate) dw, so alpha^2 = exp(-rate t)."""

    rate: float = 20.0

    @property
    def prior_sigma(self) -> float:
        return 1.0

    def alpha_sigma(self, t: Times) -> tuple[Times, Times]:
        return jnp.exp(-0.5 * self.rate * t), jnp.sqrt(-jnp.expm1(-self.rate * t))

    def drift_coeff(self, t: Times) -> Times:
        return jnp.full_like(t, -0.5 * self.rate)

    def diffusion(self, t: Times) -> Times:
        return jnp.full_like(t, math.sqrt(self.rate))

    def log_noise_level(self, t: Times) -> Times:
        return 0.5 * (self.rate * t + jnp.log(-jnp.expm1(-self.rate * t)))

    def time_of_log_noise_level(self, log_rho: Times) -> Times:
        return jax.nn.softplus(2 * log_rho) / self.rate


@pytest.fixture
def registered_sde(monkeypatch):
    monkeypatch.setitem(sde_lib.SDES, "constant_beta", ConstantBetaSDE)


def config_with(**fields) -> Config:
    config = get_config()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


def test_closed_forms_of_the_new_sde():
    sde = ConstantBetaSDE()
    alpha, sigma = sde.alpha_sigma(TIMES)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-6)
    np.testing.assert_allclose(sde.log_noise_level(TIMES), jnp.log(sigma / alpha), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sde.time_of_log_noise_level(sde.log_noise_level(TIMES)), TIMES, rtol=1e-4)
    slope = jax.vmap(jax.grad(lambda t: 2 * sde.log_noise_level(t)))(TIMES)
    np.testing.assert_allclose((sde.diffusion(TIMES) / sigma) ** 2, slope, rtol=1e-4)


def test_likelihood_under_the_new_sde():
    sde, density, t_min = ConstantBetaSDE(), asymmetric_mixture(2), 1e-4
    x = density.sample(jax.random.key(0), (16, 2))
    result = ode_log_likelihood(density.score_fn(sde), sde, x, None, t_min=t_min, method="rk4_log")
    np.testing.assert_allclose(result.logp, density.log_density(sde, x, jnp.full(16, t_min)), atol=1e-3)


def test_constants_of_the_new_sde(registered_sde):
    config = config_with(training__sde="constant_beta")
    assert sde_from_config(config) == ConstantBetaSDE()
    config.model.rate = 7.0  # a field that a configuration adds
    assert sde_from_config(config) == ConstantBetaSDE(rate=7.0)


def test_a_run_with_the_new_sde(registered_sde):
    """A step of training, likelihoods and samples, all from a configuration."""
    run: Run = build(config_with(training__sde="constant_beta"))
    assert run.sde == ConstantBetaSDE()
    state, x = run.fresh_state(), jax.random.normal(jax.random.key(0), (64, 2))
    after, metrics = jax.jit(run.trainer.train_step)(state, x, jax.random.key(1))
    assert after.step == 1
    assert all(np.isfinite(value).all() for value in metrics.values())
    assert metrics["grad_norm"] > 0
    score_fn = run.score_fn(after.ema_params)
    result = ode_log_likelihood(score_fn, run.sde, x, None, t_min=1e-3, method="rk4_log", num_steps=8)
    assert jnp.isfinite(result.logp).all()
    samples = run.sampler()(score_fn, jax.random.key(2), jnp.arange(8), run.data_shape)
    assert samples.x.shape == (8, 2)
    assert jnp.isfinite(samples.x).all()


class CosineSDE(ConstantBetaSDE):
    """alpha = cos(pi t / 2), which is 0 at the end, so that the data are forgotten completely."""

    def log_noise_level(self, t: Times) -> Times:
        return jnp.log(jnp.tan(jnp.pi / 2 * t))


def test_an_sde_without_a_largest_noise_level_is_refused_before_training(monkeypatch):
    monkeypatch.setitem(sde_lib.SDES, "cosine", CosineSDE)
    with pytest.raises(ValueError, match=r"training.sde is 'cosine', whose ln\(sigma / alpha\) is nan at t = 1.0; "):
        build(config_with(training__sde="cosine"))


# A new sampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class EulerSampler(Sampler):
    """Equal steps of Euler's method in lambda = ln rho: dx / dlambda = 2 sigma^2 / g^2 dx / dt."""

    num_steps: int

    @property
    def follows_ode(self) -> bool:
        return True

    def solve(self, score_fn: ScoreFn, x: Batch, keys: ImageKeys, progress: ReportProgress | None = None) -> Samples:
        del keys, progress  # the ODE has no noise, and short runs need no reports
        first, last = self.sde.log_noise_level(jnp.array([self.sde.t_max, self.smallest_time]))
        times = self.sde.time_of_log_noise_level(jnp.linspace(first, last, self.num_steps + 1))
        factors = 2 * (self.sde.alpha_sigma(times)[1] / self.sde.diffusion(times)) ** 2

        def step(i: Array, x: Batch) -> Batch:
            flow = self.sde.probability_flow(score_fn, x, jnp.full(len(x), times[i]))
            return x + (last - first) / self.num_steps * factors[i] * flow

        x = jax.lax.fori_loop(0, self.num_steps, step, x)
        if self.noise_removal:
            x = denoise(score_fn, self.sde, x, jnp.full(len(x), self.smallest_time))
        return Samples(x, self.num_steps + self.noise_removal)


def euler_from_config(config: Config, sde: SDE, data_range: DataRange) -> Sampler:
    del data_range
    return EulerSampler(sde=sde, smallest_time=config.sampling.smallest_time, num_steps=config.sampling.num_steps)


@pytest.mark.parametrize("sde", ["vpsde", "constant_beta"])
def test_the_new_sampler_draws_a_gaussian(registered_sde, monkeypatch, sde):
    monkeypatch.setitem(sampling.SAMPLERS, "euler", euler_from_config)
    run = build(config_with(training__sde=sde, sampling__method="euler", sampling__num_steps=1000))
    mean, std, n = np.array([0.5, -0.3]), np.array([0.2, 0.6]), 4000
    score_fn = gaussian(mean, np.diag(std**2)).score_fn(run.sde)
    samples = run.sampler()(score_fn, jax.random.key(0), jnp.arange(n), (2,))
    assert samples.nfe == 1001
    x = np.asarray(samples.x, np.float64)
    assert np.all(np.abs(x.mean(axis=0) - mean) < 5 * std / math.sqrt(n))
    assert np.all(np.abs(x.std(axis=0) - std) < 5 * std / math.sqrt(2 * n))


def test_the_new_sampler_is_listed_for_a_mistyped_name(monkeypatch):
    monkeypatch.setitem(sampling.SAMPLERS, "euler", euler_from_config)
    with pytest.raises(ValueError, match=r"sampling.method must be one of .*annealed_langevin.*, euler, got 'eulr'"):
        build(config_with(sampling__method="eulr")).sampler()


# A new ODE solver


def midpoint_step(field, node, dt, number):
    """Returns the next state and derivative of the explicit midpoint rule."""
    del number
    half = combine(node.y, dt, [1 / 2], [node.slopes[0]])
    y = combine(node.y, dt, [1], [field(node.t + dt / 2, half)])
    return y, field(node.t + dt, y)


def test_the_new_solver_is_of_second_order_and_computes_likelihoods(monkeypatch):
    monkeypatch.setitem(FIXED_STEP, "midpoint", FixedStep(midpoint_step, 2, 1))
    monkeypatch.setitem(likelihood.METHODS, "midpoint_log", Method("reference", "midpoint"))
    errors = []
    for steps in (10, 20):
        y, info = integrate(lambda t, y: -y, jnp.ones((1, 1)), 0.0, 1.0, method="midpoint", num_steps=steps)
        assert (int(info.steps), int(info.nfe)) == (steps, 2 * steps + 1)
        errors.append(abs(float(y[0, 0]) - math.exp(-1)))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert ode_estimator_from_config(config_with(eval__ode_solver="midpoint_log")).description["steps"] > 0
    sde, density = sde_lib.VPSDE(), asymmetric_mixture(2)
    x = density.sample(jax.random.key(0), (16, 2))
    result = ode_log_likelihood(density.score_fn(sde), sde, x, None, t_min=1e-3, method="midpoint_log")
    np.testing.assert_allclose(result.logp, density.log_density(sde, x, jnp.full(16, 1e-3)), atol=0.01)


# A new objective


class OppositeNoise(NamedTuple):
    """Times, and the noise of the first example of each pair."""

    t: PerExample
    z: Batch


@dataclasses.dataclass(frozen=True)
class OppositeObjective(TrainingObjective):
    """First-order denoising score matching, averaged over the noise z and the opposite noise -z of each example."""

    times: TimeDistribution

    def draw_noise(
        self, key: Array, sde: SDE, shape: tuple[int, ...], density: Float[Array, " bins"] | None = None
    ) -> OppositeNoise:
        del density
        t_key, z_key = jax.random.split(key)
        return OppositeNoise(self.times.draw(t_key, sde, shape[0]), jax.random.normal(z_key, shape))

    def losses(
        self, score_fn: ScoreFn, sde: SDE, x0: Batch, noise: OppositeNoise, residual: Residual | None = None
    ) -> dict[str, PerExample]:
        del residual
        mean, sigma = sde.marginal(x0, noise.t)
        factor = append_dims(sigma, x0)

        def error(z: Batch) -> PerExample:
            return mean_square(factor * score_fn(mean + factor * z, noise.t) + z)

        loss = (error(noise.z) + error(-noise.z)) / 2
        return {"total": loss, "first": loss, "size": mean_square(x0)}  # a metric that is not a term


def opposite_from_config(config: Config) -> OppositeObjective:
    require_first_order(config.training)
    return OppositeObjective(times_from_config(config.training))


def one_step(run: Run) -> dict[str, Any]:
    """Returns the metrics of a step of training on points."""
    x = jax.random.normal(jax.random.key(0), (64, 2))
    after, metrics = jax.jit(run.trainer.train_step)(run.fresh_state(), x, jax.random.key(1))
    assert after.step == 1
    return metrics


def test_the_new_objective_has_the_expectation_of_denoising(monkeypatch):
    monkeypatch.setitem(losses.OBJECTIVES, "opposite", opposite_from_config)
    config = config_with(training__objective="opposite")
    run, n = build(config), 20_000
    x0 = asymmetric_mixture(2).sample(jax.random.key(2), (n, 2))
    score_fn = gaussian(np.zeros(2), np.eye(2)).score_fn(run.sde)  # not the score of the data
    values = {}
    for name in ("opposite", "denoising"):
        config.training.objective = name
        objective = losses.objective_from_config(config)
        noise = objective.draw_noise(jax.random.key(3), run.sde, x0.shape)
        values[name] = np.asarray(objective.losses(score_fn, run.sde, x0, noise)["total"], np.float64)
    error = math.hypot(*(value.std() / math.sqrt(n) for value in values.values()))
    assert abs(values["opposite"].mean() - values["denoising"].mean()) < 5 * error
    assert values["opposite"].std() < values["denoising"].std()


def test_a_run_with_the_new_objective(monkeypatch):
    monkeypatch.setitem(losses.OBJECTIVES, "opposite", opposite_from_config)
    metrics = one_step(build(config_with(training__objective="opposite")))
    assert metrics["first"] == metrics["total"] > 0
    assert metrics["size"].shape == ()
    assert metrics["grad_norm"] > 0
    with pytest.raises(ValueError, match=r"score_matching_order is 2, but it is for training\.objective=denoising"):
        build(config_with(training__objective="opposite", training__score_matching_order=2))


# A new network


class LinearNetwork(nn.Module):
    """The noise as a linear function of the point, with a matrix that depends linearly on the time."""

    scale_by_sigma: bool = False
    num_classes: int = 0

    @nn.compact
    def __call__(self, x: Batch, labels: PerExample, train: bool = False) -> Batch:
        del train
        matrix = nn.Dense(x.shape[1] ** 2)(labels[:, None] / 999).reshape(-1, x.shape[1], x.shape[1])
        return jnp.einsum("bij,bj->bi", matrix, x)


def test_a_run_with_the_new_network(monkeypatch):
    monkeypatch.setitem(POINT_NETWORKS, "linear", lambda config: LinearNetwork())
    run = build(config_with(model__name="linear", model__scale_by_sigma=False))
    metrics = one_step(run)
    assert np.isfinite(metrics["total"])
    assert metrics["grad_norm"] > 0
    with pytest.raises(ValueError, match=r"model.name is 'liner'; known: .*mlp_published.*, linear$"):
        build(config_with(model__name="liner"))


class Silent(nn.Module):
    """A network that does not say whether it divides by sigma."""

    @nn.compact
    def __call__(self, x: Batch, labels: PerExample, train: bool = False) -> Batch:
        del labels, train
        return nn.Dense(x.shape[1])(x)


@pytest.mark.parametrize(
    ("network", "fields", "message"),
    [
        (Silent(), {}, r"Silent, the network of model.name='linear', has no attribute scale_by_sigma: add it"),
        (LinearNetwork(), {"model__scale_by_sigma": True}, r"is True, but .*='linear' has scale_by_sigma=False: set"),
        (LinearNetwork(), {"data__num_classes": 3}, r"data.num_classes is 3, but model.name='linear' .* not told"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_network_that_does_not_fit_the_configuration_is_refused(monkeypatch, network, fields, message):
    monkeypatch.setitem(POINT_NETWORKS, "linear", lambda config: network)
    with pytest.raises(ValueError, match=message):
        build(config_with(model__name="linear", **{"model__scale_by_sigma": False} | fields))


def test_a_network_with_the_number_of_classes_is_told_them(monkeypatch):
    monkeypatch.setitem(POINT_NETWORKS, "linear", lambda config: LinearNetwork(num_classes=config.data.num_classes))
    config = config_with(model__name="linear", model__scale_by_sigma=False, data__num_classes=3)
    config.training.label_dropout = 0.1
    build(config)
