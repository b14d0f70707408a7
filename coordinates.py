"""Coordinates for the probability-flow ODE: time, or those beside the flow of a Gaussian, where little is left of it.

alpha x_0 + sigma z is x_t, rho = sigma / alpha its noise level. Four steps lead there from dx/dt = f x - g^2 score / 2.

1. u = x / alpha and lambda = ln rho. From g^2 / sigma^2 = 2 dlambda/dt, du/dlambda = -rho^2 score_u(u) for every SDE,
   with score_u = alpha score: all SDEs here are one ODE.
2. Were the data Gaussian with mean m and standard deviation c, u would be N(m, c^2 + rho^2) and its flow would only
   stretch u - m in proportion to sqrt(c^2 + rho^2). Dividing this out, y = (u - m) / sqrt(c^2 + rho^2), that is
   x = alpha m + a y with a = sqrt(alpha^2 c^2 + sigma^2).
3. dy/dlambda = -(sigma / a)^2 (a score(x, t) + y): what the score adds to that Gaussian's. It is exactly 0 for such
   data, small where the noise hides the data's shape, and falls off like rho where the data hide the noise.
   Its divergence is -(sigma^2 div_x score + sum_i (sigma / a_i)^2), and ln |dx/dy| is sum_i ln a_i.
4. Steps belong where the data have structure, at noise below their scale c. There tau, the variable of the solve, is
   even in lambda; above, its steps grow like rho up to five times as long: d tau / d lambda = c / (rho + c) + 1/4,
   tau = lambda - ln(rho + c) + lambda / 4.

For any m and c these are identities; they only decide how much is left to integrate, and where.
"""

import dataclasses
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from arrays import Batch
from sde_lib import SDE

Scalar: TypeAlias = Float[Array, ""]

Dims: TypeAlias = Float[Array, "1 *dims"]
"""One number for each data dimension, as it combines with a batch."""

TAIL_DENSITY = 0.25
"""d tau / d lambda where noise hides the data."""


class GaussianReference(NamedTuple):
    """The Gaussian whose flow is taken out of a solve: mean and standard deviation of the data.

    Numbers, or arrays that broadcast against one example. Any values give a correct result, good ones a cheap one.
    """

    mean: float | Float[Array | np.ndarray, "*dims"] = 0.0
    std: float | Float[Array | np.ndarray, "*dims"] = 0.5

    def of_batch(self, x: Batch) -> tuple[Dims, Dims]:
        """Mean and standard deviation as they combine with a batch shaped as x."""
        mean, std = (jnp.broadcast_to(jnp.asarray(a, x.dtype), x.shape[1:])[None] for a in self)
        return mean, std


@dataclasses.dataclass(frozen=True)
class TimePath:
    """No change of coordinates: t and x themselves, for t in [t_min, T]."""

    sde: SDE
    t_min: float

    def ends(self, dtype: jnp.dtype) -> tuple[Scalar, Scalar]:
        return jnp.asarray(self.t_min, dtype), jnp.asarray(self.sde.t_max, dtype)

    def time(self, tau: Scalar) -> Scalar:
        return tau

    def normalize(self, x: Batch, t: Scalar) -> Batch:
        del t
        return x

    def unnormalize(self, y: Batch, t: Scalar) -> Batch:
        del t
        return y

    def log_det_jacobian(self, like: Batch, t: Scalar) -> Scalar:
        del t
        return jnp.zeros((), like.dtype)


@partial(jax.tree_util.register_dataclass, data_fields=["reference"], meta_fields=["sde", "t_min"])
@dataclasses.dataclass(frozen=True)
class ReferencePath:
    """The change from (t, x) to (tau, y) of the module's docstring, for t in [t_min, T]."""

    reference: GaussianReference
    sde: SDE
    t_min: float

    def ends(self, dtype: jnp.dtype) -> tuple[Scalar, Scalar]:
        """tau at t_min and at T."""
        first, last = self._log_noise_range(dtype)
        return self._tau(first), self._tau(last)

    def log_noise_level(self, tau: Scalar) -> Scalar:
        """lambda, by interpolation in a table and two steps of Newton's method."""
        table = jnp.linspace(*self._log_noise_range(tau.dtype), 256)
        log_rho = jnp.interp(tau, self._tau(table), table)
        for _ in range(2):
            log_rho += (tau - self._tau(log_rho)) / self.density(log_rho)
        return log_rho

    def time(self, tau: Scalar) -> Scalar:
        """t, kept within [t_min, T] in spite of rounding."""
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
        """One c for all dimensions."""
        return jnp.sqrt(jnp.mean(jnp.square(self.reference.std)))

    def moments(self, like: Batch, t: Scalar) -> tuple[Dims, Dims]:
        """alpha m, and a = sqrt(alpha^2 c^2 + sigma^2), of each dimension."""
        alpha, sigma = self.sde.alpha_sigma(t)
        mean, std = self.reference.of_batch(like)
        return alpha * mean, jnp.hypot(alpha * std, sigma)

    def normalize(self, x: Batch, t: Scalar) -> Batch:
        """y of x."""
        mean, scale = self.moments(x, t)
        return (x - mean) / scale

    def unnormalize(self, y: Batch, t: Scalar) -> Batch:
        """x of y."""
        mean, scale = self.moments(y, t)
        return mean + scale * y

    def log_det_jacobian(self, like: Batch, t: Scalar) -> Scalar:
        """ln |dx/dy| of an example, in nats."""
        return jnp.sum(jnp.log(self.moments(like, t)[1]))
