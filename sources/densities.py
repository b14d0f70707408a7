"""Synthetic data: densities to draw points from. Most of them are known in closed form.

A Gaussian mixture remains a Gaussian mixture under a linear SDE: component k of x_t is
N(alpha m_k, alpha^2 C_k + sigma^2 I). So its density, its score and all derivatives are known at every time of every
SDE. A curve with Gaussian noise is also a mixture, with components along the curve.

To add a density, implement `Density` and name an instance in DENSITIES.

Sources: [L22] Lu et al., ICML 2022 (the mixture in one dimension, the checkerboard); [SE19] Song & Ermon, NeurIPS 2019
(two modes far from each other).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from arrays import Batch, PerExample, ScoreFn
from sde_lib import SDE


@runtime_checkable
class Density(Protocol):
    """A density q_0 of data points with `dims` dimensions."""

    @property
    def dims(self) -> int: ...

    @property
    def entropy(self) -> float | None:
        """-E ln q_0, in nats; None if it is not known."""
        ...

    @property
    def log_density_of_data(self) -> Callable[[Float[Array, "batch d"]], PerExample] | None:
        """ln q_0(x), in nats, -inf outside the support; None if it is not known."""
        ...

    def sample(self, key: Array, shape: tuple[int, ...]) -> Float[Array, "batch d"]:
        """Draws independent points of shape (batch, dims)."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianMixture:
    """sum_k weights[k] N(means[k], covariances[k]) in d dimensions, as the density of x_0.

    Batches may have shape [batch, *dims] with d entries per example. Results have the precision of x.
    """

    weights: Float[np.ndarray, " k"]
    means: Float[np.ndarray, "k d"]
    covariances: Float[np.ndarray, "k d d"]

    @functools.cached_property
    def _principal_axes(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues [k, d] and eigenvectors (columns) [k, d, d] of the covariances."""
        return np.linalg.eigh(self.covariances)

    @property
    def dims(self) -> int:
        return self.means.shape[1]

    @property
    def entropy(self) -> float | None:
        """-E ln q_0, in nats: by quadrature in one dimension, in closed form for one Gaussian, else None."""
        if len(self.weights) == 1:
            return 0.5 * float(np.linalg.slogdet(2 * math.pi * math.e * self.covariances[0])[1])
        if self.dims > 1:
            return None
        mean, scale = self.means[:, 0], np.sqrt(self.covariances[:, 0, 0])
        # The trapezoidal rule is exact to rounding for a smooth density that vanishes at both ends.
        x = np.arange((mean - 12 * scale).min(), (mean + 12 * scale).max(), 0.1 * scale.min())[:, None]
        components = -0.5 * ((x - mean) / scale) ** 2 - np.log(math.sqrt(2 * math.pi) * scale)
        log_density = np.logaddexp.reduce(components + np.log(self.weights), axis=1)
        return float(-np.sum(np.exp(log_density) * log_density) * 0.1 * scale.min())

    @property
    def mean(self) -> Float[np.ndarray, " d"]:
        """E x_0."""
        return self.weights @ self.means

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """The covariance matrix of x_0."""
        spread = self.means - self.mean
        return np.einsum("k,kij->ij", self.weights, self.covariances) + (spread.T * self.weights) @ spread

    def sample(self, key: Array, shape: tuple[int, ...]) -> Batch:
        """Draws exact samples of x_0 with shape [batch, *dims]."""
        key_component, key_normal = jax.random.split(key)
        component = jax.random.choice(key_component, len(self.weights), (shape[0],), p=jnp.asarray(self.weights))
        normal = jax.random.normal(key_normal, (shape[0], self.means.shape[1]))
        roots = jnp.asarray(np.linalg.cholesky(self.covariances), normal.dtype)[component]
        means = jnp.asarray(self.means, normal.dtype)[component]
        return (means + jnp.einsum("bij,bj->bi", roots, normal, precision="highest")).reshape(shape)

    def log_density(self, sde: SDE, x: Batch, t: PerExample) -> PerExample:
        """Returns ln q_t(x), in nats."""
        return jax.nn.logsumexp(self._components(sde, x, t)[0], axis=1)

    def score(self, sde: SDE, x: Batch, t: PerExample) -> Batch:
        """Returns grad_x ln q_t(x)."""
        log_joint, scores = self._components(sde, x, t)
        return jnp.einsum("bk,bki->bi", jax.nn.softmax(log_joint, axis=1), scores, precision="highest").reshape(x.shape)

    def score_fn(self, sde: SDE) -> ScoreFn:
        """Returns the exact score as a `ScoreFn`, for this SDE."""
        return functools.partial(self.score, sde)

    def log_density_of_data(self, x: Batch) -> PerExample:
        """Returns ln q_0(x), in nats."""
        ones, zeros = jnp.ones(x.shape[0], x.dtype), jnp.zeros(x.shape[0], x.dtype)
        return jax.nn.logsumexp(self._components_of_marginal(x, ones, zeros)[0], axis=1)

    def _components(self, sde: SDE, x: Batch, t: PerExample) -> tuple[Array, Array]:
        return self._components_of_marginal(x, *sde.alpha_sigma(t))

    def _components_of_marginal(self, x: Batch, alpha: PerExample, sigma: PerExample) -> tuple[Array, Array]:
        """Returns ln(weight x density) [batch, k] and score [batch, k, d] of each component of alpha x_0 + sigma z."""
        eigenvalues, axes = (jnp.asarray(a, x.dtype) for a in self._principal_axes)
        alpha, sigma = alpha[:, None, None], sigma[:, None, None]
        centered = x.reshape(x.shape[0], 1, -1) - alpha * jnp.asarray(self.means, x.dtype)[None]
        along = jnp.einsum("bki,kij->bkj", centered, axes, precision="highest")
        variance = alpha**2 * eigenvalues[None] + sigma**2
        log_density = -0.5 * jnp.sum(along**2 / variance + jnp.log(2 * np.pi * variance), axis=2)
        scores = -jnp.einsum("bkj,kij->bki", along / variance, axes, precision="highest")
        return log_density + jnp.log(jnp.asarray(self.weights, x.dtype))[None], scores


def paper_mixture() -> GaussianMixture:
    """Returns the one-dimensional mixture of [L22]: two narrow modes and a wide one. Its entropy is -0.129 nats."""
    means = np.array([-2.0, -6.0, 4.0])[:, None] / 7
    return GaussianMixture(np.array([0.3, 0.3, 0.4]), means, np.array([0.1, 0.1, 1.0])[:, None, None] / 49)


def noisy_curve(points: Float[np.ndarray, "k d"], noise: float) -> GaussianMixture:
    """Returns equal Gaussians of standard deviation `noise` at points along a curve.

    If neighbouring points are at most `noise` apart, the density has no ripple: it differs from the density along the
    continuous curve by a factor of at most 1 + 2 exp(-2 pi^2).
    """
    k, d = points.shape
    return GaussianMixture(np.full(k, 1 / k), points, np.tile(noise**2 * np.eye(d), (k, 1, 1)))


def swiss_roll(turns: float = 1.5, noise: float = 0.1) -> GaussianMixture:
    """Returns a spiral from radius 1 to 4 around the origin, with equal mass at equal angles and Gaussian noise."""
    angle = 2 * math.pi * turns * np.linspace(0, 1, 400)
    radius = np.linspace(1, 4, 400)
    return noisy_curve(np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1), noise)


def two_moons(noise: float = 0.15) -> GaussianMixture:
    """Returns two interlocking half circles of radius 2, with Gaussian noise."""
    angle = math.pi * (np.arange(100) + 0.5) / 100
    upper = np.stack([2 * np.cos(angle) - 1, 2 * np.sin(angle) - 0.5], axis=1)
    return noisy_curve(np.concatenate([upper, -upper]), noise)


def far_modes() -> GaussianMixture:
    """Returns two Gaussians of weights 0.2 and 0.8, 14 standard deviations apart ([SE19] Sec. 3.2.2)."""
    return GaussianMixture(np.array([0.2, 0.8]), np.array([[-5.0, -5.0], [5.0, 5.0]]), np.tile(np.eye(2), (2, 1, 1)))


@dataclasses.dataclass(frozen=True)
class Checkerboard:
    """The uniform density on eight squares of side 2, every second square of [-4, 4]^2 ([L22] App. I)."""

    dims = 2
    entropy = math.log(32)

    def sample(self, key: Array, shape: tuple[int, ...]) -> Float[Array, "batch 2"]:
        """Draws independent points of shape (batch, 2)."""
        across_key, up_key, row_key = jax.random.split(key, 3)
        across = 4 * jax.random.uniform(across_key, shape[:1]) - 2
        row = jnp.floor(across) % 2 - 2 * jax.random.bernoulli(row_key, shape=shape[:1])
        return 2 * jnp.stack([across, jax.random.uniform(up_key, shape[:1]) + row], axis=1).reshape(shape)

    def log_density_of_data(self, x: Float[Array, "batch 2"]) -> PerExample:
        """Returns ln q_0(x), in nats: -ln 32 on the squares, -inf elsewhere."""
        cell = jnp.floor(x / 2)
        inside = jnp.all(jnp.abs(cell + 0.5) < 2, axis=1) & (jnp.sum(cell, axis=1) % 2 == 0)
        return jnp.where(inside, jnp.asarray(-self.entropy, x.dtype), -jnp.inf)


DENSITIES: dict[str, Density] = {
    "mixture": paper_mixture(),
    "checkerboard": Checkerboard(),
    "swissroll": swiss_roll(),
    "moons": two_moons(),
    "far_modes": far_modes(),
}
"""Densities by the value of config.data.dataset."""
