import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from scipy.stats import qmc

from analysis.entropy import FORMS, EntropyNoise, draw_entropy_noise, entropy, stratified_times
from sde_lib import SDE, SDES, VESDE, VPSDE
from sources.densities import paper_mixture
from tests.analytic import correlated_gaussian

VP = VPSDE()


def entropy_of_mixture(noise: float) -> float:
    """-E ln q in nats of the paper's mixture with Gaussian noise, by the trapezoidal rule."""
    mixture = paper_mixture()
    variance = mixture.covariances[:, 0, 0] + noise**2
    x = np.linspace(-3, 3, 60_001)[:, None]
    components = np.exp(-0.5 * (x - mixture.means[:, 0]) ** 2 / variance) / np.sqrt(2 * np.pi * variance)
    q = components @ mixture.weights
    return float(-np.sum(np.where(q > 0, q * np.log(np.maximum(q, 1e-300)), 0)) * (x[1, 0] - x[0, 0]))


def quasi_random(sde: SDE, n: int, t_min: float) -> tuple[jax.Array, EntropyNoise]:
    """Samples of the mixture, times and noise that fill their space evenly: means with little noise."""
    component, *uniform = np.clip(qmc.Sobol(4, rng=np.random.default_rng(1)).random(n).T, 1e-9, 1 - 1e-9)
    mixture = paper_mixture()
    k = np.searchsorted(np.cumsum(mixture.weights), component)
    normal, z = special.ndtri(uniform[0]), special.ndtri(uniform[1])
    x0 = mixture.means[k, 0] + np.sqrt(mixture.covariances[k, 0, 0]) * normal
    total = sde.importance_weight(jnp.asarray(sde.t_max), t_min)
    t = sde.time_of_quantile(jnp.asarray(uniform[2], jnp.float32) * total, t_min)
    return jnp.asarray(x0[:, None], jnp.float32), EntropyNoise(t, jnp.asarray(z[:, None], jnp.float32), None)


@pytest.mark.parametrize("sde", [VESDE(sigma_min=1e-4), VP], ids=["vesde", "vpsde"])
def test_within_a_percent_for_the_mixture_with_its_exact_score(sde):
    truth = entropy_of_mixture(0.0)
    assert truth == pytest.approx(paper_mixture().entropy, abs=1e-6)
    score_fn = paper_mixture().score_fn(sde)
    x0, noise = quasi_random(sde, 2**20, 1e-5)
    for form in FORMS:
        estimate = entropy(score_fn, sde, x0, noise, t_min=1e-5, form=form)
        assert abs(estimate.mean - truth) < 0.01 * abs(truth)
        assert estimate.n == 16, "batches"


GAUSSIAN_CASES = [
    ("vesde", "score", "exact"),
    ("linearvesde", "divergence", "exact"),
    ("vpsde", "divergence", "gaussian"),
    ("subvpsde", "score", "exact"),
]


@pytest.mark.parametrize(("name", "form", "probe"), GAUSSIAN_CASES)
def test_of_a_gaussian_at_the_start_time(name, form, probe):
    """Of correlated data shaped as images, at a time when noise counts."""
    sde, density, t_min = SDES[name](), correlated_gaussian(4), 0.05
    alpha, sigma = (float(a) for a in sde.alpha_sigma(jnp.asarray(t_min)))
    covariance = alpha**2 * density.covariance + sigma**2 * np.eye(4)
    truth = 0.5 * np.linalg.slogdet(2 * math.pi * math.e * covariance)[1]
    x0 = density.sample(jax.random.key(2), (16_000, 2, 2, 1))
    noise = draw_entropy_noise(jax.random.key(3), sde, x0.shape, t_min=t_min, probe=probe)
    estimate = entropy(density.score_fn(sde), sde, x0, noise, t_min=t_min, form=form)
    assert abs(estimate.mean - truth) < 5 * estimate.se + 2e-3  # the prior stands for x_T
    assert 0 < estimate.se < 0.2


def test_stratified_times():
    t = np.asarray(stratified_times(jax.random.key(4), VP, 1e-3, 100))
    quantiles = np.asarray(VP.importance_weight(jnp.asarray(t), 1e-3)) / float(
        VP.importance_weight(jnp.asarray(1.0), 1e-3)
    )
    assert np.all(np.abs(quantiles - (np.arange(100) + 0.5) / 100) < 0.5 / 100 + 1e-4)


def test_bad_input_is_refused():
    x0, score_fn = jnp.zeros((10, 1)), paper_mixture().score_fn(VP)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="unknown probe 'uniform'"):
        draw_entropy_noise(key, VP, (10, 1), t_min=1e-5, probe="uniform")
    noise = draw_entropy_noise(key, VP, (10, 1), t_min=1e-5, num_batches=2)
    with pytest.raises(ValueError, match="unknown form 'squared'"):
        entropy(score_fn, VP, x0, noise, t_min=1e-5, form="squared", num_batches=2)
    with pytest.raises(ValueError, match=r"t_min is 0\.0"):
        entropy(score_fn, VP, x0, noise, t_min=0.0, num_batches=2)
    with pytest.raises(ValueError, match="divide the 10 examples"):
        entropy(score_fn, VP, x0, noise, t_min=1e-5, num_batches=3)
