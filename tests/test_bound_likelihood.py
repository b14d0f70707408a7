import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrays import Batch, PerExample
from bound_likelihood import FORMS, expected_prior_logp, likelihood_bound
from likelihood import GaussianReference, bits_per_dim
from sde_lib import SDE, SDES, VPSDE, LinearGammaSDE
from tests.analytic import DISTINCT_SDES, asymmetric_mixture, gaussian

MIXTURE = asymmetric_mixture(3)
NEAR = GaussianReference(MIXTURE.mean, 0.45)
VP = VPSDE()
VP_SCORE = MIXTURE.score_fn(VP)
X = MIXTURE.sample(jax.random.key(0), (32, 3))
KEYS = jax.random.split(jax.random.key(1), 32)


@partial(jax.jit, static_argnums=(0, 2))
def expected_logp(sde: SDE, t: float, num: int = 4000) -> tuple[PerExample, PerExample]:
    """E ln q_t(x_t) given each of X, with its standard error."""
    x = jnp.repeat(X, num, axis=0)
    times = jnp.full(len(x), t)
    mean, sigma = sde.marginal(x, times)
    xt = mean + sigma[:, None] * jax.random.normal(jax.random.key(2), x.shape)
    logp = MIXTURE.log_density(sde, xt, times).reshape(len(X), num)
    return jnp.mean(logp, axis=1), jnp.std(logp, axis=1) / math.sqrt(num)


@pytest.mark.parametrize("name", DISTINCT_SDES)
@pytest.mark.parametrize(
    ("form", "importance_sampling", "reference"),
    [("dsm", True, NEAR), ("sm", True, None), ("dsm", False, None), ("sm", False, NEAR)],
)
def test_the_bound_is_the_likelihood_at_the_true_score(name, form, importance_sampling, reference):
    sde, t_min = SDES[name](), 1e-2
    bound = likelihood_bound(
        MIXTURE.score_fn(sde),
        sde,
        X,
        KEYS,
        t_min=t_min,
        form=form,
        importance_sampling=importance_sampling,
        num_times=300,
        reference=reference,
    )
    (start, start_error), (end, end_error) = (expected_logp(sde, t, 4000) for t in (t_min, sde.t_max))
    # with q_T in the prior's place: the true score carries the data to q_T
    difference = bound.integral - (end - start)
    error = jnp.sqrt(bound.error**2 + start_error**2 + end_error**2)
    assert jnp.all(jnp.abs(difference) < 5 * error)
    # examples are independent, and their mean is sharper
    assert abs(jnp.mean(difference)) < 5 * jnp.sqrt(jnp.mean(error**2) / len(X))
    assert jnp.all(bound.start == 0)


@pytest.mark.parametrize("name", DISTINCT_SDES)
def test_nothing_is_sampled_of_the_reference_gaussian(name):
    mean, std = np.array([0.3, -0.2, 0.5]), np.array([0.2, 0.4, 0.3])
    density, sde = gaussian(mean, np.diag(std**2)), SDES[name]()
    # Linear gamma begins with so little noise that the start-time correction would be about 0.
    t_min = 0.2 if isinstance(sde, LinearGammaSDE) else 1e-2
    solve = {"t_min": t_min, "num_times": 4, "num_starts": 2, "reference": GaussianReference(mean, std)}

    def expected(t: float) -> Batch:
        alpha, sigma = (np.asarray(a, np.float64) for a in sde.alpha_sigma(jnp.float32(t)))
        variance = (alpha * std) ** 2 + sigma**2
        x = np.asarray(X, np.float64)
        return -0.5 * np.sum(np.log(2 * np.pi * variance) + ((alpha * (x - mean)) ** 2 + sigma**2) / variance, axis=1)

    def expected_start() -> Batch:
        """E[ln N(x_t; alpha x, sigma^2) - ln N(x; (x_t + sigma^2 score) / alpha, (sigma / alpha)^2)], x_t given x."""
        alpha, sigma = (np.asarray(a, np.float64) for a in sde.alpha_sigma(jnp.float32(t_min)))
        spread, x = (alpha * std) ** 2 + sigma**2, np.asarray(X, np.float64)
        # x less the mean of the second, for x_t = alpha x + sigma z
        fixed, of_z = (x - mean) * sigma**2 / spread, -alpha * std**2 * sigma / spread
        missed = (fixed**2 + of_z**2) / (sigma / alpha) ** 2
        return 0.5 * np.sum(missed - 1 - 2 * np.log(alpha), axis=1)

    for form in FORMS:
        bound = likelihood_bound(density.score_fn(sde), sde, X, KEYS, form=form, **solve)
        assert jnp.max(bound.error) < 1e-4
        np.testing.assert_allclose(bound.integral, expected(sde.t_max) - expected(t_min), atol=1e-4)
        np.testing.assert_allclose(bound.start, expected_start(), atol=1e-4)
    assert np.max(np.abs(expected_start())) > 5e-3


def test_an_outlier_in_a_nearly_constant_dimension_does_not_spoil_the_control_variate():
    """With the standard deviation of the reference itself, the error would be 16 nats instead of 0.6."""
    mean, outlier = np.zeros(3), jnp.asarray([[0.3, -0.3, 0.5]], jnp.float32)
    model = gaussian(mean, np.diag(np.square([0.5, 0.5, 0.1]))).score_fn(VP)
    solve = {"t_min": 1e-4, "num_times": 1000, "num_starts": 100}
    narrow = GaussianReference(mean, np.array([0.5, 0.5, 0.02]))
    bound = likelihood_bound(model, VP, outlier, KEYS[:1], reference=narrow, **solve)
    plain = likelihood_bound(model, VP, outlier, KEYS[:1], **solve)
    assert bound.error < 0.7 * plain.error
    assert abs(bound.total - plain.total) < 5 * np.hypot(bound.error, plain.error)


def test_the_start_time_correction_leads_to_the_density_of_the_data():
    bound = likelihood_bound(VP_SCORE, VP, X, KEYS, t_min=1e-4, num_times=500, num_starts=500, reference=NEAR)
    mismatch = expected_prior_logp(VP, X) - expected_logp(VP, VP.t_max, 4000)[0]
    gap = bound.total + mismatch + MIXTURE.log_density_of_data(X)
    assert jnp.all(jnp.abs(gap) < 5 * bound.error + 0.01)


@pytest.mark.parametrize(("name", "form"), [("vesde", "dsm"), ("subvpsde", "sm")])
def test_a_perturbed_score_lies_above_by_what_it_is_off(name, form):
    sde, t_min = SDES[name](), 1e-2
    x = MIXTURE.sample(jax.random.key(3), (500, 3))
    keys = jax.random.split(jax.random.key(4), len(x))

    def perturbed(x: Batch, t: PerExample) -> Batch:
        return MIXTURE.score(sde, x, t) + 0.3 / sde.alpha_sigma(t)[1][:, None]

    solve = {"t_min": t_min, "form": form, "num_times": 20, "reference": NEAR}
    excess = (
        likelihood_bound(perturbed, sde, x, keys, **solve).total
        - likelihood_bound(MIXTURE.score_fn(sde), sde, x, keys, **solve).total
    )
    # half the integral of g^2 |perturbation|^2; the same noise in both, so little else differs
    expected = 0.5 * float(sde.importance_weight(jnp.float32(sde.t_max), t_min)) * 3 * 0.3**2
    error = float(jnp.std(excess)) / math.sqrt(len(x))
    assert expected > 10 * error
    assert abs(float(jnp.mean(excess)) - expected) < 5 * error


def test_the_published_estimator_needs_more_times():
    solve = {"t_min": 1e-3, "num_times": 100}
    published = likelihood_bound(VP_SCORE, VP, X, KEYS, **solve)
    ours = likelihood_bound(VP_SCORE, VP, X, KEYS, reference=NEAR, **solve)
    assert jnp.mean(published.error) > 2.5 * jnp.mean(ours.error)
    assert published.nfe == 100


def test_an_example_does_not_depend_on_the_rest_of_the_batch():
    solve = {"t_min": 1e-3, "num_times": 10, "num_starts": 3, "reference": NEAR}
    whole = likelihood_bound(VP_SCORE, VP, X, KEYS, **solve)
    other = likelihood_bound(VP_SCORE, VP, X.at[3:].multiply(2.0), KEYS, **solve)
    np.testing.assert_array_equal(whole.total[:3], other.total[:3])
    swapped = likelihood_bound(VP_SCORE, VP, X[::-1], KEYS[::-1], **solve)
    np.testing.assert_allclose(swapped.total[::-1], whole.total, rtol=1e-5)


def test_bits_per_dim_add_up():
    bound = likelihood_bound(VP_SCORE, VP, X, KEYS, t_min=1e-3, num_times=10, num_starts=3)
    bits = bits_per_dim(bound.terms, num_dims=3, levels=256, unit_scale=0.5)
    np.testing.assert_allclose(bits["bpd"], bound.total / (3 * math.log(2)) + 7, rtol=1e-5)
    terms = [bits[name] for name in ("prior", "integral", "start_correction", "levels", "scaler")]
    np.testing.assert_allclose(np.sum(terms, axis=0), bits["bpd"], rtol=1e-5)
    assert bits.keys() == {"prior", "integral", "start_correction", "levels", "scaler", "bpd"}


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"unknown form of the bound 'ism'; known: dsm, sm"):
        likelihood_bound(VP_SCORE, VP, X, KEYS, t_min=1e-3, form="ism")
    with pytest.raises(ValueError, match="num_times >= 2"):
        likelihood_bound(VP_SCORE, VP, X, KEYS, t_min=1e-3, num_times=1)
