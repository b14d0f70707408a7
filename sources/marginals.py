"""Densities q_t of x_t = alpha x_0 + sigma z that are known in closed form at every time t of an SDE.

Gaussian mixtures have them (densities.py). So do uniform densities on boxes: noise turns each box into a product of
differences of normal distribution functions.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr
from jaxtyping import Array, Float

from arrays import Batch, PerExample, append_dims
from sde_lib import SDE
from sources.densities import Checkerboard, Density, GaussianMixture


@runtime_checkable
class Marginals(Protocol):
    """The density of noisy data at every time of an SDE."""

    def log_density(self, sde: SDE, x: Batch, t: PerExample) -> PerExample:
        """Returns ln q_t(x), in nats."""
        ...

    def score(self, sde: SDE, x: Batch, t: PerExample) -> Batch:
        """Returns grad_x ln q_t(x)."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class BoxMarginals:
    """The marginals of a density that is uniform on k boxes of equal mass."""

    lower: Float[np.ndarray, "k d"]
    upper: Float[np.ndarray, "k d"]

    def log_density(self, sde: SDE, x: Batch, t: PerExample) -> PerExample:
        """Returns ln q_t(x), in nats."""
        return jax.nn.logsumexp(self._boxes(sde, x, t)[0], axis=1) - math.log(len(self.lower))

    def score(self, sde: SDE, x: Batch, t: PerExample) -> Batch:
        """Returns grad_x ln q_t(x)."""
        log_densities, scores = self._boxes(sde, x, t)
        return jnp.sum(jax.nn.softmax(log_densities, axis=1)[..., None] * scores, axis=1)

    def _boxes(self, sde: SDE, x: Batch, t: PerExample) -> tuple[Array, Array]:
        """Returns ln q_t [batch, k] and its gradient [batch, k, d] for each box alone."""
        alpha, sigma = (a[:, None, None] for a in sde.alpha_sigma(t))
        below = (alpha * jnp.asarray(self.lower, x.dtype)[None] - x[:, None]) / sigma
        above = (alpha * jnp.asarray(self.upper, x.dtype)[None] - x[:, None]) / sigma
        log_mass = log_normal_mass(below, above)
        volume = jnp.asarray(np.sum(np.log(self.upper - self.lower), axis=1), x.dtype)[None]
        log_density = jnp.sum(log_mass - jnp.log(alpha), axis=2) - volume
        at_below, at_above = (jnp.exp(-0.5 * z**2 - 0.5 * math.log(2 * math.pi) - log_mass) for z in (below, above))
        return log_density, (at_below - at_above) / sigma


def log_normal_mass(below: Float[Array, "*shape"], above: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns ln P(below < z < above) for a standard normal z, accurate far out in both tails, too."""
    # Bounds in the upper tail are mirrored to the lower tail, where log_ndtr is accurate.
    flip = below + above > 0
    low, high = jnp.where(flip, -above, below), jnp.where(flip, -below, above)
    log_high = log_ndtr(high)
    return log_high + jnp.log(-jnp.expm1(log_ndtr(low) - log_high))


def marginals_of(density: Density) -> Marginals | None:
    """Returns q_t of a density of data; None if it is not known."""
    if isinstance(density, GaussianMixture):
        return density
    if isinstance(density, Checkerboard):
        corners = np.array([(i, j) for i in range(-2, 2) for j in range(-2, 2) if (i + j) % 2 == 0], np.float64)
        return BoxMarginals(2 * corners, 2 * corners + 2)
    return None


def sample_at(density: Density, sde: SDE, key: Array, t: PerExample) -> Float[Array, "batch d"]:
    """Draws independent points of q_t, one for each time."""
    data_key, noise_key = jax.random.split(key)
    mean, sigma = sde.marginal(density.sample(data_key, (len(t), density.dims)).astype(t.dtype), t)
    return mean + append_dims(sigma, mean) * jax.random.normal(noise_key, mean.shape, t.dtype)
