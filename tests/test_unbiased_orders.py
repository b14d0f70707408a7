"""Ours: unbiased estimators of orders 2 and 3, weights by noise level, orders on a part of the batch, even times."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from arrays import Batch, PerExample, ScoreFn, append_dims
from losses import Noise, Objective, Residual, term_weights
from objectives.published import second_order_frob, second_order_trace, third_order
from objectives.unbiased import unbiased_second_order_trace, unbiased_third_order
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
    noise = UNBIASED.draw_noise(jax.random.key(1), VP, x0.shape)
    score_fn = wrong_score(VP, d, jnp.ones(()))

    def each_pair(a: Array) -> Array:
        return jnp.repeat(a, pairs, axis=0)

    every = Noise(each_pair(noise.t), each_pair(noise.z), jnp.tile(first, (n, 1)), jnp.tile(second, (n, 1)))
    values = jax.jit(lambda: UNBIASED.losses(score_fn, VP, each_pair(x0), every))()
    for name, expected in jax.jit(lambda: exact_terms(score_fn, x0, noise))().items():
        np.testing.assert_allclose(jnp.mean(values[name].reshape(n, pairs), axis=1), expected, rtol=1e-3, atol=1e-6)
        assert jnp.min(expected) > 1e-6


def exact_terms(score_fn: ScoreFn, x0: Batch, noise: Noise) -> dict[str, PerExample]:
    """Returns the exact losses in the scale of the published terms, with the trace by reverse mode."""
    exact = dataclasses.replace(UNBIASED, exact=True).losses(score_fn, VP, x0, noise)
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
        noise = UNBIASED.draw_noise(noise_key, VP, x0.shape)
        losses = UNBIASED.losses(wrong_score(VP, d, error), VP, x0, noise)
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
        noise = objective.draw_noise(noise_key, sde, x0.shape)._replace(t=jnp.full(n, t))

        def terms(slope: Array, curvature: Array) -> dict[str, PerExample]:
            return objective.losses(lambda x, _: score_fn((slope, curvature), x), sde, x0, noise)

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
    default = Objective(order=3).draw_noise(jax.random.key(0), VP, (4, 3))
    both = UNBIASED.draw_noise(jax.random.key(0), VP, (4, 3))
    assert Objective().estimator == "published"
    assert default.second_probe is None
    np.testing.assert_array_equal(default.probe, both.probe)
    assert both.second_probe is not None
    assert not np.array_equal(both.probe, both.second_probe)


def test_bars_carry_no_gradient() -> None:
    """The second order does not move the score's value, nor the third its Jacobian."""
    x0 = asymmetric_mixture(3).sample(jax.random.key(0), (4, 3))
    noise = UNBIASED.draw_noise(jax.random.key(1), VP, x0.shape)

    def term(name: str) -> list[float]:
        def of_parameters(p: tuple[float, float, float]) -> Array:
            def score_fn(x: Batch, t: PerExample) -> Batch:
                return p[0] + p[1] * x + p[2] * jnp.roll(x, 1, axis=1) ** 2 * x

            return jnp.mean(UNBIASED.losses(score_fn, VP, x0, noise)[name])

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


def fractions_of_the_batch(objective: Objective, density: Array | None, keys: Array, n: int) -> dict[str, Array]:
    """Returns batch means of each term, for a wrong score in 2-D, as [keys]."""
    x0 = asymmetric_mixture(2).sample(jax.random.key(0), (n, 2))
    score_fn = wrong_score(VP, 2, jnp.ones(()))

    def one(key: Array) -> dict[str, Array]:
        noise = objective.draw_noise(key, VP, x0.shape, density)
        losses = objective.losses(score_fn, VP, x0, noise)
        return {name: jnp.mean(value) for name, value in losses.items()}

    return jax.jit(lambda: jax.lax.map(one, keys))()


def test_a_part_of_the_batch_has_the_same_expectation() -> None:
    """Orders 2 and 3 on a quarter of the batch, at the objective's times and at times of its own (5 errors)."""
    keys = jax.random.split(jax.random.key(5), 200)
    quarter = dataclasses.replace(UNBIASED, high_order_fraction=0.25)
    density = jnp.linspace(0.5, 1.5, 8)
    whole = fractions_of_the_batch(UNBIASED, None, keys, 256)
    for own in (None, density):
        part = fractions_of_the_batch(quarter, own, keys, 256)
        for name in ("total", "first", *HIGH):
            values = np.stack([whole[name], part[name]]).astype(np.float64)
            error = np.sqrt(np.sum(np.var(values, axis=1, ddof=1)) / len(keys))
            assert abs(values[1].mean() - values[0].mean()) < 5 * error, (name, own)
            assert error < 0.35 * values[0].mean(), "the draws are too few to see a missing factor of 4"


def test_a_part_of_the_batch_costs_a_part() -> None:
    """Compiled operations at 1/4 are those of order 1 plus a quarter of what order 3 adds, within 5 %."""
    d, width = 8, 64
    keys = jax.random.split(jax.random.key(0), 3)
    scale = 1 / np.sqrt(width)
    first, second = scale * jax.random.normal(keys[0], (d, width)), scale * jax.random.normal(keys[1], (width, d))

    def cost(objective: Objective) -> float:
        x0 = jnp.ones((64, d))
        noise = objective.draw_noise(keys[2], VP, x0.shape)

        def loss(weights: tuple[Array, Array]) -> Array:
            def score_fn(x: Batch, t: PerExample) -> Batch:
                del t
                return jnp.tanh(jnp.tanh(x @ weights[0]) @ weights[0].T @ weights[0]) @ weights[1]

            return jnp.mean(objective.losses(score_fn, VP, x0, noise)["total"])

        analysis: Any = jax.jit(jax.grad(loss)).lower((first, second)).compile().cost_analysis()
        return float(analysis["flops"])

    for estimator in ("published", "unbiased"):
        order1, order3, quarter = (
            cost(Objective(order, estimator=estimator, high_order_fraction=fraction))
            for order, fraction in ((1, 1.0), (3, 1.0), (3, 0.25))
        )
        assert order3 > 2 * order1
        np.testing.assert_allclose(quarter, order1 + 0.25 * (order3 - order1), rtol=0.05)


def test_stratified_times_are_even_and_have_the_density() -> None:
    for objective in (
        Objective(t_min=1e-3, stratified_times=True),
        Objective(t_min=1e-3, stratified_times=True, likelihood_weighting=True, importance_weighting=True),
    ):
        times = objective.times.draw(jax.random.key(0), VP, 100)
        quantiles = np.sort(objective.quantiles(VP, times))
        np.testing.assert_allclose(np.diff(quantiles), 0.01, atol=2e-4)
    own = dataclasses.replace(UNBIASED, high_order_fraction=0.5, stratified_times=True)
    noise = own.draw_noise(jax.random.key(1), VP, (400, 1), jnp.array([0.5, 1.5]))
    quantiles = own.quantiles(VP, noise.t)
    assert abs(np.mean(quantiles[::2] < 0.5) - 0.25) <= 1 / 200
    assert abs(np.mean(quantiles[1::2] < 0.5) - 0.5) <= 1 / 200
    assert noise.time_weight is not None
    np.testing.assert_allclose(noise.time_weight[::2], np.where(quantiles[::2] < 0.5, 2, 1 / 1.5), rtol=1e-5)
    np.testing.assert_array_equal(noise.time_weight[1::2], 1)


@pytest.mark.parametrize("estimator", ["published", "unbiased"])
def test_weights_are_the_inverse_variances_relative_to_the_first_order(estimator: str) -> None:
    """The mean square of each term's error is the inverse of its weight, at a Gaussian's score, times one constant.

    Generalised least squares adds half the square of each error over its variance: d / 2 for the first order's d
    errors. Weights relative to the first order make each weighted term d / 2 per number of its errors, too; the trace
    has one error, the third order d, and the published form of the Jacobian d. Without a probe, the Jacobian's d^2
    entries are not independent, so it is left out.
    """
    d, n, r = 4, 100_000, 0.4
    u = np.sqrt(r) * jax.random.normal(jax.random.key(0), (n, d))
    objective = Objective(order=3, estimator=estimator, high_order_weighting="residual")
    residual = Residual(jnp.full(1, r), jnp.asarray(r))
    weights = term_weights(VP, objective, jnp.full(1, 0.5), residual, d)
    probes = [jax.random.rademacher(key, (n, d), jnp.float32) for key in jax.random.split(jax.random.key(1))]
    if estimator == "published":
        trace = second_order_trace((r - 1) * probes[0], u, probes[0])
        third = third_order(jnp.zeros((n, d)), (r - 1) * probes[0], u, probes[0])
        cases = [(second_order_frob((r - 1) * probes[0], u, probes[0]), weights["second_frob"], d)]
    else:
        spread = [r * probe for probe in probes]
        trace = unbiased_second_order_trace(spread, u, (probes[0], probes[1]))
        third = unbiased_third_order([jnp.zeros((n, d))] * 2, spread, r * u, u, (probes[0], probes[1]))
        cases = []
    first = jnp.mean(u**2)  # d errors
    for term, weight, errors in (*cases, (trace, weights["second_trace"], 1), (third, weights["third"], d)):
        expected = first * errors / d
        error = np.std(term, ddof=1) / np.sqrt(n)
        assert abs(weight[0] * np.mean(term) - expected) < 5 * weight[0] * error + 0.01 * expected
    with_first = dataclasses.replace(objective, first_order_weighting="residual")
    twice = residual._replace(harmonic_mean=jnp.asarray(2 * r))
    both = term_weights(VP, with_first, jnp.full(1, 0.5), twice, d)
    assert both["first"][0] == pytest.approx(2)
    assert both["third"][0] == pytest.approx(2 * weights["third"][0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"first_order_weighting": "r"}, "first_order_weighting is 'r'; known: constant, residual"),
        ({"high_order_fraction": 0.4}, "high_order_fraction is 0.4; it must be 1, 1/2, 1/3"),
        ({"high_order_fraction": 0.0}, "high_order_fraction is 0.0"),
    ],
)
def test_impossible_options_are_refused(fields: dict[str, str | float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**fields)  # type: ignore[arg-type]
