"""Coordinates for the probability-flow ODE in which little is left to integrate (ours). Published solves use (x, t).

The coordinates move with the flow of a Gaussian, so that only the difference from that flow is integrated. Let
x_t = alpha x_0 + sigma z, with noise level rho = sigma / alpha. Four steps start from dx/dt = f x - g^2 score / 2.

1. Let u = x / alpha and lambda = ln rho. From g^2 / sigma^2 = 2 dlambda/dt, du/dlambda = -rho^2 score_u(u) for every
   SDE, with score_u = alpha score. So all SDEs here share one ODE.
2. If the data were Gaussian with mean m and standard deviation c, u would be N(m, c^2 + rho^2), and the flow would only
   stretch u - m in proportion to sqrt(c^2 + rho^2). Dividing by this gives y = (u - m) / sqrt(c^2 + rho^2), that is,
   x = alpha m + a y with a = sqrt(alpha^2 c^2 + sigma^2).
3. dy/dlambda = -(sigma / a)^2 (a score(x, t) + y) is the difference between the model's and the Gaussian's score. It is
   exactly 0 for Gaussian data, small where the noise hides the shape of the data, and proportional to rho where the
   noise is small. Its divergence is -(sigma^2 div_x score + sum_i (sigma / a_i)^2), and ln |dx/dy| is sum_i ln a_i.
4. Steps should be short where the data have structure, at noise levels below their scale c. The variable of the solve,
   tau, is uniform in lambda there. Above, steps in lambda become up to five times as long:
   d tau / d lambda = c / (rho + c) + 1/4, so tau = lambda - ln(rho + c) + lambda / 4.

These are identities for every m and c. The values only determine how much is left to integrate, and where.
"""

import dataclasses
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from arrays import Batch, Scalar
from sde_lib import SDE

Dims: TypeAlias = Float[Array, "1 *dims"]
"""One number for each data dimension, shaped to broadcast with a batch."""

TAIL_DENSITY = 0.25
"""d tau / d lambda at large noise."""


class GaussianReference(NamedTuple):
    """The Gaussian whose flow is removed from a solve: mean and standard deviation of the data.

    Both are numbers, or arrays that broadcast against one example. Every choice gives a correct result; the moments of
    the data give the cheapest one.
    """

    mean: float | Float[Array | np.ndarray, "*dims"] = 0.0
    std: float | Float[Array | np.ndarray, "*dims"] = 0.5

    def of_batch(self, x: Batch) -> tuple[Dims, Dims]:
        """Mean and standard deviation, shaped to broadcast with x."""
        mean, std = (jnp.broadcast_to(jnp.asarray(a, x.dtype), x.shape[1:])[None] for a in self)
        return mean, std


@partial(jax.tree_util.register_dataclass, data_fields=["reference", "t_min"], meta_fields=["sde"])
@dataclasses.dataclass(frozen=True)
class ReferencePath:
    """The change from (t, x) to (tau, y) of the module's docstring, for t in [t_min, T]."""

    reference: GaussianReference
    sde: SDE
    t_min: float | Scalar

    def ends(self, dtype: jnp.dtype) -> tuple[Scalar, Scalar]:
        """tau at t_min and at T."""
        first, last = self._log_noise_range(dtype)
        return self._tau(first), self._tau(last)

    def log_noise_level(self, tau: Scalar) -> Scalar:
        """lambda at tau, by interpolation in a table and two steps of Newton's method."""
        table = jnp.linspace(*self._log_noise_range(tau.dtype), 256)
        log_rho = jnp.interp(tau, self._tau(table), table)
        for _ in range(2):
            log_rho += (tau - self._tau(log_rho)) / self.density(log_rho)
        return log_rho

    def time(self, tau: Scalar) -> Scalar:
        """t at tau, clipped to [t_min, T] because of rounding."""
        return jnp.clip(self.sde.time_of_log_noise_level(self.log_noise_level(tau)), self.t_min, self.sde.t_max)

    def density(self, log_rho: Scalar) -> Scalar:
        """d tau / d lambda."""
        scale = self._scale()
        return scale / (jnp.exp(log_rho) + scale) + TAIL_DENSITY

    def _log_noise_range(self, dtype: jnp.dtype) -> tuple[Scalar, Scalar]:
        first, last = (self.sde.log_noise_level(jnp.asarray(t, dtype)) for t in (self.t_min, self.sde.t_max))
        return first, last

    def _tau(self, log_rho: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return (1 + TAIL_DENSITY) * log_rho - jnp.log(jnp.exp(log_rho) + self._scale())

    def _scale(self) -> Scalar:
        """c: the root mean square over dimensions."""
        return jnp.sqrt(jnp.mean(jnp.square(self.reference.std)))

    def moments(self, like: Batch, t: Scalar) -> tuple[Dims, Dims]:
        """alpha m, and a = sqrt(alpha^2 c^2 + sigma^2), of each dimension."""
        alpha, sigma = self.sde.alpha_sigma(t)
        mean, std = self.reference.of_batch(like)
        return alpha * mean, jnp.hypot(alpha * std, sigma)

    def normalize(self, x: Batch, t: Scalar) -> Batch:
        """y at x."""
        mean, scale = self.moments(x, t)
        return (x - mean) / scale

    def unnormalize(self, y: Batch, t: Scalar) -> Batch:
        """x at y."""
        mean, scale = self.moments(y, t)
        return mean + scale * y

    def log_det_jacobian(self, like: Batch, t: Scalar) -> Scalar:
        """ln |dx/dy| of one example, in nats."""
        return jnp.sum(jnp.log(self.moments(like, t)[1]))
