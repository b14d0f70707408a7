"""The unbiased estimators of orders 2 and 3, against the exact losses and closed forms of their variance."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from arrays import Batch, PerExample, ScoreFn, append_dims
from losses import Noise, Objective, draw_noise, score_matching_losses
from sde_lib import SDE, VESDE, VPSDE
from tests.analytic import asymmetric_mixture

VP = VPSDE()
UNBIASED = Objective(order=3, t_min=0.05, estimator="unbiased")
HIGH = ("second_frob", "second_trace", "third")


def wrong_score(sde: SDE, d: int, error: Array) -> ScoreFn:
    """Returns a mixture's score, with an error in its value, Jacobian and third derivative."""
    density = asymmetric_mixture(d)

    def score_fn(x: Batch, t: PerExample) -> Batch:
        wrong = 0.3 + 0.2 * x + 0.1 * jnp.roll(x, 1, axis=1) ** 2 * x
        return density.score(sde, x, t) + error * wrong / append_dims(sde.alpha_sigma(t)[1], x)

    return score_fn


@pytest.mark.parametrize("d", [1, 2, 5])
def test_estimates_average_over_probes_to_the_exact_losses(d: int) -> None:
    """The mean over all 4^d pairs of Rademacher probes is the exact loss of each example, up to rounding."""
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=d)), np.float32)
    first, second = (v.reshape(-1, d) for v in np.broadcast_arrays(signs[:, None], signs[None]))
    pairs, n = len(first), 3
    x0 = asymmetric_mixture(d).sample(jax.random.key(0), (n, d))
    noise = draw_noise(jax.random.key(1), VP, UNBIASED, x0.shape)
    score_fn = wrong_score(VP, d, jnp.ones(()))

    def each_pair(a: Array) -> Array:
        return jnp.repeat(a, pairs, axis=0)

    every = Noise(each_pair(noise.t), each_pair(noise.z), jnp.tile(first, (n, 1)), jnp.tile(second, (n, 1)))
    values = jax.jit(lambda: score_matching_losses(score_fn, VP, UNBIASED, each_pair(x0), every))()
    for name, expected in jax.jit(lambda: exact_terms(score_fn, x0, noise))().items():
        np.testing.assert_allclose(jnp.mean(values[name].reshape(n, pairs), axis=1), expected, rtol=1e-3, atol=1e-6)
        assert jnp.min(expected) > 1e-6


def exact_terms(score_fn: ScoreFn, x0: Batch, noise: Noise) -> dict[str, PerExample]:
    """Returns the exact losses in the scale of the published terms, with the trace by reverse mode."""
    exact = score_matching_losses(score_fn, VP, dataclasses.replace(UNBIASED, exact=True), x0, noise)
    d = x0.shape[1]
    mean, sigma = VP.marginal(x0, noise.t)
    xt, sigma = mean + sigma[:, None] * noise.z, sigma[:, None]
    u = noise.z + sigma * score_fn(xt, noise.t)
    jacobian = jax.vmap(jax.jacrev(lambda x, t: score_fn(x[None], t[None])[0]))(xt, noise.t)
    trace = sigma[:, 0] ** 2 * jnp.trace(jacobian, axis1=1, axis2=2) + d
    return {
        "second_frob": exact["second_frob"],
        "second_trace": ((trace - jnp.sum(u**2, axis=1)) / d) ** 2,
        "third": exact["third"] / d**2,
    }


def test_the_true_score_is_stationary() -> None:
    """The expected gradient of each term is 0 at the true score, and not elsewhere (5 standard errors)."""
    d = 3
    density = asymmetric_mixture(d)

    def terms(error: Array, key: Array) -> Array:
        data_key, noise_key = jax.random.split(key)
        x0 = density.sample(data_key, (2000, d))
        noise = draw_noise(noise_key, VP, UNBIASED, x0.shape)
        losses = score_matching_losses(wrong_score(VP, d, error), VP, UNBIASED, x0, noise)
        return jnp.stack([jnp.mean(losses[name]) for name in HIGH])

    @jax.jit
    def z_scores(error: Array) -> Array:
        def slope(key: Array) -> Array:
            return jax.jvp(lambda e: terms(e, key), (error,), (jnp.ones(()),))[1]

        values = jax.lax.map(slope, jax.random.split(jax.random.key(3), 20))
        return jnp.mean(values, 0) / (jnp.std(values, 0, ddof=1) / np.sqrt(20))

    assert jnp.max(jnp.abs(z_scores(jnp.zeros(())))) < 5
    assert jnp.min(jnp.abs(z_scores(jnp.full((), -2.0)))) > 5, "the draws are too few to see an error of this size"


@pytest.mark.parametrize("d", [4, 16, 64])
def test_variance_falls_by_the_number_of_dimensions(d: int) -> None:
    """The variance of each term's gradient at the score of a Gaussian, published and unbiased, in closed form.

    For x_0 ~ N(0, c^2 I) under VE, u ~ N(0, r I) independently of x_t with r = c^2 / (c^2 + sigma^2), M = r I, and the
    trace has gradient 0. Adding a (x / sigma^2) to the score adds a I to M, and adding b_i x_i^2 / (2 sigma^3) adds b
    to the gradient of the trace for every Rademacher probe. Along these, the gradients have the variances

        second_frob:   8 r^2 / d^2      and   8 r^2 / d^3
        second_trace:  8 r^2            and   8 r^2 / d
        third:         8 r^3 (d + 2) |b|^2 / d^5   and   8 r^3 (d + 2) |b|^2 / d^6,

    so in each the unbiased estimator has 1 / d of the published variance.
    """
    sde, t, n = VESDE(sigma_min=0.5, sigma_max=2.0), 0.5, 20_000
    sigma, variance = 1.0, 0.64  # sigma at t = 0.5, and c^2
    r = variance / (variance + sigma**2)
    b = jnp.linspace(0.5, 1.5, d)

    def score_fn(parameters: tuple[Array, Array], x: Batch) -> Batch:
        slope, curvature = parameters
        return -x / (variance + sigma**2) + slope * x / sigma**2 + curvature * b[None] * x**2 / (2 * sigma**3)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(estimator: str, key: Array) -> dict[str, PerExample]:
        objective = Objective(order=3, estimator=estimator)
        data_key, noise_key = jax.random.split(key)
        x0 = np.sqrt(variance) * jax.random.normal(data_key, (n, d))
        noise = draw_noise(noise_key, sde, objective, x0.shape)._replace(t=jnp.full(n, t))

        def terms(slope: Array, curvature: Array) -> dict[str, PerExample]:
            return score_matching_losses(lambda x, _: score_fn((slope, curvature), x), sde, objective, x0, noise)

        zero = jnp.zeros(())
        second = jax.jvp(lambda a: terms(a, zero), (zero,), (jnp.ones(()),))[1]
        third = jax.jvp(lambda a: terms(zero, a), (zero,), (jnp.ones(()),))[1]
        return second | {"third": third["third"]}

    published = {
        "second_frob": 8 * r**2 / d**2,
        "second_trace": 8 * r**2,
        "third": 8 * r**3 * (d + 2) * float(jnp.sum(b**2)) / d**5,
    }
    for estimator, factor in (("published", 1), ("unbiased", d)):
        values = gradients(estimator, jax.random.key(0))
        for name in HIGH:
            squares = np.asarray(values[name], np.float64) ** 2
            error = np.std(squares, ddof=1) / np.sqrt(n)
            assert abs(np.mean(squares) - published[name] / factor) < 5 * error, (estimator, name)


def test_the_published_estimator_is_the_default_and_draws_the_same_noise() -> None:
    default = draw_noise(jax.random.key(0), VP, Objective(order=3), (4, 3))
    both = draw_noise(jax.random.key(0), VP, UNBIASED, (4, 3))
    assert Objective().estimator == "published"
    assert default.second_probe is None
    np.testing.assert_array_equal(default.probe, both.probe)
    assert both.second_probe is not None
    assert not np.array_equal(both.probe, both.second_probe)


def test_bars_carry_no_gradient() -> None:
    """The second order does not move the score's value, nor the third its Jacobian."""
    x0 = asymmetric_mixture(3).sample(jax.random.key(0), (4, 3))
    noise = draw_noise(jax.random.key(1), VP, UNBIASED, x0.shape)

    def term(name: str) -> list[float]:
        def of_parameters(p: tuple[float, float, float]) -> Array:
            def score_fn(x: Batch, t: PerExample) -> Batch:
                return p[0] + p[1] * x + p[2] * jnp.roll(x, 1, axis=1) ** 2 * x

            return jnp.mean(score_matching_losses(score_fn, VP, UNBIASED, x0, noise)[name])

        return [float(g) for g in jax.grad(of_parameters)((0.1, 0.1, 0.1))]

    for name in ("second_frob", "second_trace"):
        value, slope, _ = term(name)
        assert value == 0
        assert abs(slope) > 1e-3
    value, slope, curvature = term("third")
    assert value == slope == 0
    assert abs(curvature) > 1e-3


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="high_order_estimator is 'best'; known: published, unbiased"):
        Objective(estimator="best")
