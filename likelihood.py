"""Log-likelihood of data under the probability-flow ODE, and bits per dimension.

The ODE dx/dt = h(x, t) = f x - g^2 score / 2 carries the data's density to the prior, and
ln p(x) = ln prior(x_T) + integral over [t_min, T] of div h along the path from x ([S21a] Eqn. 39, [L22] Eqn. 7).
The data stand for x at t_min; nothing corrects for that here.

The same integral can be taken in other coordinates (the methods named "_log"), where it needs far fewer evaluations.
Three steps lead there; alpha x_0 + sigma z is x_t, rho = sigma / alpha the noise level.

1. u = x / alpha and lambda = ln rho. From g^2 / sigma^2 = 2 dlambda/dt, du/dlambda = -rho^2 score_u(u) for every SDE,
   with score_u = alpha score: all SDEs here are one ODE.
2. Were the data Gaussian with mean m and standard deviation c, u would be N(m, c^2 + rho^2) and its flow would only
   stretch u - m in proportion to sqrt(c^2 + rho^2). Dividing this out, y = (u - m) / sqrt(c^2 + rho^2), that is
   x = alpha m + a y with a = sqrt(alpha^2 c^2 + sigma^2).
3. dy/dlambda = -(sigma / a)^2 (a score(x, t) + y): what the score adds to that Gaussian's. It is exactly 0 for such
   data, small where the noise hides the data's shape, and falls off like rho where the data hide the noise.

The volume of the stretch is known, so div h integrates to sum_i ln(a_i(T) / a_i(t_min)) + integral of div_y dy/dlambda,
where div_y dy/dlambda = -(sigma^2 div_x score + sum_i (sigma / a_i)^2); probes v estimate both terms, by v.J v and v.v.
For any m and c this is an identity; they only decide how much is left to integrate. Without data to fit a Gaussian to,
the middle and spread of the data's range will do.

Sources: [S21a] Song et al., ICLR 2021; [L22] Lu et al., ICML 2022.
"""

import dataclasses
import math
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from arrays import Batch, PerExample, ScoreFn, num_dims
from derivatives import PROBES, Field, exact_divergence, probe_divergence
from ode import Info, as_pytree, integrate
from sde_lib import SDE

Probes: TypeAlias = Float[Array, "k batch *dims"]

Dims: TypeAlias = Float[Array, "1 *dims"]
"""One number for each data dimension, as it combines with a batch."""

State: TypeAlias = tuple[Batch, Float[Array, "batch k"]]
"""Where the examples are, and the integral of the divergence so far."""

METHODS = {
    "dopri5": ("time", "dopri5"),
    "scipy": ("time", "scipy"),
    "rk4": ("time", "rk4"),
    "dopri5_log": ("log_noise", "dopri5"),
    "scipy_log": ("log_noise", "scipy"),
    "rk4_log": ("log_noise", "rk4"),
}
"""By name, the coordinates of the solve and its method in `ode.integrate`."""


class Reference(NamedTuple):
    """The Gaussian whose flow is taken out of the solve: mean and standard deviation of the data.

    Numbers, or arrays that broadcast against one example. Any values give a correct result, good ones a cheap one.
    """

    mean: float | Float[Array | np.ndarray, "*dims"] = 0.0
    std: float | Float[Array | np.ndarray, "*dims"] = 0.5

    def of_batch(self, x: Batch) -> tuple[Dims, Dims]:
        """Mean and standard deviation as they combine with a batch shaped as x."""
        mean, std = (jnp.broadcast_to(jnp.asarray(a, x.dtype), x.shape[1:])[None] for a in self)
        return mean, std


DEFAULT_REFERENCE = Reference()


class LogLikelihood(NamedTuple):
    """Log-density of each example in nats, in its parts."""

    prior_logp: PerExample
    """ln prior(x_T)."""
    divergence_of_probe: Float[Array, "batch k"]
    """The integral of div h along the path, estimated by each of k probes, or exact (k = 1)."""
    latent: Batch
    """x_T."""
    info: Info
    """How the solve went. See `ode.require_success`."""

    @property
    def divergence(self) -> PerExample:
        """The integral of div h along the path, in nats."""
        return jnp.mean(self.divergence_of_probe, axis=1)

    @property
    def logp(self) -> PerExample:
        """ln p(x), in nats."""
        return self.prior_logp + self.divergence

    @property
    def probe_error(self) -> PerExample:
        """Standard error of `logp` from its probes, in nats; NaN for a single probe, of which nothing can be told."""
        k = self.divergence_of_probe.shape[1]
        if k == 1:
            return jnp.full_like(self.prior_logp, jnp.nan)
        return jnp.std(self.divergence_of_probe, axis=1) / math.sqrt(k - 1)


def draw_probes(key: Array, kind: str, shape: tuple[int, ...], num_probes: int = 1) -> Probes | None:
    """Probes of the divergence for a batch of the given shape, or None for kind "exact".

    Raises:
        ValueError: unknown kind.
    """
    if kind == "exact":
        return None
    if kind not in PROBES:
        raise ValueError(f"unknown probe {kind!r}; known: {', '.join((*PROBES, 'exact'))}")
    return PROBES[kind](key, (num_probes, *shape))


def ode_log_likelihood(
    score_fn: ScoreFn,
    sde: SDE,
    x: Batch,
    probes: Probes | None,
    *,
    t_min: float,
    method: str = "dopri5",
    reference: Reference = DEFAULT_REFERENCE,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    num_steps: int = 100,
) -> LogLikelihood:
    """ln p(x) of each example under the probability-flow ODE ([L22] Eqn. 7), in the units of x.

    Can be called under jit (but for the methods of SciPy) and on sharded batches. Called eagerly it compiles its solve
    once, for any parameters of a score function that is a pytree. Matrix products have full precision throughout, not
    the reduced one that accelerators default to.

    Args:
        probes: fixed for the whole solve; the estimate is their mean, unbiased for independent entries of mean 0 and
            variance 1. One evaluation of the field is one of the score with its k derivatives. None: the exact
            divergence, from d derivatives.
        t_min: the time that x is taken to be at.
        method: one of `METHODS`. "scipy" is the published protocol and "dopri5" the same on the device. Adaptive
            methods control an error over the whole batch, so results depend on the batch within the tolerance; in
            float32 they hit rounding noise at tolerances below 1e-6. With the fixed steps of "rk4_log", an example's
            result does not depend on the others.
        reference: of the methods named "_log", see the module's docstring.
        rtol, atol, num_steps: of the adaptive methods, and of the fixed-step ones; see `ode.integrate`.

    Raises:
        ValueError: unknown method; those of `ode.integrate`. A failed solve does not raise; its numbers are not
            likelihoods: pass `info` to `ode.require_success`.
    """
    if method not in METHODS:
        raise ValueError(f"unknown likelihood method {method!r}; known: {', '.join(METHODS)}")
    coordinates, solver = METHODS[method]
    solve = partial(integrate, method=solver, rtol=rtol, atol=atol, num_steps=num_steps)
    nothing = jnp.zeros((x.shape[0], 1 if probes is None else probes.shape[0]), x.dtype)
    with jax.default_matmul_precision("highest"):
        if coordinates == "time":
            field = TimeField(as_pytree(score_fn), probes, sde)
            (latent, divergence), info = solve(field, (x, nothing), t_min, sde.t_max)
        else:
            field = LogNoiseField(as_pytree(score_fn), probes, reference, sde)
            start, end = (sde.log_noise_level(jnp.asarray(t, x.dtype)) for t in (t_min, sde.t_max))
            (y, divergence), info = solve(field, (field.standardize(x, start), nothing), start, end)
            latent = field.restore(y, end)
            divergence += field.log_stretch(x, end) - field.log_stretch(x, start)
            info = info._replace(t=sde.time_of_log_noise_level(info.t))
    return LogLikelihood(sde.prior_logp(latent), divergence, latent, info)


@partial(jax.tree_util.register_dataclass, data_fields=["score_fn", "probes"], meta_fields=["sde"])
@dataclasses.dataclass(frozen=True)
class TimeField:
    """d/dt of (x, integral of div h): the ODE as published."""

    score_fn: ScoreFn
    probes: Probes | None
    sde: SDE

    def __call__(self, t: Float[Array, ""], state: State) -> State:
        x, _ = state
        times = jnp.full(x.shape[:1], t)
        return _with_divergence(lambda x: self.sde.probability_flow(self.score_fn, x, times), x, self.probes)


@partial(jax.tree_util.register_dataclass, data_fields=["score_fn", "probes", "reference"], meta_fields=["sde"])
@dataclasses.dataclass(frozen=True)
class LogNoiseField:
    """d/dlambda of (y, integral of its divergence): the ODE in the coordinates that the module's docstring derives."""

    score_fn: ScoreFn
    probes: Probes | None
    reference: Reference
    sde: SDE

    def __call__(self, log_rho: Float[Array, ""], state: State) -> State:
        y, _ = state
        times = jnp.full(y.shape[:1], self.sde.time_of_log_noise_level(log_rho))
        sigma = self.sde.alpha_sigma(times[0])[1]
        _, scale = self._moments(y, log_rho)
        weight = jnp.square(sigma / scale)
        score, divergence = _with_divergence(partial(self._score_at, times), self.restore(y, log_rho), self.probes)
        # Probed in x, whatever the reference: J is symmetric there, so that nothing varies less.
        known = jnp.sum(weight[None] * self._probe_squares(y), axis=range(2, y.ndim + 1)).T
        return -weight * (scale * score + y), -(sigma**2 * divergence + known)

    def _score_at(self, times: PerExample, x: Batch) -> Batch:
        return self.score_fn(x, times)

    def _probe_squares(self, like: Batch) -> Probes:
        return jnp.ones((1, *like.shape), like.dtype) if self.probes is None else jnp.square(self.probes)

    def standardize(self, x: Batch, log_rho: Float[Array, ""]) -> Batch:
        """y of x."""
        mean, scale = self._moments(x, log_rho)
        return (x - mean) / scale

    def restore(self, y: Batch, log_rho: Float[Array, ""]) -> Batch:
        """x of y."""
        mean, scale = self._moments(y, log_rho)
        return mean + scale * y

    def log_stretch(self, like: Batch, log_rho: Float[Array, ""]) -> Float[Array, ""]:
        """ln |dx/dy| of an example, in nats."""
        return jnp.sum(jnp.log(self._moments(like, log_rho)[1]))

    def _moments(self, like: Batch, log_rho: Float[Array, ""]) -> tuple[Dims, Dims]:
        """alpha m, and a = sqrt(alpha^2 c^2 + sigma^2), of each dimension."""
        alpha, sigma = self.sde.alpha_sigma(self.sde.time_of_log_noise_level(log_rho))
        mean, std = self.reference.of_batch(like)
        return alpha * mean, jnp.hypot(alpha * std, sigma)


def _with_divergence(flow: Field, x: Batch, probes: Probes | None) -> State:
    """A flow and its divergence, [batch, k], exact or along each of k probes."""
    if probes is None:
        value, divergence = exact_divergence(flow, x)
        return value, divergence[:, None]
    return jax.vmap(lambda probe: probe_divergence(flow, x, probe), out_axes=(None, 1))(probes)


class BitsPerDim(NamedTuple):
    """Terms in bits/dim of each example, which add up to `total`, the negative log-likelihood of a discrete image."""

    prior: PerExample
    """-ln prior(x_T)."""
    divergence: PerExample
    """Minus the integral of div h."""
    levels: PerExample
    """log2 of the number of grey levels: from a density on [0, 1] to a probability of one level."""
    scaler: PerExample
    """log2 |dy/dx|, where y in [0, 1] is the image of the network's data x."""

    @property
    def total(self) -> PerExample:
        return self.prior + self.divergence + self.levels + self.scaler


def bits_per_dim(result: LogLikelihood, *, levels: int, unit_scale: float) -> BitsPerDim:
    """Negative log-likelihood in bits/dim of images of `levels` grey levels, dequantized by noise of one level.

    Args:
        unit_scale: dy/dx from the network's data x to y in [0, 1]: 1 for data in [0, 1], 1/2 for data in [-1, 1]. With
            256 levels these add 8 and 7 bits/dim.

    Raises:
        ValueError: fewer than 2 levels, or a scale that is not positive.
    """
    level_bits, scaler_bits = discrete_bits(levels, unit_scale)
    nats = num_dims(result.latent) * math.log(2)
    return BitsPerDim(
        prior=-result.prior_logp / nats,
        divergence=-result.divergence / nats,
        levels=jnp.full_like(result.prior_logp, level_bits),
        scaler=jnp.full_like(result.prior_logp, scaler_bits),
    )


def discrete_bits(levels: int, unit_scale: float) -> tuple[float, float]:
    """Bits/dim from the density of the network's data to the probability of an image: log2(levels), log2(unit_scale).

    Raises:
        ValueError: fewer than 2 levels, or a scale that is not positive.
    """
    if levels < 2 or not unit_scale > 0:
        raise ValueError(f"need levels >= 2 and unit_scale > 0, got {levels} and {unit_scale}")
    return math.log2(levels), math.log2(unit_scale)
