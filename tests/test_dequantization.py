"""Dequantization against the exact probabilities of discrete images under densities in closed form."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jaxtyping import Float

from configs.default import get_config
from dequantization.noise import (
    Dequantizer,
    TruncatedNormalDequantizer,
    UniformDequantizer,
    check_levels,
    dequantizer_from_config,
    importance_weights,
    log_mean_exp,
)
from likelihood import bits_per_dim, ode_log_likelihood
from sde_lib import SDE, SDES, VESDE, VPSDE, LinearVESDE, SubVPSDE
from sources.densities import GaussianMixture
from tests.analytic import DISTINCT_SDES

LEVELS, DIMS = 4, 2
IMAGES = np.stack(np.meshgrid(*[np.arange(LEVELS)] * DIMS, indexing="ij"), axis=-1).reshape(-1, 1, 1, DIMS)
"""Every image of two pixels."""
SHARES = 0.5 / LEVELS**DIMS + 0.5 * np.random.default_rng(0).dirichlet(np.ones(LEVELS**DIMS))
"""Their probabilities, with no structure that would hide an error, and none drowned by its neighbours' noise."""


def truncated(sde: SDE, **changes) -> TruncatedNormalDequantizer:
    fields = {"levels": LEVELS, "centered": True, "bare_levels": True, "smallest_time": 1e-5}
    return TruncatedNormalDequantizer.of_sde(sde, **(fields | changes))


def of_levels(spread: float, *, bare: bool) -> GaussianMixture:
    """Images at the middles of their bins in [-1, 1], each a normal of the given standard deviation."""
    unit = IMAGES.reshape(-1, DIMS) / (LEVELS - 1) if bare else (IMAGES.reshape(-1, DIMS) + 0.5) / LEVELS
    return GaussianMixture(SHARES, 2 * unit - 1, np.tile(spread**2 * np.eye(DIMS), (len(SHARES), 1, 1)))


def exact_nats(density: GaussianMixture, dequantizer: Dequantizer, sde: SDE | None) -> np.ndarray:
    """-ln P of each of IMAGES: the integral over its box of the density at the dequantizer's time (of x_0 for None)."""
    alpha, sigma = (1.0, 0.0) if sde is None else map(float, sde.alpha_sigma(jnp.float32(dequantizer.t_min)))
    half = alpha / dequantizer.bins_per_unit
    bare = dequantizer.bins_per_unit < LEVELS
    middle = alpha * (2 * (IMAGES.reshape(-1, DIMS) + (0 if bare else 0.5)) / dequantizer.bins_per_unit - 1)
    spread = np.sqrt(alpha**2 * density.covariances[0, 0, 0] + sigma**2)
    ends = [(middle[:, None] + side * half - alpha * density.means[None]) / spread for side in (-1, 1)]
    inside = np.prod(scipy.special.ndtr(ends[1]) - scipy.special.ndtr(ends[0]), axis=2)
    return -np.log(inside @ density.weights)


def sampled_bounds(
    density: GaussianMixture, dequantizer: Dequantizer, sde: SDE, draws: int, repeats: int
) -> Float[np.ndarray, "repeats images"]:
    """The bound on -ln P of each of IMAGES from `draws` draws, `repeats` times."""

    @jax.jit
    def log_weights(keys):
        x, log_q = dequantizer(keys, jnp.tile(IMAGES, (draws * repeats, 1, 1, 1)))
        return density.log_density(sde, x, jnp.full(len(x), dequantizer.t_min)) - log_q

    keys = jax.random.split(jax.random.key(draws), draws * repeats * len(IMAGES))
    weights = np.asarray(log_weights(keys), np.float64).reshape(draws, -1)
    constants = DIMS * math.log(dequantizer.bins_per_unit * dequantizer.unit_scale)
    return constants - log_mean_exp(weights).reshape(repeats, -1)


CASES = {name: (truncated(SDES[name]()), SDES[name](), of_levels(0.0, bare=True)) for name in DISTINCT_SDES} | {
    "later, with less of the noise": (
        truncated(VPSDE(), smallest_time=0.3, centered=True),
        VPSDE(),
        of_levels(0.0, bare=True),
    ),
    "bins of a model trained with noise": (
        truncated(VPSDE(), bare_levels=False),
        VPSDE(),
        of_levels(0.1, bare=False),
    ),
    "uniform": (UniformDequantizer(LEVELS, True, 1e-5), VPSDE(), of_levels(0.15, bare=False)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_bound_lies_above_the_exact_value_and_tends_to_it(name):
    dequantizer, sde, density = CASES[name]
    exact = exact_nats(density, dequantizer, sde)
    gaps = []
    for draws in (1, 4, 16):
        gap = sampled_bounds(density, dequantizer, sde, draws, repeats=50) - exact
        error = gap.std(axis=0, ddof=1) / math.sqrt(len(gap)) + 1e-5
        assert np.all(gap.mean(axis=0) > -5 * error), draws
        gaps.append((gap.mean(), math.sqrt(np.mean(error**2) / len(exact))))
    for (more, error), (fewer, error_of_fewer) in zip(gaps[1:], gaps, strict=False):
        assert more < fewer + 5 * math.hypot(error, error_of_fewer)
    # the first correction to the logarithm falls like 1 / draws
    assert gaps[2][0] < max(gaps[0][0] / 4, 1e-4) + 5 * gaps[2][1]


@pytest.mark.parametrize("name", DISTINCT_SDES)
def test_a_right_model_of_bare_levels_loses_what_is_derived(name):
    """Eqn. 8 of docs/dequantization.md, from one draw."""
    dequantizer, sde, density = CASES[name]
    bound = sampled_bounds(density, dequantizer, sde, 1, repeats=50)
    # of every draw: the density is at least that of the image's own normal
    assert np.max(bound + np.log(SHARES)) < -DIMS * math.log(math.erf(dequantizer.tau / math.sqrt(2))) + 1e-4
    uniform = UniformDequantizer(LEVELS, True, dequantizer.t_min)
    assert sampled_bounds(density, uniform, sde, 1, repeats=50).mean() > bound.mean() + 1


def test_through_the_ode():
    dequantizer, sde, density = CASES["subvpsde"]
    x, log_q = dequantizer(jax.random.split(jax.random.key(0), len(IMAGES)), jnp.asarray(IMAGES))
    solve = {"t_min": dequantizer.t_min, "method": "rk4_log", "num_steps": 40}
    result = ode_log_likelihood(density.score_fn(sde), sde, x, None, **solve)
    terms = result.terms | {"dequantization": log_q}
    scaling = {"levels": dequantizer.bins_per_unit, "unit_scale": dequantizer.unit_scale}
    bound = bits_per_dim(terms, num_dims=DIMS, **scaling)["bpd"]
    exact = exact_nats(density, dequantizer, sde) / (DIMS * math.log(2))
    # a draw scatters little, as the noise is the posterior but for its tails; the prior differs from x at T a little
    np.testing.assert_allclose(bound, exact, atol=0.03)


@pytest.mark.parametrize("tau", [0.01, 1.0, 3.0, 5.0])
def test_the_noise_has_the_density_it_says(tau):
    dequantizer = dataclasses.replace(truncated(VPSDE()), tau=tau)
    images = jnp.zeros((40_000, 1, 1, 1), jnp.int32)
    x, log_q = dequantizer(jax.random.split(jax.random.key(1), len(images)), images)
    u = (np.asarray(x, np.float64).ravel() / dequantizer.alpha + 1) / 2 * (LEVELS - 1)
    log_q = np.asarray(log_q, np.float64)
    assert np.abs(u).max() <= 0.5 + 1e-6

    def z(values, expected):
        return (values.mean() - expected) / (values.std(ddof=1) / math.sqrt(len(values)) + 1e-7)

    assert abs(z(np.exp(-log_q), 1.0)) < 5  # the volume of a bin
    mass = math.erf(tau / math.sqrt(2))
    peak = math.exp(-0.5 * tau**2) / math.sqrt(2 * math.pi)
    assert abs(z(log_q, math.log(2 * tau / math.sqrt(2 * math.pi) / mass) - 0.5 + tau * peak / mass)) < 5
    # of the normal that u is cut from
    assert abs(z((2 * tau * u) ** 2, 1 - 2 * tau * peak / mass)) < 5
    assert abs(z(u, 0.0)) < 5


def test_start_times_are_those_of_the_table():
    half = 1 / (LEVELS - 1)
    ve, linear, vp, subvp = VESDE(), LinearVESDE(), VPSDE(), SubVPSDE()
    expected: dict[SDE, float] = {
        ve: math.log(half / 3 / 0.01) / math.log(5000),
        linear: half / 3 / 50,
        vp: float(vp.time_of_beta_integral(jnp.float32(math.log1p((half / 3) ** 2)))),
        subvp: float(subvp.time_of_beta_integral(jnp.float32(2 * math.asinh(half / 6)))),
    }
    for sde, t in expected.items():
        dequantizer = truncated(sde)
        assert dequantizer.t_min == pytest.approx(t, rel=1e-4)
        assert dequantizer.tau == pytest.approx(3.0, rel=1e-4)
        alpha, sigma = map(float, sde.alpha_sigma(jnp.float32(t)))
        assert dequantizer.alpha == pytest.approx(alpha, rel=1e-5)
        assert dequantizer.tau * sigma / alpha == pytest.approx(half, rel=1e-4)
    # never before the smallest time, and VE's noise is 0.01 from the start
    late = truncated(ve, levels=256, centered=False)
    assert (late.t_min, late.tau) == (1e-5, pytest.approx(0.5 / 255 / 0.01, rel=1e-3))


@pytest.mark.parametrize("name", ["vpsde", "uniform"])
def test_noise_of_an_image_does_not_depend_on_its_batch(name):
    dequantizer, images = CASES[name][0], jnp.asarray(IMAGES)
    keys = jax.random.split(jax.random.key(0), len(images))
    whole, part = dequantizer(keys, images), dequantizer(keys[3:5], images[3:5])
    np.testing.assert_array_equal(whole.x[3:5], part.x)
    np.testing.assert_array_equal(whole.log_q[3:5], part.log_q)
    assert whole.x.shape == images.shape
    assert jnp.all(jnp.diff(whole.x[:, 0, 0, 0].reshape(LEVELS, -1).mean(1)) > 0)


def test_uniform_noise_fills_the_unit_interval():
    images = jnp.asarray(np.arange(16).reshape(1, 4, 4, 1))
    for centered, first in ((False, 0.0), (True, -1.0)):
        dequantizer = UniformDequantizer(16, centered, 1e-5)
        x = dequantizer(jax.random.split(jax.random.key(0), 1), images).x
        unit = (x - first) * dequantizer.unit_scale
        np.testing.assert_array_equal(np.floor(unit * 16), images)


def test_averages_inside_the_logarithm():
    log_weights = np.array([[-1000.0, 3.0], [-1001.0, 1.0], [-1002.0, 2.0]])
    expected = [-1000 + math.log((1 + math.exp(-1) + math.exp(-2)) / 3), math.log(np.exp(log_weights[:, 1]).mean())]
    np.testing.assert_allclose(log_mean_exp(log_weights), expected, rtol=1e-12)
    shares = importance_weights(log_weights)
    np.testing.assert_allclose(shares.sum(axis=0), 1.0)
    np.testing.assert_allclose(shares[:, 1], np.exp(log_weights[:, 1]) / np.exp(log_weights[:, 1]).sum())


def test_images_that_are_no_levels_are_refused():
    check_levels(np.array([0, 16], np.uint8), 17, "digits")
    with pytest.raises(ValueError, match=r"digits has images of type float32, but .* need integer levels from 0 to 16"):
        check_levels(np.zeros(3, np.float32), 17, "digits")
    with pytest.raises(ValueError, match=r"digits has a pixel of level 17; data.levels=17 allows 0 to 16"):
        check_levels(np.array([3, 17]), 17, "digits")
    with pytest.raises(ValueError, match="level -1"):
        check_levels(np.array([3, -1]), 17, "digits")


def test_from_a_configuration():
    config = get_config()
    assert dequantizer_from_config(config, VPSDE()) == UniformDequantizer(256, False, 1e-5)
    config.eval.dequantization = "truncated_normal"
    dequantizer = dequantizer_from_config(config, VPSDE())
    assert isinstance(dequantizer, TruncatedNormalDequantizer)
    assert (dequantizer.bins_per_unit, dequantizer.tau) == (255, pytest.approx(0.5 / 255 / 1.0e-3, rel=0.01))
    config.data.uniform_dequantization = True
    assert dequantizer_from_config(config, VPSDE()).bins_per_unit == 256
    config.eval.truncation = -1.0
    with pytest.raises(ValueError, match=r"eval.truncation is -1.0; it must be positive"):
        dequantizer_from_config(config, VPSDE())
    config.eval.truncation = 1e-9
    with pytest.raises(ValueError, match=r"eval.truncation is 1e-09; it must be at least"):
        dequantizer_from_config(config, VPSDE())
    config.eval.dequantization = "gaussian"
    with pytest.raises(ValueError, match=r"eval.dequantization is 'gaussian'; known: uniform, truncated_normal"):
        dequantizer_from_config(config, VPSDE())
