"""The training and evaluation of i-DODE: its terms against other expressions, and settings that are refused."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from arrays import Batch, PerExample, append_dims, level_values
from bound_likelihood import expected_prior_logp, likelihood_bound
from build import build
from configs.default import Config, get_config
from coordinates import GaussianReference
from datasets import Preprocess
from dequantization.noise import NormalDequantizer, dequantizer_from_config
from likelihood import ode_log_likelihood
from losses import Noise, Objective, objective_from_config
from models.score import ScoreModel, score_model_from_config
from objectives.bound import prior_divergence, reconstruction
from objectives.times import TimeDistribution
from sde_lib import VPSDE, LinearGammaSDE, LinearGammaVPSDE, StraightPathSDE
from sources.densities import GaussianMixture
from tests.golden_common import load_config
from train_state import optimizer_from_config

SCHEDULES = (LinearGammaVPSDE(), StraightPathSDE())
each_schedule = pytest.mark.parametrize("sde", SCHEDULES, ids=("vp", "straight"))
KEY, D = jax.random.key(0), 3
MATRIX = jnp.array([[0.3, -0.5, 0.2], [0.4, 0.1, -0.2], [-0.1, 0.6, 0.5]])


def velocity_of(x: Batch, t: PerExample) -> Batch:
    """An arbitrary velocity, whose Jacobian is not symmetric."""
    return jnp.tanh(x @ MATRIX + append_dims(t, x)) - 0.3 * x


class Network:
    """A network without parameters that predicts the velocity, or the noise that follows from it."""

    scale_by_sigma = False

    def __init__(self, noise_of: LinearGammaSDE | None):
        self.noise_of = noise_of

    def lazy_init(self, rngs: Array, *args: Any) -> Any:
        raise NotImplementedError

    def apply(self, variables: Any, x: Batch, labels: PerExample, *args: Any, **kwargs: Any) -> Any:
        velocity = velocity_of(x, labels / 999)
        return velocity if self.noise_of is None else self.noise_of.noise_of_velocity(x, velocity, labels / 999)


@each_schedule
def test_velocity_and_noise_of_one_function_have_the_same_likelihood(sde: LinearGammaSDE) -> None:
    x = jax.random.normal(KEY, (4, D))
    models = (
        ScoreModel(Network(None), sde, parameterization="velocity"),
        ScoreModel(Network(sde), sde, parameterization="noise"),
    )
    solve = {"t_min": 0.0, "method": "rk4", "num_steps": 12}
    first, second = (ode_log_likelihood(model.score_fn({}), sde, x, None, **solve).logp for model in models)
    np.testing.assert_allclose(first, second, rtol=1e-5)
    assert jnp.std(first) > 0.1


@each_schedule
@pytest.mark.parametrize("importance", [True, False])
def test_the_second_order_is_that_of_the_paper_in_its_variables(sde: LinearGammaSDE, importance: bool) -> None:
    """0.1 w e^2 / d with the residual e of velocities, and the first order w |F* - F|^2."""
    values = tuple(np.linspace(-1, 1, 5).tolist())
    objective = Objective(
        order=2,
        t_min=1e-9,
        likelihood_weighting=True,
        importance_weighting=importance,
        importance_density="velocity",
        estimator="squared_trace",
        high_order_weighting="first_order",
        second_weight=0.1,
        level_values=values,
    )
    x0 = jnp.asarray(np.random.default_rng(0).choice(values, (4, D)), jnp.float32)
    noise = objective.draw_noise(KEY, sde, x0.shape)._replace(t=jnp.array([0.1, 0.4, 0.7, 0.95]))
    losses = objective.losses(ScoreModel(Network(None), sde, parameterization="velocity").score_fn({}), sde, x0, noise)
    alpha, sigma = sde.alpha_sigma(noise.t)
    xt = alpha[:, None] * x0 + sigma[:, None] * noise.z
    velocity, tangent = jax.jvp(lambda x: velocity_of(x, noise.t), (xt,), (noise.probe,))
    divergence = jnp.sum(noise.probe * tangent, axis=1)
    square = jnp.sum((sde.velocity(x0, noise.z, noise.t) - velocity) ** 2, axis=1)
    if sde.k == 1:
        error = sigma * divergence - alpha * (D - square)
        weight = 0.5 * (math.log1p(math.exp(13.3)) - math.log1p(math.exp(-5)) if importance else 18.3 * alpha**2)
    else:
        error = sigma * divergence - D / math.sqrt(2) + math.sqrt(2) * alpha * square
        weight = sde.velocity_weight(jnp.zeros(())) if importance else 18.3 * alpha**2
    bits = D * math.log(2)
    np.testing.assert_allclose(losses["first"], weight * square / bits, rtol=1e-5)
    second = losses["total"] - losses["first"] - losses["reconstruction"] - losses["prior"]
    np.testing.assert_allclose(second, 0.1 * weight * error**2 / D / bits, rtol=1e-4, atol=1e-5)


def test_traces_over_all_probes() -> None:
    """The product is unbiased for the exact term; the square adds twice the off-diagonal symmetric part."""
    sde, t = VPSDE(), 0.3
    probes = jnp.array(list(itertools.product((-1.0, 1.0), repeat=D)))
    pairs = list(itertools.product(range(len(probes)), repeat=2))
    first, second = (probes[jnp.array([pair[i] for pair in pairs])] for i in range(2))
    x0, z = (jnp.tile(jax.random.normal(key, (1, D)), (len(pairs), 1)) for key in jax.random.split(KEY))
    noise = Noise(jnp.full(len(pairs), t), z, first, second)

    def score_fn(x: Batch, t: PerExample) -> Batch:
        return velocity_of(x, t)

    got = {
        name: jnp.mean(Objective(order=2, estimator=name).losses(score_fn, sde, x0, noise)["second_trace"])
        for name in ("squared_trace", "unbiased_trace")
    }
    alpha, sigma = (float(a) for a in sde.alpha_sigma(jnp.float32(t)))
    xt = (alpha * x0 + sigma * z)[0]
    matrix = sigma**2 * jax.jacfwd(lambda x: velocity_of(x[None], jnp.full(1, t))[0])(xt) + jnp.eye(D)
    u = z[0] + sigma * velocity_of(xt[None], jnp.full(1, t))[0]
    exact = (jnp.trace(matrix) - u @ u) ** 2 / D**2
    symmetric = 0.5 * (matrix + matrix.T)
    bias = 2 * jnp.sum((symmetric - jnp.diag(jnp.diag(symmetric))) ** 2) / D**2
    assert got["unbiased_trace"] == pytest.approx(float(exact), rel=1e-4)
    assert got["squared_trace"] == pytest.approx(float(exact + bias), rel=1e-4)
    assert bias > 1e-3 * exact  # ten times the tolerance


@each_schedule
@pytest.mark.parametrize(("importance", "density"), [(False, "noise"), (True, "noise"), (True, "velocity")])
def test_all_densities_of_times_give_the_same_integral(sde: LinearGammaSDE, importance: bool, density: str) -> None:
    """The mean of the weight times a function is its integral over gamma, by quadrature; quantiles are inverted."""
    times = TimeDistribution(0.05, importance, density)
    with jax.enable_x64():
        quantiles = (jnp.arange(20_000) + 0.5) / 20_000
        t = times.at_quantiles(sde, quantiles)
        np.testing.assert_allclose(times.quantiles(sde, t), quantiles, atol=1e-9)

        def function(t: Array) -> Array:
            return sde.alpha_sigma(t)[0] ** 2 * jnp.cos(3 * t)

        got = times.total(sde) * jnp.mean(times.likelihood_weight(sde, t) * function(t))
        grid = jnp.linspace(0.05, 1.0, 20_001)
        assert got == pytest.approx(float(jnp.trapezoid(sde.gamma_range * function(grid), grid)), rel=1e-4)


def levels_mixture(values: np.ndarray, dims: int) -> GaussianMixture:
    """Returns the mixture of all combinations of levels, equally probable."""
    means = np.array(list(itertools.product(values, repeat=dims)), np.float64)
    return GaussianMixture(np.full(len(means), 1 / len(means)), means, np.zeros((len(means), dims, dims)))


@each_schedule
@pytest.mark.parametrize("bare", [True, False])
def test_every_draw_of_normal_noise_gives_the_exact_probability(sde: LinearGammaSDE, bare: bool) -> None:
    """The decoder is the posterior of equally probable levels, also where the noise covers several of them."""
    levels, density = 4, levels_mixture(level_values(4, centered=True, bare=bare), 2)
    dequantizer = NormalDequantizer(sde, levels, centered=True, bare_levels=bare, t_min=0.6)
    images = jnp.arange(32).reshape(16, 1, 1, 2) % levels
    noisy = dequantizer(jax.random.split(KEY, 16), images)
    logp = density.log_density(sde, noisy.x.reshape(16, 2), jnp.full(16, dequantizer.t_min)) - noisy.log_q
    constants = 2 * math.log(dequantizer.bins_per_unit * dequantizer.unit_scale)
    np.testing.assert_allclose(logp - constants, -2 * math.log(levels), atol=1e-4)


@each_schedule
def test_the_loss_in_bits_per_dim_is_the_bound_on_the_likelihood(sde: LinearGammaSDE) -> None:
    """Reconstruction + prior + first order = the bound for x_tmin, less the entropy of x_tmin, and decoded."""
    values = level_values(4, centered=True, bare=False)
    objective = Objective(
        t_min=0.3, likelihood_weighting=True, stratified_times=True, level_values=tuple(values.tolist())
    )
    x0 = jnp.tile(jnp.asarray(values)[jnp.array([[0, 1], [3, 2]])], (2000, 1))

    def score_fn(x: Batch, t: PerExample) -> Batch:  # for data that are N(0, 0.3 I)
        alpha, sigma = sde.alpha_sigma(t)
        return -x / append_dims(0.3 * alpha**2 + sigma**2, x)

    noise = objective.draw_noise(KEY, sde, x0.shape)
    losses = jax.jit(lambda: objective.losses(score_fn, sde, x0, noise))()
    nats = {name: np.asarray(value).reshape(-1, 2) * 2 * math.log(2) for name, value in losses.items()}
    # With the Gaussian as reference, the bound has no error from its times.
    reference = GaussianReference(np.zeros(2), np.full(2, math.sqrt(0.3)))
    keys = jax.random.split(KEY, 2)
    bound = likelihood_bound(score_fn, sde, x0[:2], keys, t_min=0.3, num_times=2, reference=reference)
    sigma = float(sde.alpha_sigma(jnp.float32(0.3))[1])
    expected = bound.total - 2 * (0.5 + math.log(math.sqrt(2 * math.pi) * sigma))
    got = nats["total"] - nats["reconstruction"]
    error = got.std(axis=0, ddof=1) / math.sqrt(len(got))
    assert np.max(bound.error) < 1e-5
    assert np.all(np.abs(got.mean(axis=0) - expected) < 5 * error)
    assert np.all(error < 0.05 * np.abs(nats["first"].mean(axis=0)))


@each_schedule
def test_the_terms_without_gradient(sde: LinearGammaSDE) -> None:
    """The prior term equals the divergence of normal distributions. The probabilities of all levels add up to 1."""
    x0 = jax.random.normal(KEY, (4, D))
    sigma = float(sde.alpha_sigma(jnp.ones(()))[1])
    negative_entropy = -D * (0.5 + math.log(math.sqrt(2 * math.pi) * sigma))
    kl = prior_divergence(sde, x0, sde.prior_sigma)
    np.testing.assert_allclose(kl, negative_entropy - expected_prior_logp(sde, x0), atol=1e-5)
    assert jnp.all(prior_divergence(sde, x0, 2 * sigma) > kl)
    values = jnp.asarray(level_values(5, centered=True, bare=True))
    x = jnp.full((5, 1), 0.3)
    assert jnp.sum(jnp.exp(sde.level_logp(x, values[:, None], jnp.full(5, 0.7), values))) == pytest.approx(1, abs=1e-5)
    assert jnp.max(reconstruction(sde, values[:, None], jnp.ones((5, 1)), 0.0, values)) < 1e-6


@pytest.mark.parametrize("gamma_min", [-13.0, -30.0, -60.0])
def test_no_level_is_more_probable_than_1(gamma_min: float) -> None:
    """Also where the noise is smaller than the rounding error of the data, which is not that of the values."""
    sde = LinearGammaVPSDE(gamma_min, 5.0)
    for bare in (True, False):
        values = jnp.asarray(level_values(100, centered=True, bare=bare))
        preprocess = Preprocess(levels=100, centered=True, bin_centers=not bare)
        x0 = jax.jit(preprocess)(KEY, jnp.arange(100).reshape(4, 5, 5, 1))
        nats = reconstruction(sde, x0, jax.random.normal(KEY, x0.shape), 0.0, values)
        assert jnp.all((nats >= 0) & (nats < 1e-3))


def test_weight_decay_without_biases() -> None:
    config = get_config()
    config.optim.update(weight_decay=0.1, warmup=0, lr=0.5, decay_biases=False)
    optimizer = optimizer_from_config(config.optim, 10)
    params = {"conv": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}}
    params |= {"NIN_0": {"W": jnp.ones(2), "b": jnp.ones(2)}, "norm1_b": jnp.ones(2)}
    params |= {"GaussianFourierProjection_0": {"W": jnp.ones(2)}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    expected = {"conv": {"kernel": -0.05, "bias": 0.0}, "norm": {"scale": -0.05}}
    expected |= {"NIN_0": {"W": -0.05, "b": 0.0}, "norm1_b": 0.0, "GaussianFourierProjection_0": {"W": 0.0}}
    jax.tree.map(lambda update, value: np.testing.assert_allclose(update, value, atol=1e-7), updates, expected)


def test_data_in_the_middle_of_bins_are_levels_again() -> None:
    images = jnp.arange(17, dtype=jnp.uint8).reshape(1, 17, 1, 1)
    preprocess = Preprocess(levels=17, centered=True, bin_centers=True)
    x = preprocess(KEY, images)
    np.testing.assert_allclose(x.ravel(), level_values(17, centered=True, bare=False), atol=1e-6)
    np.testing.assert_array_equal(preprocess.to_levels(x), images)


@pytest.mark.parametrize("name", ["cifar10", "cifar10_sp", "imagenet32", "imagenet32_new", "digits"])
def test_configurations(name: str) -> None:
    """Checks what the published configurations have in common beyond the fields of golden data."""
    config = load_config(f"idode.{name}")
    objective = objective_from_config(config)
    assert isinstance(objective, Objective)
    assert len(objective.level_values) == config.data.levels
    model = score_model_from_config(config)
    assert isinstance(model.sde, StraightPathSDE if name == "cifar10_sp" else LinearGammaVPSDE)
    assert model.sde.gamma(jnp.float32(objective.t_min)) == jnp.float32(model.sde.gamma_min)
    assert (config.optim.decay_biases, config.model.ema_warmup) == (False, False)
    assert (config.optim.grad_clip == 0) == (name != "digits")
    assert dequantizer_from_config(config, model.sde).t_min == objective.t_min


def config_with(**fields: Any) -> Config:
    config = load_config("idode.digits")
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model__parameterization": "flow"}, "model.parameterization is 'flow'; known: noise, velocity"),
        ({"training__sde": "vpsde"}, "model.parameterization is 'velocity', which VPSDE.* does not define"),
        (
            {"training__sde": "vesde", "model__scale_by_sigma": True},
            "model.scale_by_sigma is True.*model.parameterization=velocity need False",
        ),
        ({"training__importance_density": "data"}, "training.importance_density is 'data'; known: noise, velocity"),
        ({"training__sde": "vpsde", "model__parameterization": "noise"}, "which training.sde=vpsde does not define"),
        ({"training__score_matching_order": 3}, "'unbiased_trace', which has no third order"),
        ({"training__likelihood_weighting": False, "training__importance_weighting": False}, "training.bits_per_dim"),
        ({"data__uniform_dequantization": True}, "data.uniform_dequantization"),
        ({"training__noise_level": 1.0}, "training.noise_level is 1.0, but training.bits_per_dim=True"),
        ({"model__gamma_min": 6.0}, "need gamma_min < gamma_max"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(config_with(**fields))


def test_noise_that_does_not_fit_is_refused() -> None:
    config = config_with(eval__dequantization="normal", data__bin_centers=False, data__uniform_dequantization=True)
    with pytest.raises(ValueError, match="'normal', which needs a model of levels without noise"):
        dequantizer_from_config(config, StraightPathSDE())
