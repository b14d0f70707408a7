"""The objectives that [L22] compares with: identities on an asymmetric mixture in two dimensions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from arrays import append_dims
from objectives.baselines import MengObjective, OdeLikelihoodObjective, StartTime
from objectives.times import TimeDistribution
from sde_lib import VPSDE
from sources.marginals import sample_at
from tests.analytic import asymmetric_mixture

D = 2
DENSITY, SDE = asymmetric_mixture(D), VPSDE()
T_MIN = 1e-3
EXAMPLES = 2000


def scaled_score(params, x, t):
    """Returns the mixture's score for parameters of 0."""
    a, b, c = params
    sigma = append_dims(SDE.alpha_sigma(t)[1], x)
    return DENSITY.score(SDE, x, t) + (a + b * x + c * jnp.roll(x, 1, axis=1) ** 2 * x) / (1 + sigma)


def per_example_gradient(objective, noise, x0, params):
    """Returns d losses / d params: [batch, 3]."""
    return jax.jit(jax.jacfwd(lambda p: objective.losses(functools.partial(scaled_score, p), SDE, x0, noise)["total"]))(
        params
    )


def assert_zero_mean(values):
    values = np.asarray(values, np.float64)
    error = values.std(axis=0) / len(values) ** 0.5
    assert np.all(np.abs(values.mean(axis=0)) < 5 * error)
    assert np.all(values.std(axis=0) > 0.01), "the gradient of every example is zero: the test would see no error"


def test_the_second_order_of_meng_is_stationary_at_the_exact_score():
    """E[z z^T] given x_t is sigma^2 (J + s s^T) + I, so the Jacobian of the exact score minimises the expectation."""
    keys = jax.random.split(jax.random.key(0), 3)
    x0 = DENSITY.sample(keys[0], (EXAMPLES, D))
    objective = MengObjective(TimeDistribution(0.05), second_weight=1.0)
    noise = objective.draw_noise(keys[1], SDE, x0.shape)
    assert_zero_mean(per_example_gradient(objective, noise, x0, jnp.zeros(3)))


def test_the_likelihood_is_that_of_the_density_and_stationary_at_the_exact_score():
    """E[d ln p / d parameters] = 0 for samples of p. The gradient equals finite differences of the same solve."""
    x = sample_at(DENSITY, SDE, jax.random.key(1), jnp.full(EXAMPLES, T_MIN))
    objective = OdeLikelihoodObjective(T_MIN, num_steps=16)

    @jax.jit
    def gradients(params):
        """The loss of each example and its gradient, in reverse mode, as training computes it."""

        def loss(params, x):
            noise = StartTime(jnp.full(1, T_MIN))
            return objective.losses(functools.partial(scaled_score, params), SDE, x[None], noise)["total"][0]

        return jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0))(params, x)

    zero = jnp.zeros(3)
    values, gradient = gradients(zero)
    assert_zero_mean(gradient)
    # 16 steps of order 4 over 11 units of ln rho; their error falls to a sixteenth with twice as many
    np.testing.assert_allclose(values, -DENSITY.log_density(SDE, x, jnp.full(EXAMPLES, T_MIN)) / D, atol=0.01)
    # The third parameter multiplies x^3, so its finite differences need a small step.
    step = 0.002 * jnp.eye(3)
    sides = [[gradients(sign * e)[0] for sign in (1, -1)] for e in step]
    differences = jnp.stack([(up - down) / 0.004 for up, down in sides], axis=1)
    np.testing.assert_allclose(differences[:64], gradient[:64], atol=0.02 * float(jnp.abs(gradient).max()))
