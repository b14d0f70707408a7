"""Conditional scores and samples, latent codes and temperature, against Gaussians and mixtures in closed form."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evaluators.latents import spherical_interpolation
from models.wideresnet import WideResnet
from samplers.controllable import ClassifierFreeScore, GuidedScore, Observation, basis_of_matrix, colorization_basis
from samplers.probability_flow import ODESampler
from sampling import PredictorCorrector
from sde_lib import VESDE, VPSDE
from tests.analytic import asymmetric_mixture, gaussian

VE = VESDE(0.05, 5.0)
MIXTURE = asymmetric_mixture(2)
COVARIANCE = np.array([[0.16, 0.08, -0.03], [0.08, 0.14, 0.02], [-0.03, 0.02, 0.1]])
GAUSSIAN = gaussian(np.array([0.3, -0.2, 0.1]), COVARIANCE)


@pytest.mark.parametrize("sde", [VE, VPSDE()], ids=["ve", "vp"])
def test_guidance_by_the_posterior_gives_the_score_of_the_class(sde):
    """Bayes' rule on a mixture: its component is the class, so the exact classifier and both scores are known."""
    t = jnp.linspace(0.1, 1, 6)
    x = jax.random.normal(jax.random.key(0), (6, 2))
    labels = jnp.array([0, 1, 2, 2, 1, 0])

    def classifier(x, t):
        return MIXTURE._components(sde, x, t)[0]

    score_fn = jax.tree_util.Partial(functools.partial(MIXTURE.score, sde))
    guided = GuidedScore(score_fn, jax.tree_util.Partial(classifier), labels)
    evaluate = jax.jit(lambda score_fn, x, t: score_fn(x, t))
    unconditional = np.asarray(evaluate(score_fn, x, t))
    classes = [gaussian(*each) for each in zip(MIXTURE.means, MIXTURE.covariances, strict=True)]
    of_classes = np.stack([each.score(sde, x, t) for each in classes])
    want = of_classes[labels, np.arange(6)]
    scale = np.abs(of_classes).max()  # float32 rounds relative to the terms of the sum
    np.testing.assert_allclose(evaluate(guided, x, t), want, atol=1e-5 * scale)
    assert np.abs(unconditional - want).max() > 0.01 * scale

    # Guidance without a classifier, by the scores of the mixture and of its component.
    def of_class(x, t):
        return want

    for weight, expected in ((0.0, unconditional), (1.0, want), (2.0, 2 * want - unconditional)):
        free = ClassifierFreeScore(score_fn, jax.tree_util.Partial(of_class), weight)
        np.testing.assert_allclose(evaluate(free, x, t), expected, atol=1e-6 * scale)
    unguided = dataclasses.replace(guided, scale=0.0)
    np.testing.assert_allclose(evaluate(unguided, x, t), unconditional, atol=1e-6 * scale)


def conditional_moments(mask, basis, y, sigma):
    """Returns mean and covariance of the unknown components of x_t given known ones with noise of this sigma.

    The sampler draws the noise of the known components independently of the others.
    """
    covariance = basis.T @ (COVARIANCE + sigma**2 * np.eye(3)) @ basis
    mean, known, unknown = basis.T @ GAUSSIAN.mean, mask > 0, mask == 0
    gain = covariance[np.ix_(unknown, known)] @ np.linalg.inv(covariance[np.ix_(known, known)])
    rest = covariance[np.ix_(unknown, unknown)] - gain @ covariance[np.ix_(known, unknown)]
    return mean[unknown] + gain @ (y[known] - mean[known]), rest + sigma**2 * gain @ gain.T


@pytest.fixture(scope="module")
def conditional_sampler():
    """Returns a sampler whose corrector steps make the replacement a good approximation."""
    return PredictorCorrector(sde=VE, num_steps=150, corrector_steps=4, noise_removal=False)


CASES = {"inpainting": ([1, 0, 0], None), "linear observations": ([1, 0, 0], np.array([[1.0, 0, 1], [2, 0, 2]]))}


@pytest.mark.parametrize("name", CASES)
def test_conditional_samples_of_a_gaussian_have_the_conditional_moments(name, conditional_sampler):
    mask, matrix = CASES[name]
    basis = np.eye(3) if matrix is None else basis_of_matrix(matrix)[0]
    # The known components vary as much as the others: where they vary less, corrector steps are too small to mix.
    count, mask, y = 2048, np.array(mask, np.float32), basis.T @ np.array([0.7, 0.2, -0.1])
    known, known_mask = (jnp.tile(jnp.asarray(row, jnp.float32), (count, 1)) for row in (y, mask))
    observation = Observation(known, known_mask, None if matrix is None else jnp.asarray(basis, jnp.float32))
    score_fn = jax.tree_util.Partial(functools.partial(GAUSSIAN.score, VE))
    samples = conditional_sampler.conditional(score_fn, jax.random.key(1), jnp.arange(count), observation)
    components = np.asarray(observation.components(samples.x), np.float64)

    mean, covariance = conditional_moments(mask, basis, y, VE.sigma_min)
    unknown = components[:, mask == 0]
    error = np.sqrt(np.diag(covariance) / count)
    assert np.all(np.abs(unknown.mean(axis=0) - mean) < 5 * error)
    variances = np.diag(covariance)
    of_covariance = np.sqrt((np.outer(variances, variances) + covariance**2) / count)
    assert np.all(np.abs(np.cov(unknown.T).reshape(covariance.shape) - covariance) < 5 * of_covariance)
    prior_mean = (basis.T @ GAUSSIAN.mean)[mask == 0]
    assert np.any(np.abs(mean - prior_mean) > 10 * error), "the observation must matter"
    # Known components are the observation with the noise of the last time.
    known = components[:, mask > 0] - y[mask > 0]
    np.testing.assert_allclose(known.std(axis=0), VE.sigma_min, rtol=5 / np.sqrt(2 * count))
    assert samples.nfe == 150 * 5


def test_the_mean_of_an_observed_update_has_no_noise():
    observation = Observation(jnp.full((2, 3), 7.0), jnp.array([[1.0, 0, 0]] * 2))
    sampler = PredictorCorrector(sde=VE, num_steps=20)
    score_fn = jax.tree_util.Partial(functools.partial(GAUSSIAN.score, VE))
    samples = sampler.conditional(score_fn, jax.random.key(0), jnp.arange(2), observation)
    np.testing.assert_allclose(samples.x[:, 0], 7.0, rtol=1e-6)


def test_a_basis_replaces_only_the_known_components():
    for basis, shape in ((colorization_basis(), (2, 4, 4, 3)), (basis_of_matrix(np.ones((2, 8)))[0], (2, 2, 2, 2))):
        size = len(basis)
        np.testing.assert_allclose(basis.T @ basis, np.eye(size), atol=1e-12)
        x, values = jax.random.normal(jax.random.key(0), (2, *shape))
        mask = np.zeros(shape, np.float32).reshape(2, -1, size)
        mask[..., 0] = 1
        observation = Observation(values, jnp.asarray(mask.reshape(shape)), jnp.asarray(basis, jnp.float32))
        np.testing.assert_allclose(observation.image(observation.components(x)), x, atol=1e-5)
        got = observation.components(observation.replace(x, values)).reshape(mask.shape)
        want = np.where(mask, values.reshape(mask.shape), observation.components(x).reshape(mask.shape))
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_components_of_linear_observations():
    matrix = np.random.default_rng(0).normal(size=(4, 6))
    matrix[3] = matrix[0] - 2 * matrix[1]
    basis, to_components, rank = basis_of_matrix(matrix)
    x = np.random.default_rng(1).normal(size=(5, 6))
    assert rank == 3
    np.testing.assert_allclose((x @ matrix.T) @ to_components, (x @ basis)[:, :rank], atol=1e-10)
    assert np.abs(matrix @ basis[:, rank:]).max() < 1e-10, "the other components must not change observations"


# Latent codes


@pytest.fixture(scope="module")
def codec():
    return ODESampler(sde=VE, noise_removal=False)


def test_encode_then_decode_returns_the_data(codec):
    """The error follows the tolerance, which bounds the local errors of the steps."""
    x = MIXTURE.sample(jax.random.key(2), (64, 2))
    score_fn = jax.tree_util.Partial(functools.partial(MIXTURE.score, VE))
    errors = {}
    for tolerance in (1e-3, 1e-5):
        solver = dataclasses.replace(codec, rtol=tolerance, atol=tolerance)
        latents = solver.encode(score_fn, x).x
        errors[tolerance] = float(jnp.abs(solver.decode(score_fn, latents).x - x).max())
    assert errors[1e-5] < 1e-3
    assert errors[1e-5] < 0.2 * errors[1e-3]
    # Encoded data follow the prior but for the data's own variance: 5 standard errors of a variance.
    expected = VE.sigma_max**2 + np.trace(MIXTURE.covariance) / 2 + (MIXTURE.mean**2).mean()
    np.testing.assert_allclose(np.mean(np.square(latents)), expected, rtol=5 * np.sqrt(2 / latents.size))


@pytest.mark.parametrize("temperature", [0.5, 0.0])
def test_the_temperature_scales_the_covariance_of_a_gaussian(codec, temperature):
    """The ODE of a Gaussian is an affine map, so its samples keep the factor of x at t_max."""
    count, indices = 1024, jnp.arange(1024)
    score_fn, key = jax.tree_util.Partial(functools.partial(GAUSSIAN.score, VE)), jax.random.key(3)
    plain = np.asarray(codec(score_fn, key, indices, (3,)).x, np.float64)
    cold = dataclasses.replace(codec, temperature=temperature)(score_fn, key, indices, (3,)).x
    cold = np.asarray(cold, np.float64)
    # The map is x -> mean + C_0^(1/2) C_1^(-1/2) (x - mean), with the covariances C_t at both ends.
    variances, axes = np.linalg.eigh(COVARIANCE)
    factors = np.sqrt((variances + VE.sigma_min**2) / (variances + VE.sigma_max**2))
    of_zero = GAUSSIAN.mean - axes @ (factors * (axes.T @ GAUSSIAN.mean))
    np.testing.assert_allclose(cold, of_zero + temperature * (plain - of_zero), atol=1e-3)
    np.testing.assert_allclose(np.cov(cold.T), temperature**2 * np.cov(plain.T), atol=1e-3)
    spread = np.sqrt(np.diag(COVARIANCE) + VE.sigma_min**2)
    np.testing.assert_allclose(plain.std(axis=0), spread, rtol=5 / np.sqrt(2 * count))


def test_a_negative_temperature_is_refused(codec):
    with pytest.raises(ValueError, match=r"sampling\.temperature must not be negative, got -1"):
        dataclasses.replace(codec, temperature=-1.0)


def test_spherical_interpolation():
    a, b = np.random.default_rng(0).normal(size=(2, 5, 4, 3))
    np.testing.assert_allclose(spherical_interpolation(a, b, 0.0), a, atol=1e-12)
    np.testing.assert_allclose(spherical_interpolation(a, b, 1.0), b, atol=1e-12)
    first, last = (x / np.linalg.norm(x, axis=(1, 2), keepdims=True) for x in (a, b))
    middle = spherical_interpolation(first, last, 0.5)
    np.testing.assert_allclose(np.linalg.norm(middle, axis=(1, 2)), 1, rtol=1e-12)
    np.testing.assert_allclose(np.sum(middle * first, axis=(1, 2)), np.sum(middle * last, axis=(1, 2)), rtol=1e-9)
    np.testing.assert_allclose(spherical_interpolation(a, a, 0.3), a, rtol=1e-9)


def test_the_published_classifier_has_the_published_number_of_parameters():
    """38,913,242 for 4 blocks per group, width 10 and 10 classes, counted from the published code."""
    network = WideResnet(num_outputs=10)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.ones(1))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 38_913_242


@pytest.mark.parametrize("size", [1, 6, 7, 14, 15])
def test_the_classifier_takes_images_of_any_size(size):
    images = jnp.zeros((2, size, size, 1))
    logits, _ = jax.eval_shape(WideResnet(num_outputs=3).init_with_output, jax.random.key(0), images, jnp.ones(2))
    assert logits.shape == (2, 3)
