import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrays import append_dims
from derivatives import exact_trace_gradient
from losses import Objective, Residual
from objectives.exact import exact_second_order_trace
from sde_lib import SDES, VESDE, VPSDE, SubVPSDE
from sources.densities import paper_mixture
from tests.analytic import DISTINCT_SDES, asymmetric_mixture

D = 3
DENSITY = asymmetric_mixture(D)
VP = VPSDE()

# One compilation each: operation by operation, they would take a hundred.
compiled_losses = jax.jit(Objective.losses, static_argnums=(0, 1, 2))
compiled_noise = jax.jit(Objective.draw_noise, static_argnums=(0, 2, 3))


def mixture_score(sde):
    return DENSITY.score_fn(sde)


def wrong_score(sde, params):
    """The mixture's score, with errors in value, Jacobian and third derivative that `params` scales."""
    a, b, c = params

    def score_fn(x, t):
        sigma = append_dims(sde.alpha_sigma(t)[1], x)
        return DENSITY.score(sde, x, t) + (a + b * x + c * jnp.roll(x, 1, axis=1) ** 2 * x) / sigma

    return score_fn


def all_sign_vectors(d):
    return jnp.array(list(itertools.product((-1.0, 1.0), repeat=d)))


def test_terms_average_over_probes_to_what_the_paper_derives():
    """Rademacher probes in 3-D have 8 values: expectations are exact sums over them ([L22] App. G).

    With A = sigma^2 J + I - u u^T, the first second-order term is |A v|^2, whose mean is |A|_F^2, and the other
    (v.A v)^2, whose mean is (tr A)^2 + 2 (|A|_F^2 - sum_i A_ii^2) for symmetric A. The third-order vector is linear in
    products v_i v_j; its mean is the exact vector, and the mean of its square exceeds the square of that by the
    variance, here of the vector's own components over the 8 probes.
    """
    sde, d = VP, D
    x0 = DENSITY.sample(jax.random.key(0), (5, d))
    noise = compiled_noise(Objective(order=3, t_min=1e-2), jax.random.key(1), sde, x0.shape)
    score_fn = wrong_score(sde, (0.3, 0.2, 0.1))
    probes = all_sign_vectors(d)

    @jax.jit
    def values():
        mean, sigma = sde.marginal(x0, noise.t)
        sigma = sigma[:, None]
        exact = exact_trace_gradient(lambda x: score_fn(x, noise.t), mean + sigma * noise.z)
        objective = Objective(order=3, t_min=1e-2)
        draws = jax.vmap(lambda v: noise._replace(probe=jnp.broadcast_to(v, x0.shape)))(probes)
        terms = jax.vmap(lambda draw: objective.losses(score_fn, sde, x0, draw))(draws)
        return sigma, exact, terms, third_order_vector(score_fn, sde, x0, noise, probes)

    sigma, (value, jacobian, trace_gradient), terms, quadratic = values()
    u = noise.z + sigma * value
    scaled = sigma[..., None] ** 2 * jacobian
    a = scaled + np.eye(d)[None] - u[:, :, None] * u[:, None, :]
    frob = jnp.sum(a**2, axis=(1, 2)) / d**2
    np.testing.assert_allclose(jnp.mean(terms["second_frob"], 0), frob, rtol=1e-4)
    symmetric = 0.5 * (a + a.transpose(0, 2, 1))
    trace = jnp.trace(a, axis1=1, axis2=2)
    off_diagonal = jnp.sum(symmetric**2, axis=(1, 2)) - jnp.sum(jnp.diagonal(a, axis1=1, axis2=2) ** 2, axis=1)
    np.testing.assert_allclose(jnp.mean(terms["second_trace"], 0), (trace**2 + 2 * off_diagonal) / d**2, rtol=1e-4)

    exact = sigma**3 * trace_gradient + (jnp.sum(u**2, 1) - jnp.trace(scaled, axis1=1, axis2=2) - d)[:, None] * u
    exact -= 2 * jnp.einsum("bij,bj->bi", scaled + jnp.eye(d)[None], u)
    np.testing.assert_allclose(jnp.mean(quadratic, 0), exact, rtol=1e-3, atol=1e-4)
    expected = (jnp.sum(exact**2, 1) + jnp.sum(jnp.var(quadratic, axis=0), 1)) / d**3
    np.testing.assert_allclose(jnp.mean(terms["third"], 0), expected, rtol=1e-4)
    assert jnp.max(jnp.abs(sigma**3 * trace_gradient)) > 0.1, "no third derivative: the test would see no error in it"


def third_order_vector(score_fn, sde, x0, noise, probes):
    """The vector inside the third-order term for each probe, by nested reverse mode: independent of the code tested."""
    mean, sigma = sde.marginal(x0, noise.t)
    xt, sigma = mean + sigma[:, None] * noise.z, sigma[:, None]

    def one(x, t):
        return score_fn(x[None], t[None])[0]

    jacobian = jax.vmap(jax.jacrev(one))
    u = noise.z + sigma * score_fn(xt, noise.t)

    def vector(v):
        gradient = jax.vmap(jax.grad(lambda x, t: v @ jax.jacrev(one)(x, t) @ v))(xt, noise.t)
        jacobian_probe = jnp.einsum("bij,j->bi", jacobian(xt, noise.t), v)
        along = (u @ v)[:, None]
        spread = sigma**2 * (jacobian_probe @ v)[:, None] + D
        return sigma**3 * gradient + along**2 * u - spread * u - 2 * along * (sigma**2 * jacobian_probe + v[None])

    return jax.vmap(vector)(probes)


def test_exact_terms_are_those_of_the_whole_jacobian():
    """Losses of the exact form equal those written out for the whole Jacobian, and their sum has their weights."""
    x0 = DENSITY.sample(jax.random.key(0), (4, D))
    noise = compiled_noise(Objective(t_min=1e-2), jax.random.key(1), VP, x0.shape)
    score_fn = wrong_score(VP, (0.3, 0.2, 0.1))
    weights = {"second_weight": 0.5, "third_weight": 0.1, "exact": True, "t_min": 1e-2}
    terms = compiled_losses(Objective(order=3, **weights), score_fn, VP, x0, noise)
    expected = compiled_losses(Objective(t_min=1e-2), score_fn, VP, x0, noise)
    np.testing.assert_allclose(terms["first"], expected["first"], rtol=1e-5)

    def one(x, t):
        return score_fn(x[None], t[None])[0]

    @jax.jit
    def derivatives():
        mean, sigma = VP.marginal(x0, noise.t)
        xt, sigma = mean + sigma[:, None] * noise.z, sigma[:, None]
        gradient = jax.vmap(jax.grad(lambda x, t: jnp.trace(jax.jacrev(one)(x, t))))(xt, noise.t)
        return sigma, score_fn(xt, noise.t), jax.vmap(jax.jacrev(one))(xt, noise.t), gradient

    sigma, score, jacobian, gradient = map(np.asarray, derivatives())
    spread = sigma[..., None] ** 2 * jacobian + np.eye(D)
    u = np.asarray(noise.z) + sigma * score
    trace = np.trace(spread, axis1=1, axis2=2)
    norm = np.sum(u**2, axis=1)
    third = sigma**3 * gradient + (norm - trace)[:, None] * u - 2 * np.einsum("bij,bj->bi", spread, u)
    second = np.mean((spread - u[:, :, None] * u[:, None, :]) ** 2, axis=(1, 2))
    np.testing.assert_allclose(terms["second_frob"], second, rtol=1e-4)
    np.testing.assert_allclose(terms["third"], jnp.mean(third**2, axis=1), rtol=1e-3)
    np.testing.assert_allclose(terms["total"], terms["first"] + 0.5 * second + 0.1 * terms["third"], rtol=1e-4)
    second_order = compiled_losses(Objective(order=2, **weights), score_fn, VP, x0, noise)
    np.testing.assert_allclose(second_order["total"], terms["first"] + 0.5 * second, rtol=1e-4)
    assert set(second_order) == {"total", "first", "second_frob"}
    np.testing.assert_allclose(
        exact_second_order_trace(jnp.asarray(spread - np.eye(D)), jnp.asarray(u)), (trace - norm) ** 2 / D, rtol=1e-4
    )


@pytest.mark.parametrize("d", [1, 2])
def test_the_true_score_is_stationary_for_the_exact_orders(d):
    """At the paper's mixture, and one in 2-D, the expected gradient of every exact term is 0; elsewhere it is not."""
    density = paper_mixture() if d == 1 else asymmetric_mixture(2)
    objective = Objective(order=3, t_min=0.05, exact=True)

    def terms(c, key):
        data_key, noise_key = jax.random.split(key)
        x0 = density.sample(data_key, (2000, d))
        noise = objective.draw_noise(noise_key, VP, x0.shape)
        losses = objective.losses(lambda x, t: density.score(VP, x, t) + c * x**3, VP, x0, noise)
        return jnp.stack([jnp.mean(value) for name, value in losses.items() if name != "total"])

    def z_scores(c):
        keys = jax.random.split(jax.random.key(3), 40)
        values = jax.lax.map(lambda key: jax.jvp(lambda c: terms(c, key), (c,), (jnp.ones(()),))[1], keys)
        return jnp.abs(jnp.mean(values, 0)) / (jnp.std(values, 0, ddof=1) / np.sqrt(len(keys)))

    z_scores = jax.jit(z_scores)
    assert jnp.max(z_scores(jnp.zeros(()))) < 5
    assert jnp.min(z_scores(jnp.full((), -0.3))) > 5, "the draws are too few to see an error of this size"


@pytest.mark.parametrize("name", DISTINCT_SDES)
def test_true_score_is_stationary_for_every_order(name):
    """At the true score the expected gradient of each term is 0; away from it, it is not (5 standard errors)."""
    sde = SDES[name](**({"sigma_max": 3.0} if SDES[name].variance_exploding else {}))
    objective = Objective(order=3, t_min=0.05)
    batch, repeats = 4000, 40

    def gradients(params, key):
        data_key, noise_key = jax.random.split(key)
        x0 = DENSITY.sample(data_key, (batch, D))
        noise = objective.draw_noise(noise_key, sde, x0.shape)

        def terms(params):
            losses = objective.losses(wrong_score(sde, params), sde, x0, noise)
            return jnp.stack([jnp.mean(value) for name, value in losses.items() if name != "total"])

        return jax.jacrev(terms)(params)

    @jax.jit
    def z_scores(params):
        keys = jax.random.split(jax.random.key(3), repeats)
        values = jax.lax.map(lambda key: gradients(params, key), keys)
        error = jnp.std(values, axis=0, ddof=1) / np.sqrt(repeats)
        # a bar makes some gradients 0 in every draw
        return jnp.where(error > 0, jnp.mean(values, 0) / jnp.where(error > 0, error, 1), 0)

    assert jnp.max(jnp.abs(z_scores(jnp.zeros(3)))) < 5
    away = jnp.abs(z_scores(jnp.array([0.0, 0.0, -0.3])))
    assert jnp.all(jnp.max(away, axis=1) > 5), "the draws are too few to see an error of this size"


def test_bars_carry_no_gradient():
    """The second order does not move the score's value, nor the third its Jacobian."""
    x0 = DENSITY.sample(jax.random.key(0), (4, D))
    noise = compiled_noise(Objective(t_min=1e-2), jax.random.key(1), VP, x0.shape)

    def term(name):
        def of_params(params):
            losses = Objective(order=3, t_min=1e-2).losses(wrong_score(VP, params), VP, x0, noise)
            return jnp.mean(losses[name])

        return jax.jit(jax.grad(of_params))((0.1, 0.1, 0.1))

    value, slope, curvature = term("second_frob")
    assert value == 0
    assert abs(slope) > 1e-3
    value, slope, curvature = term("third")
    assert value == 0
    assert slope == 0
    assert abs(curvature) > 1e-3


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), VESDE()])
def test_weightings_estimate_one_objective(sde):
    """Likelihood weighting with uniform t, and importance sampling times its total weight, have equal means."""
    t_min, n = 1e-2, 400_000
    uniform = Objective(t_min=t_min, likelihood_weighting=True)
    sampled = Objective(t_min=t_min, likelihood_weighting=True, importance_weighting=True)

    @jax.jit
    def means(key):
        keys = jax.random.split(key)
        x0 = jnp.zeros((n, 1))
        results = []
        for objective, key in zip((uniform, sampled), keys, strict=True):
            noise = objective.draw_noise(key, sde, x0.shape)
            scale = jnp.tanh(3 * noise.t)[:, None]
            losses = objective.losses(
                lambda x, t, s=scale: -s * x / append_dims(sde.alpha_sigma(t)[1], x), sde, x0, noise
            )
            results.append((jnp.mean(losses["total"]), jnp.std(losses["total"]) / np.sqrt(n)))
        return results

    (a, a_error), (b, b_error) = means(jax.random.key(0))
    weight = sde.importance_weight(jnp.array(1.0), t_min) / (1 - t_min)
    assert abs(a - weight * b) < 5 * jnp.hypot(a_error, weight * b_error)


def test_times_have_their_density():
    sde, t_min = VPSDE(), 1e-3
    objective = Objective(t_min=t_min, likelihood_weighting=True, importance_weighting=True)
    times = objective.times.draw(jax.random.key(0), sde, 50_000)
    levels = sde.importance_weight(times, t_min) / sde.importance_weight(jnp.array(1.0), t_min)
    assert abs(jnp.mean(levels) - 0.5) < 5 * np.sqrt(1 / 12 / 50_000)
    uniform = Objective(t_min=t_min).times.draw(jax.random.key(0), sde, 50_000)
    assert jnp.min(uniform) >= t_min
    assert abs(jnp.mean(uniform) - (1 + t_min) / 2) < 5 * np.sqrt(1 / 12 / 50_000)


def test_half_sum_and_weights():
    x0 = DENSITY.sample(jax.random.key(0), (4, D))
    noise = compiled_noise(Objective(t_min=1e-2), jax.random.key(1), VP, x0.shape)
    score_fn = mixture_score(VP)
    mean = compiled_losses(Objective(t_min=1e-2), score_fn, VP, x0, noise)
    half = compiled_losses(Objective(t_min=1e-2, reduce_mean=False), score_fn, VP, x0, noise)
    np.testing.assert_allclose(half["total"], 0.5 * D * mean["total"], rtol=1e-6)
    weighted = Objective(order=3, t_min=1e-2, second_weight=0.5, third_weight=0.1)
    third = compiled_losses(weighted, score_fn, VP, x0, noise)
    total = third["first"] + 0.5 * (third["second_frob"] + third["second_trace"]) + 0.1 * third["third"]
    np.testing.assert_allclose(third["total"], total, rtol=1e-6)
    second = compiled_losses(Objective(order=2, t_min=1e-2), score_fn, VP, x0, noise)
    np.testing.assert_allclose(second["second_frob"], third["second_frob"], rtol=1e-5)
    assert set(second) == {"total", "first", "second_frob", "second_trace"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"order": 4}, "score_matching_order is 4; it must be 1, 2 or 3"),
        ({"order": 2, "reduce_mean": False}, "reduce_mean"),
        ({"importance_weighting": True}, "likelihood_weighting"),
        ({"t_min": 0.0}, "smallest_time"),
    ],
)
def test_impossible_objectives_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Objective(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"order": 3},
        {"order": 3, "residual_first": True},
        {"order": 3, "estimator": "unbiased", "high_order_weighting": "residual"},
        {"order": 2, "estimator": "squared_trace"},
        {"order": 2, "estimator": "unbiased_trace"},
    ],
)
def test_losses_of_large_images_can_be_traced(fields):
    """The powers of d = 256 x 256 x 3 in the losses are too large for integers of 32 bits."""
    objective, shape = Objective(**fields), (2, 256, 256, 3)

    def losses(x0, key):
        noise = objective.draw_noise(key, VPSDE(), shape)
        residual = Residual(jnp.ones(2), jnp.ones(())) if objective.needs_residual else None
        return objective.losses(lambda x, t: -x, VPSDE(), x0, noise, residual)

    shapes = jax.eval_shape(losses, jax.ShapeDtypeStruct(shape, jnp.float32), jax.random.key(0))
    assert {each.shape for each in shapes.values()} == {(2,)}
