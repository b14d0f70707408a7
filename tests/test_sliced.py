"""Implicit and sliced score matching against denoising score matching, in expectation."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrays import append_dims, mean_square
from build import build
from configs.digits.smoke import get_config as digits
from configs.toy.smoke import get_config as toy
from losses import Objective, objective_from_config
from models.ladder import Ladder
from objectives.sliced import implicit_score_matching, sliced_score_matching
from sde_lib import VESDE, VPSDE
from tests.analytic import asymmetric_mixture

D = 3
DENSITY = asymmetric_mixture(D)
SDE = VPSDE()
PARAMS = jnp.array([0.3, 0.2, 0.1])
EXAMPLES = 40_000


def wrong_score(params, x, t):
    """Returns the mixture's score, with errors in value, Jacobian and higher derivatives that `params` scales."""
    a, b, c = params
    sigma = append_dims(SDE.alpha_sigma(t)[1], x)
    return DENSITY.score(SDE, x, t) + (a + b * x + c * jnp.roll(x, 1, axis=1) ** 2 * x) / sigma


def denoising(score_fn, x0, t, z):
    sigma = append_dims(SDE.alpha_sigma(t)[1], x0)
    return mean_square(sigma * score_fn(noisy(x0, t, z), t) + z)


def noisy(x0, t, z):
    mean, sigma = SDE.marginal(x0, t)
    return mean + append_dims(sigma, x0) * z


FORMS = {
    "implicit": lambda s, x, t, v: implicit_score_matching(s, SDE, x, t),
    "sliced": lambda s, x, t, v: sliced_score_matching(s, SDE, x, t, v, variance_reduced=False),
    "sliced_vr": lambda s, x, t, v: sliced_score_matching(s, SDE, x, t, v, variance_reduced=True),
}


@pytest.fixture(scope="module")
def differences():
    """Returns each form's values and parameter gradients minus denoising score matching's, for each example.

    Both use the same examples, so that much of the noise cancels.
    """
    t_key, z_key, v_key = jax.random.split(jax.random.key(1), 3)
    x0 = DENSITY.sample(jax.random.key(0), (EXAMPLES, D))
    t = jax.random.uniform(t_key, (EXAMPLES,), minval=0.02, maxval=1.0)
    z = jax.random.normal(z_key, x0.shape)
    v = jax.random.rademacher(v_key, (EXAMPLES, 2, D), dtype=jnp.float32)

    @jax.jit
    def compute():
        def all_forms(params):
            score_fn = functools.partial(wrong_score, params)
            base = denoising(score_fn, x0, t, z)
            values = [form(score_fn, noisy(x0, t, z), t, v) for form in FORMS.values()]
            return jnp.stack([value - base for value in values])

        return all_forms(PARAMS), jax.jacfwd(all_forms)(PARAMS)

    values, gradients = compute()
    return {name: jnp.column_stack([values[i], gradients[i]]) for i, name in enumerate(FORMS)}


@pytest.mark.parametrize("name", FORMS)
def test_values_and_gradients_agree_with_denoising_score_matching(differences, name):
    """E|sigma s + z|^2 = E[|sigma s|^2 + 2 sigma^2 tr J] + d, for every score function and so for its parameters."""
    difference = np.asarray(differences[name], np.float64)
    error = difference.std(axis=0) / EXAMPLES**0.5
    assert np.all(np.abs(difference.mean(axis=0)) < 5 * error)
    assert np.all(error < 0.1), "the bound is too wide to see the terms, which have the order of 1"


def test_the_ladder_of_ncsn_converges_to_the_continuous_objective():
    """The mean over L geometric noise levels is a rectangle rule with both ends: its error is proportional to 1 / L."""
    sde = VESDE(0.05, 50.0)
    x0, z = DENSITY.sample(jax.random.key(0), (200, D)), jax.random.normal(jax.random.key(1), (200, D))

    def scaled_error(sigma):
        """Returns sigma^2 |s + z / sigma|^2 / d, NCSN's loss at one noise level, for a score that is always wrong."""
        x = x0 + sigma * z
        t = jnp.full(len(x), sde.time_of_log_noise_level(jnp.log(sigma)))
        return jnp.mean((sigma * 0.9 * DENSITY.score(sde, x, t) + z) ** 2)

    def continuous(t):
        objective = Objective(t_min=1e-5)
        noise = objective.draw_noise(jax.random.key(2), sde, x0.shape)._replace(t=jnp.full(len(x0), t), z=z)
        return jnp.mean(objective.losses(lambda x, t: 0.9 * DENSITY.score(sde, x, t), sde, x0, noise)["total"])

    @jax.jit
    def means():
        ladders = [Ladder(0.05, 50.0, n).sigma(jnp.arange(float(n))) for n in (10, 20, 40, 80)]
        levels = [jax.lax.map(scaled_error, sigmas) for sigmas in ladders]
        middles = (jnp.arange(400.0) + 0.5) / 400
        return jnp.stack([jnp.mean(values) for values in levels]), jnp.mean(jax.lax.map(continuous, middles))

    ladders, integral = (np.asarray(value, np.float64) for value in means())
    errors = ladders - integral
    np.testing.assert_allclose(errors[:-1] / errors[1:], 2, rtol=0.05)  # the next term is of the order of 1 / L^2
    assert abs(errors[-1]) > 1e-4, "the error must exceed that of float32, so that the ratios mean something"
    assert abs(2 * ladders[-1] - ladders[-2] - integral) < 1e-2 * abs(errors[0])


# From a configuration


def config_with(default=toy, **training):
    config = default()
    config.training.update(training)
    return config


@pytest.mark.parametrize("name", FORMS)
def test_the_objective_of_a_configuration_has_the_values_of_its_form(name):
    """The whole objective at one noise level, with two projections, the likelihood's weight and half the sum."""
    settings = {"num_projections": 2, "noise_level": 0.7, "likelihood_weighting": True, "reduce_mean": False}
    objective = objective_from_config(config_with(objective=name, **settings))
    x0 = DENSITY.sample(jax.random.key(0), (8, D))
    noise = objective.draw_noise(jax.random.key(1), SDE, x0.shape)
    alpha, sigma = SDE.alpha_sigma(noise.t)
    np.testing.assert_allclose(sigma / alpha, 0.7, rtol=1e-5)
    assert (noise.projections is None) == (name == "implicit")
    score_fn = functools.partial(wrong_score, PARAMS)
    total = objective.losses(score_fn, SDE, x0, noise)["total"]
    form = FORMS[name](score_fn, noisy(x0, noise.t, noise.z), noise.t, noise.projections)
    np.testing.assert_allclose(total, form * (SDE.diffusion(noise.t) / sigma) ** 2 * D / 2, rtol=1e-5)


def test_denoising_at_one_noise_level():
    objective = objective_from_config(config_with(noise_level=0.7))
    t = objective.draw_noise(jax.random.key(1), SDE, (8, D)).t
    np.testing.assert_allclose(SDE.log_noise_level(t), np.log(0.7), rtol=1e-5)


def test_sliced_score_matching_at_the_levels_of_ncsn():
    """With training.continuous=False, times are drawn from the ladder, each equally often."""
    config = config_with(objective="sliced_vr", continuous=False)
    config.model.num_scales = 10
    objective = objective_from_config(config)
    t = objective.draw_noise(jax.random.key(0), VESDE(0.01, 50.0), (10_000, 1)).t
    sigmas, counts = np.unique(VESDE(0.01, 50.0).alpha_sigma(t)[1], return_counts=True)
    np.testing.assert_allclose(sigmas[::-1], Ladder(0.01, 50.0, 10).sigma(jnp.arange(10.0)), rtol=1e-4)
    assert np.all(np.abs(counts - 1000) < 5 * 30)
    with pytest.raises(ValueError, match=re.escape("needs training.sde=vesde")):
        objective_from_config(config_with(objective="sliced", continuous=False, noise_level=1.0))


REFUSED = [
    (toy, {"objective": "slice"}, "training.objective is 'slice'; known: denoising, implicit, sliced, sliced_vr, meng"),
    (toy, {"noise_level": 60.0}, "training.noise_level is 60.0; it must be 0 (all levels) or lie between 0.01 and 50"),
    (toy, {"noise_level": 1.0, "first_order_weighting": "residual"}, "weights that follow the residual need all times"),
    (toy, {"objective": "sliced", "score_matching_order": 2}, "it is for training.objective=denoising, not sliced"),
    (digits, {"objective": "implicit"}, "training.objective is 'implicit', which needs the whole Jacobian, but images"),
]


@pytest.mark.parametrize("level", [0.01, 50.0])
def test_the_ends_of_the_noise_levels_are_allowed(level):
    build(config_with(toy, noise_level=level))


@pytest.mark.parametrize(("default", "settings", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refused_settings(default, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(config_with(default, **settings))
