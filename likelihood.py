"""Log-likelihood of data under the probability-flow ODE, and bits per dimension.

The ODE dx/dt = h(x, t) = f x - g^2 score / 2 carries the data's density to the prior, and
ln p(x) = ln prior(x_T) + integral over [t_min, T] of div h along the path from x ([S21a] Eqn. 39, [L22] Eqn. 7).
The data stand for x at t_min; nothing corrects for that here.

The methods named "_log" take the same integral in the coordinates of coordinates.py, where a Gaussian's part of it is
known and the steps are spread over the noise levels evenly, not over time. They need far fewer evaluations.

Sources: [S21a] Song et al., ICLR 2021; [L22] Lu et al., ICML 2022.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from arrays import Batch, PerExample, ScoreFn, num_dims
from coordinates import GaussianReference, ReferencePath, TimePath
from derivatives import PROBES, divergence_estimates
from ode import Info, as_pytree, integrate
from sde_lib import SDE

Probes: TypeAlias = Float[Array, "k batch *dims"]

State: TypeAlias = tuple[Batch, Float[Array, "batch k"]]
"""Where the examples are, and the integral of the divergence so far."""

METHODS = {
    "dopri5": ("time", "dopri5"),
    "scipy": ("time", "scipy"),
    "rk4": ("time", "rk4"),
    "dopri5_log": ("reference", "dopri5"),
    "scipy_log": ("reference", "scipy"),
    "rk4_log": ("reference", "rk4"),
    "adams_log": ("reference", "adams"),
}
"""By name, the coordinates of the solve and its method in `ode.integrate`."""

DEFAULT_REFERENCE = GaussianReference()


class LogLikelihood(NamedTuple):
    """Log-density of each example in nats, in its parts."""

    prior_logp: PerExample
    """ln prior(x_T)."""
    divergence_estimates: Float[Array, "batch k"]
    """The integral of div h along the path, estimated by each of k probes, or exact (k = 1)."""
    latent: Batch
    """x_T."""
    solver_error: PerExample
    """Estimate of the solver's error of `logp`, with its sign, in nats (see `ode.Info.error_estimate`).

    NaN for adaptive methods. The mean over many examples estimates the bias."""
    info: Info
    """How the solve went. See `ode.require_success`."""

    @property
    def divergence(self) -> PerExample:
        """The integral of div h along the path, in nats."""
        return jnp.mean(self.divergence_estimates, axis=1)

    @property
    def logp(self) -> PerExample:
        """ln p(x), in nats."""
        return self.prior_logp + self.divergence

    @property
    def probe_error(self) -> PerExample:
        """Standard error of `logp` from its probes, in nats; NaN for a single probe, of which nothing can be told."""
        k = self.divergence_estimates.shape[1]
        if k == 1:
            return jnp.full_like(self.prior_logp, jnp.nan)
        return jnp.std(self.divergence_estimates, axis=1) / math.sqrt(k - 1)


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
    reference: GaussianReference = DEFAULT_REFERENCE,
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
            float32 they hit rounding noise at tolerances below 1e-6. With the fixed steps of "rk4_log" and "adams_log"
            an example's result does not depend on the others, and comes with an estimate of its error; "adams_log" has
            the most accuracy for its evaluations where the network is rough in time.
        reference: of the methods named "_log", see coordinates.py.
        rtol, atol, num_steps: of the adaptive methods, and of the fixed-step ones; see `ode.integrate`.

    Raises:
        ValueError: unknown method; those of `ode.integrate`. A failed solve does not raise; its numbers are not
            likelihoods: pass `info` to `ode.require_success`.
    """
    if method not in METHODS:
        raise ValueError(f"unknown likelihood method {method!r}; known: {', '.join(METHODS)}")
    coordinates, solver = METHODS[method]
    score_fn = as_pytree(score_fn)
    if coordinates == "time":
        field = TimeField(score_fn, probes, TimePath(sde, t_min))
    else:
        field = ReferenceField(score_fn, probes, ReferencePath(reference, sde, t_min))
    solve = partial(integrate, method=solver, rtol=rtol, atol=atol, num_steps=num_steps)
    nothing = jnp.zeros((x.shape[0], 1 if probes is None else probes.shape[0]), x.dtype)
    path, (first, last) = field.path, (jnp.asarray(t, x.dtype) for t in (t_min, sde.t_max))
    with jax.default_matmul_precision("highest"):
        (y, divergence), info = solve(field, (path.normalize(x, first), nothing), *path.ends(x.dtype))
    divergence += path.log_det_jacobian(x, last) - path.log_det_jacobian(x, first)
    prior_logp, error = _prior_and_error(lambda y: sde.prior_logp(path.unnormalize(y, last)), y, info.error_estimate)
    info = info._replace(t=path.time(info.t), error_estimate=None)
    return LogLikelihood(prior_logp, divergence, path.unnormalize(y, last), error, info)


def _prior_and_error(
    prior_logp: Callable[[Batch], PerExample], y: Batch, error_estimate: State | None
) -> tuple[PerExample, PerExample]:
    """The prior's log-density at the end of a solve, and the estimated error of the likelihood."""
    if error_estimate is None:
        return prior_logp(y), jnp.full(y.shape[:1], jnp.nan, y.dtype)
    of_state, of_divergence = error_estimate
    value, change = jax.jvp(prior_logp, (y,), (of_state,))
    return value, change + jnp.mean(of_divergence, axis=1)


@partial(jax.tree_util.register_dataclass, data_fields=["score_fn", "probes"], meta_fields=["path"])
@dataclasses.dataclass(frozen=True)
class TimeField:
    """d/dt of (x, integral of div h): the ODE as published."""

    score_fn: ScoreFn
    probes: Probes | None
    path: TimePath

    def __call__(self, t: Float[Array, ""], state: State) -> State:
        x, _ = state
        times = jnp.full(x.shape[:1], t)
        return divergence_estimates(lambda x: self.path.sde.probability_flow(self.score_fn, x, times), x, self.probes)


@partial(jax.tree_util.register_dataclass, data_fields=["score_fn", "probes", "path"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class ReferenceField:
    """d/dtau of (y, integral of its divergence): the ODE beside a Gaussian's, as coordinates.py derives it."""

    score_fn: ScoreFn
    probes: Probes | None
    path: ReferencePath

    def __call__(self, tau: Float[Array, ""], state: State) -> State:
        y, _ = state
        t, rate = self.path.time(tau), 1 / self.path.density(self.path.log_noise_level(tau))
        sigma, (_, scale) = self.path.sde.alpha_sigma(t)[1], self.path.moments(y, t)
        weight = rate * jnp.square(sigma / scale)
        x, times = self.path.unnormalize(y, t), jnp.full(y.shape[:1], t)
        score, divergence = divergence_estimates(lambda x: self.score_fn(x, times), x, self.probes)
        # Probed in x, whatever the reference: J is symmetric there for a true score, so that nothing varies less.
        known = jnp.sum(weight[None] * self._probe_squares(y), axis=range(2, y.ndim + 1)).T
        return -weight * (scale * score + y), -(rate * sigma**2 * divergence + known)

    def _probe_squares(self, like: Batch) -> Probes:
        return jnp.ones((1, *like.shape), like.dtype) if self.probes is None else jnp.square(self.probes)


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
        ValueError: no level, or a scale that is not positive.
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
        ValueError: no level, or a scale that is not positive.
    """
    if levels < 1 or not unit_scale > 0:
        raise ValueError(f"need levels >= 1 and unit_scale > 0, got {levels} and {unit_scale}")
    return math.log2(levels), math.log2(unit_scale)
