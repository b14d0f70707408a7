"""Log-likelihood of data under the probability-flow ODE, and bits per dimension.

The ODE dx/dt = h(x, t) = f x - g^2 score / 2 carries the density of the data to the prior, and
ln p(x) = ln prior(x_T) + integral over [t_min, T] of div h along the path from x ([S21a] Eqn. 39, [L22] Eqn. 7).
The data are used as x at t_min, without a correction for this.

`published_log_likelihood` solves this as published, in time. `reference_log_likelihood` computes the same integral in
our own coordinates (coordinates.py). They need far fewer evaluations: the contribution of a Gaussian is known in closed
form, and the steps are spread evenly over the noise levels instead of over time. The methods that use them have names
that end in "_log".

Sources: [S21a] Song et al., ICLR 2021; [L22] Lu et al., ICML 2022.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from arrays import Batch, PerExample, ReportProgress, Scalar, ScoreFn, as_pytree
from coordinates import GaussianReference, ReferencePath
from derivatives import PROBES, divergence_estimates
from sde_lib import SDE
from solvers.ode import Info, integrate

Probes: TypeAlias = Float[Array, "k batch *dims"]

State: TypeAlias = tuple[Batch, Float[Array, "batch k"]]
"""The position of each example, and the integral of the divergence so far."""

Solve: TypeAlias = Callable[..., tuple[State, Info]]
"""solve(field, state, start, end): `ode.integrate` with a method and its settings."""

Nats = TypeVar("Nats", Array, np.ndarray)
"""One number for each example, as a jax or NumPy array."""


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
    """Cost and success of the solve. See `Info.require_success`."""

    @property
    def divergence(self) -> PerExample:
        """The integral of div h along the path, in nats."""
        return jnp.mean(self.divergence_estimates, axis=1)

    @property
    def logp(self) -> PerExample:
        """ln p(x), in nats."""
        return self.prior_logp + self.divergence

    @property
    def terms(self) -> dict[str, PerExample]:
        """The terms of -ln p(x), in nats."""
        return {"prior": -self.prior_logp, "divergence": -self.divergence}

    @property
    def probe_error(self) -> PerExample:
        """Standard error of `logp` due to the probes, in nats; NaN for a single probe, which gives no estimate."""
        k = self.divergence_estimates.shape[1]
        if k == 1:
            return jnp.full_like(self.prior_logp, jnp.nan)
        return jnp.std(self.divergence_estimates, axis=1) / math.sqrt(k - 1)


def published_log_likelihood(
    score_fn: ScoreFn, sde: SDE, x: Batch, probes: Probes | None, t_min: float, solve: Solve
) -> LogLikelihood:
    """Integrates x and the change of its log-density together, in time from t_min to T ([L22] Eqn. 7).

    d/dt (x, change) = (h, div h), and ln p(x) = ln prior(x_T) + change. Arguments as in `ode_log_likelihood`.
    """
    field = TimeField(as_pytree(score_fn), probes, sde)
    start, end = jnp.asarray(t_min, x.dtype), jnp.asarray(sde.t_max, x.dtype)
    with jax.default_matmul_precision("highest"):
        (latent, change), info = solve(field, (x, _zeros(x, probes)), start, end)
    prior_logp, error = _prior_and_error(sde.prior_logp, latent, info.error_estimate)
    return LogLikelihood(prior_logp, change, latent, error, info._replace(error_estimate=None))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["score_fn", "probes"], meta_fields=["sde"])
@dataclasses.dataclass(frozen=True)
class TimeField:
    """d/dt of (x, integral of div h): the ODE as published."""

    score_fn: ScoreFn
    probes: Probes | None
    sde: SDE

    def __call__(self, t: Float[Array, ""], state: State) -> State:
        x, _ = state
        times = jnp.full(x.shape[:1], t)
        return divergence_estimates(lambda x: self.sde.probability_flow(self.score_fn, x, times), x, self.probes)


def _zeros(x: Batch, probes: Probes | None) -> Float[Array, "batch k"]:
    """The integral of the divergence at the start, for each probe."""
    return jnp.zeros((x.shape[0], 1 if probes is None else probes.shape[0]), x.dtype)


def _prior_and_error(
    prior_logp: Callable[[Batch], PerExample], y: Batch, error_estimate: State | None
) -> tuple[PerExample, PerExample]:
    """Returns the log-density of the prior at the end of a solve, and the estimated error of the likelihood."""
    if error_estimate is None:
        return prior_logp(y), jnp.full(y.shape[:1], jnp.nan, y.dtype)
    state_error, divergence_error = error_estimate
    value, change = jax.jvp(prior_logp, (y,), (state_error,))
    return value, change + jnp.mean(divergence_error, axis=1)


# The same likelihood in the coordinates of coordinates.py.


def reference_log_likelihood(
    score_fn: ScoreFn,
    sde: SDE,
    x: Batch,
    probes: Probes | None,
    t_min: float,
    solve: Solve,
    reference: GaussianReference,
) -> LogLikelihood:
    """Integrates y and the change of its log-density in tau, and converts both to x and t at the ends.

    Arguments as in `ode_log_likelihood`.
    """
    path = ReferencePath(reference, sde, t_min)
    field = ReferenceField(as_pytree(score_fn), probes, path)
    y, ends = _in_reference_coordinates(path, x)
    with jax.default_matmul_precision("highest"):
        (y, change), info = solve(field, (y, _zeros(x, probes)), *ends)
    return _in_data_coordinates(path, y, change, info)


@jax.jit
def _in_reference_coordinates(path: ReferencePath, x: Batch) -> tuple[Batch, tuple[Scalar, Scalar]]:
    """The start of a solve, x at t_min, and its interval. One program: op by op, XLA would compile dozens."""
    return path.normalize(x, jnp.asarray(path.t_min, x.dtype)), path.ends(x.dtype)


@jax.jit
def _in_data_coordinates(path: ReferencePath, y: Batch, change: Float[Array, "batch k"], info: Info) -> LogLikelihood:
    """The result of a solve that ended at y, in terms of x and t."""
    sde = path.sde
    first, last = (jnp.asarray(t, y.dtype) for t in (path.t_min, sde.t_max))
    change += path.log_det_jacobian(y, last) - path.log_det_jacobian(y, first)
    prior_logp, error = _prior_and_error(lambda y: sde.prior_logp(path.unnormalize(y, last)), y, info.error_estimate)
    info = info._replace(t=path.time(info.t), error_estimate=None)
    return LogLikelihood(prior_logp, change, path.unnormalize(y, last), error, info)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["score_fn", "probes", "path"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class ReferenceField:
    """d/dtau of (y, integral of its divergence): the ODE relative to that of a Gaussian, derived in coordinates.py."""

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
        # The probes act in x for every reference. The Jacobian of a true score is symmetric there, and no other
        # coordinates would give the estimate a smaller variance.
        known = jnp.sum(weight[None] * self._probe_squares(y), axis=range(2, y.ndim + 1)).T
        return -weight * (scale * score + y), -(rate * sigma**2 * divergence + known)

    def _probe_squares(self, like: Batch) -> Probes:
        return jnp.ones((1, *like.shape), like.dtype) if self.probes is None else jnp.square(self.probes)


# The choice of a method by name.


class Method(NamedTuple):
    """The coordinates and the ODE method with which a likelihood is computed."""

    coordinates: str
    """"time", as published, or "reference", our coordinates."""
    solver: str
    """The method of `ode.integrate`."""


METHODS = {
    "dopri5": Method("time", "dopri5"),
    "scipy": Method("time", "scipy"),
    "rk4": Method("time", "rk4"),
    "dopri5_log": Method("reference", "dopri5"),
    "scipy_log": Method("reference", "scipy"),
    "rk4_log": Method("reference", "rk4"),
    "adams_log": Method("reference", "adams"),
}

DEFAULT_REFERENCE = GaussianReference()


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
    progress: ReportProgress | None = None,
) -> LogLikelihood:
    """Computes ln p(x) of each example under the probability-flow ODE by the named method.

    Can be called under jit (except for the methods of SciPy) and on sharded batches. An eager call compiles its solve
    once. Calls with other parameters compile nothing if the score function is a pytree. Matrix products always have
    full precision, although accelerators reduce it by default.

    Args:
        probes: fixed for the whole solve. The estimate is the mean over probes. It is unbiased if the entries are
            independent with mean 0 and variance 1. One evaluation of the field evaluates the score and k derivatives.
            None: the exact divergence, from d derivatives.
        t_min: the time at which the data are x.
        method: one of `METHODS`. "scipy" is the published protocol and "dopri5" the same on the device. Adaptive
            methods control an error over the whole batch, so results depend on the batch within the tolerance. In
            float32 they reach rounding noise at tolerances below 1e-6. With the fixed steps of "rk4_log" and
            "adams_log", the result of an example does not depend on the others, and has an estimate of its error.
            For the same number of evaluations, "adams_log" is the most accurate if the network is rough in time.
        reference: for the methods whose names end in "_log"; see coordinates.py.
        rtol, atol: tolerances of the adaptive methods; see `ode.integrate`.
        num_steps: for the fixed-step methods; see `ode.integrate`.
        progress: called between parts of the solve; see `ode.integrate`.

    Raises:
        ValueError: unknown method, or as in `ode.integrate`. A failed solve does not raise, but its numbers are not
            likelihoods: call `info.require_success()`.
    """
    if method not in METHODS:
        raise ValueError(f"unknown likelihood method {method!r}; known: {', '.join(METHODS)}")
    coordinates, solver = METHODS[method]
    settings = {"rtol": rtol, "atol": atol, "num_steps": num_steps, "progress": progress}
    solve = functools.partial(integrate, method=solver, **settings)
    if coordinates == "time":
        return published_log_likelihood(score_fn, sde, x, probes, t_min, solve)
    return reference_log_likelihood(score_fn, sde, x, probes, t_min, solve, reference)


PROBE_KINDS = (*PROBES, "exact")
"""Kinds of probes of the divergence, and "exact" for the divergence itself."""


def draw_probes(
    key: Array, kind: str, shape: tuple[int, ...], num_probes: int = 1
) -> Float[Array, "{num_probes} *shape"] | None:
    """Draws probes of the divergence for a batch of the given shape; returns None for kind "exact".

    Raises:
        ValueError: unknown kind.
    """
    if kind == "exact":
        return None
    if kind not in PROBES:
        raise ValueError(f"unknown probe {kind!r}; known: {', '.join(PROBE_KINDS)}")
    return PROBES[kind](key, (num_probes, *shape))


# Bits per dimension.


def bits_per_dim(
    nats: Mapping[str, Nats],
    *,
    num_dims: int,
    levels: int,
    unit_scale: float,
    importance_sampling: Nats | None = None,
) -> dict[str, Nats]:
    """Converts the negative log-density of dequantized images to bits/dim of the discrete images.

    Works alike on jax arrays, also under jit, and on NumPy arrays, whose precision it keeps.

    Args:
        nats: the terms of -ln p(x) of each example, in nats, where x has noise of the width of one level. A density q
            of the noise adds the term ln q.
        num_dims: the number of dimensions of one example.
        levels: grey levels in the range [0, 1] of pixel values.
        unit_scale: dy/dx from the network's data x to y in [0, 1]: 1 for data in [0, 1], 1/2 for data in [-1, 1]. With
            256 levels the two constants add up to 8 and 7 bits/dim.
        importance_sampling: the change, in nats, from the mean over several draws of the noise to their average inside
            the logarithm.

    Returns:
        The same terms in bits/dim; `levels`, log2 of the number of levels, which turns a density on [0, 1] into the
        probability of one level; `scaler`, log2 |dy/dx|; `importance_sampling` if given; and their sum, `bpd`.

    Raises:
        ValueError: no level, or a scale that is not positive.
    """
    if levels < 1 or not unit_scale > 0:
        raise ValueError(f"need levels >= 1 and unit_scale > 0, got {levels} and {unit_scale}")
    bits = {name: to_bits_per_dim(term, num_dims) for name, term in nats.items()}
    like = next(iter(bits.values()))
    full_like: Any = jnp.full_like if isinstance(like, jax.Array) else np.full_like
    bits |= {"levels": full_like(like, math.log2(levels)), "scaler": full_like(like, math.log2(unit_scale))}
    if importance_sampling is not None:
        bits["importance_sampling"] = to_bits_per_dim(importance_sampling, num_dims)
    total: Any = sum(bits.values())
    return bits | {"bpd": total}


def to_bits_per_dim(nats: Nats, num_dims: int) -> Nats:
    """Converts nats to bits/dim."""
    return nats / (num_dims * math.log(2))
