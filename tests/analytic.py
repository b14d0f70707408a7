"""Densities known in closed form at every time of every SDE: what the tests compare with.

A Gaussian mixture stays one under a linear SDE: component k of x_t is N(alpha m_k, alpha^2 C_k + sigma^2 I). The
mixture of the tests is asymmetric on purpose: a Gaussian has a constant Hessian of its log-density, so errors of sign
and scale in third derivatives do not show there, and a symmetric mixture hides errors of sign in odd ones.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from arrays import Batch, PerExample, ScoreFn, per_example
from sde_lib import SDE


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianMixture:
    """sum_k weights[k] N(means[k], covariances[k]) in d dimensions, as the density of x_0.

    Batches may be shaped [batch, *dims] with d entries an example. Results have the precision of x.
    """

    weights: Float[np.ndarray, " k"]
    means: Float[np.ndarray, "k d"]
    covariances: Float[np.ndarray, "k d d"]

    @functools.cached_property
    def _principal_axes(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues [k, d] and eigenvectors (columns) [k, d, d] of the covariances."""
        return np.linalg.eigh(self.covariances)

    @property
    def mean(self) -> Float[np.ndarray, " d"]:
        return self.weights @ self.means

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        spread = self.means - self.mean
        return np.einsum("k,kij->ij", self.weights, self.covariances) + (spread.T * self.weights) @ spread

    def sample(self, key: Array, shape: tuple[int, ...]) -> Batch:
        """Exact samples of x_0, shaped [batch, *dims]."""
        key_component, key_normal = jax.random.split(key)
        component = jax.random.choice(key_component, len(self.weights), (shape[0],), p=jnp.asarray(self.weights))
        normal = jax.random.normal(key_normal, (shape[0], self.means.shape[1]))
        roots = jnp.asarray(np.linalg.cholesky(self.covariances), normal.dtype)[component]
        means = jnp.asarray(self.means, normal.dtype)[component]
        return (means + jnp.einsum("bij,bj->bi", roots, normal, precision="highest")).reshape(shape)

    def sample_at(self, sde: SDE, key: Array, t: PerExample, dims: tuple[int, ...]) -> Batch:
        """Exact samples of x_t, one for each time, shaped [batch, *dims]."""
        key_data, key_noise = jax.random.split(key)
        mean, sigma = sde.marginal(self.sample(key_data, (t.shape[0], *dims)).astype(t.dtype), t)
        return mean + per_example(sigma, mean) * jax.random.normal(key_noise, mean.shape, t.dtype)

    def log_density(self, sde: SDE, x: Batch, t: PerExample) -> PerExample:
        """ln q_t(x), in nats."""
        return jax.nn.logsumexp(self._components(sde, x, t)[0], axis=1)

    def score(self, sde: SDE, x: Batch, t: PerExample) -> Batch:
        """grad_x ln q_t(x)."""
        log_joint, scores = self._components(sde, x, t)
        return jnp.einsum("bk,bki->bi", jax.nn.softmax(log_joint, axis=1), scores, precision="highest").reshape(x.shape)

    def score_fn(self, sde: SDE) -> ScoreFn:
        return functools.partial(self.score, sde)

    def log_density_of_data(self, x: Batch) -> PerExample:
        """ln q_0(x), in nats."""
        ones, zeros = jnp.ones(x.shape[0], x.dtype), jnp.zeros(x.shape[0], x.dtype)
        return jax.nn.logsumexp(self._components_of_marginal(x, ones, zeros)[0], axis=1)

    def _components(self, sde: SDE, x: Batch, t: PerExample) -> tuple[Array, Array]:
        return self._components_of_marginal(x, *sde.alpha_sigma(t))

    def _components_of_marginal(self, x: Batch, alpha: PerExample, sigma: PerExample) -> tuple[Array, Array]:
        """ln(weight x density) [batch, k] and score [batch, k, d] of each component of N(alpha x_0, sigma^2 I)."""
        eigenvalues, axes = (jnp.asarray(a, x.dtype) for a in self._principal_axes)
        alpha, sigma = alpha[:, None, None], sigma[:, None, None]
        centered = x.reshape(x.shape[0], 1, -1) - alpha * jnp.asarray(self.means, x.dtype)[None]
        along = jnp.einsum("bki,kij->bkj", centered, axes, precision="highest")
        variance = alpha**2 * eigenvalues[None] + sigma**2
        log_density = -0.5 * jnp.sum(along**2 / variance + jnp.log(2 * np.pi * variance), axis=2)
        scores = -jnp.einsum("bkj,kij->bki", along / variance, axes, precision="highest")
        return log_density + jnp.log(jnp.asarray(self.weights, x.dtype))[None], scores


def gaussian(mean: Float[np.ndarray, " d"], covariance: Float[np.ndarray, "d d"]) -> GaussianMixture:
    """One Gaussian, as a mixture of a single component."""
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    return GaussianMixture(np.ones(1), mean[None], covariance[None])


def correlated_gaussian(d: int) -> GaussianMixture:
    """A Gaussian off the origin with correlated entries, of about the scale of images in [-1, 1]."""
    rng = np.random.default_rng(1)
    return gaussian(rng.uniform(-0.5, 0.5, d), _covariances(rng, 1, d)[0])


def asymmetric_mixture(d: int) -> GaussianMixture:
    """Three overlapping components of unequal weights and shapes, of about the scale of images in [-1, 1]."""
    rng = np.random.default_rng(2)
    # the first axis separates the components whatever d is
    means = rng.uniform(-0.4, 0.4, (3, d))
    means[:, 0] = (-0.7, 0.2, 0.9)
    return GaussianMixture(np.array([0.5, 0.2, 0.3]), means, _covariances(rng, 3, d))


def _covariances(rng: np.random.Generator, k: int, d: int) -> np.ndarray:
    """Random covariances with standard deviations of 0.15 to 0.45 along random axes."""
    axes = np.linalg.qr(rng.normal(size=(k, d, d)))[0]
    return np.einsum("kij,kj,klj->kil", axes, rng.uniform(0.15, 0.45, (k, d)) ** 2, axes)
