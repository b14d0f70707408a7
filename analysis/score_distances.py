"""Distances between the scores of a model, of the density of its ODE, and of the data, and the KL identity.

Let q_t be the density of x_t for the data, p_t the density of the ODE, and s the score of the model. There are three
distances in nats per unit of time, each g^2 / 2 times an expectation over q_t ([L22] Fig. 3 and 7):

    score_matching  |s - grad ln q_t|^2             minimised by first-order score matching
    fisher          |grad ln p_t - grad ln q_t|^2   needed for a bound on the likelihood
    difference      |s - grad ln p_t|^2             does not need grad ln q_t, so that it can be computed for images

Theorem 3.1 of [L22], for q and p at t_min and at T:

    KL(q_min || p_min) = KL(q_T || p_T) + integral of g^2 / 2 E[(s - grad ln q_t) . (grad ln p_t - grad ln q_t)] dt.

With e = s - grad ln q, the second and third order of score matching reduce the errors of the Jacobian of s and of the
gradient of its trace. All three are integrals over ln(sigma / alpha) of squares in units of the noise:

    score_matching  sigma^2 |e|^2         second  sigma^4 |grad e|_F^2         third  sigma^6 |grad tr grad e|^2

Along a path of the data's ODE, r = grad ln p_t - grad ln q_t obeys

    dr/dt + (grad h)^T r = g^2 / 2 (grad tr grad e + (grad e)^T grad ln q_t + (grad^2 ln p_t) e),

so these three terms, the `sources`, drive the score of the ODE away from the score of the data. Theorem 3.2 of [L22]
bounds l_Fisher by limits for |e|, |grad e|, |grad tr grad e| and |grad^2 ln p_t|, which are the factors of the sources.

Sources: [L22] Lu et al., ICML 2022.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float

from analysis.ode_score import OdeScore, ode_score, return_error
from arrays import Batch, PerExample, ScoreFn, append_dims, as_pytree, inner
from derivatives import exact_trace_gradient
from evaluation import MeanEstimate, mean_estimate
from likelihood import Probes, ode_log_likelihood
from sde_lib import SDE
from sources.marginals import Marginals

MOST_RETURN_ERROR = 0.1
"""The distance from its start, in units of the noise, at which the end of a path is taken to be another point."""

Sampler: TypeAlias = Callable[[PerExample], Batch]
"""Draws a point of q_t for each of the given times; equal times give equal points."""


class Distances(NamedTuple):
    """g^2 / 2 times products of differences of scores, for each point, in nats per unit of time.

    Without the score of the data, all except `difference` are None.
    """

    difference: PerExample
    """|s - grad ln p|^2, the integrand of l_Diff."""
    score_matching: PerExample | None = None
    """|s - grad ln q|^2, the integrand of l_SM."""
    fisher: PerExample | None = None
    """|grad ln p - grad ln q|^2, the integrand of l_Fisher."""
    cross: PerExample | None = None
    """(s - grad ln q) . (grad ln p - grad ln q), the integrand of Theorem 3.1."""
    returned: PerExample | None = None
    """The distance from x at which the path of the solve ends, in units of the noise (ode_score.return_error)."""


@partial(jax.jit, static_argnames="sde")
def _distances(
    score: Batch, of_ode: OdeScore, of_data: Batch | None, t: PerExample, x: Batch, *, sde: SDE
) -> Distances:
    weight, returned = 0.5 * sde.diffusion(t) ** 2, return_error(sde, x, t, of_ode.returned)
    difference = weight * inner(score - of_ode.score, score - of_ode.score)
    if of_data is None:
        return Distances(difference, returned=returned)
    model, ode = score - of_data, of_ode.score - of_data
    score_matching, fisher, cross = (weight * inner(a, b) for a, b in ((model, model), (ode, ode), (model, ode)))
    return Distances(difference, score_matching, fisher, cross, returned)


def distances(
    score_fn: ScoreFn,
    sde: SDE,
    x: Batch,
    t: PerExample,
    probes: Probes | None = None,
    *,
    data_score: ScoreFn | None = None,
    rtol: float = 1e-6,
    atol: float = 1e-6,
) -> Distances:
    """Computes the distances at points x of q_t, each at its own time. [L22] Fig. 3 shows their means over q_t.

    With probes, grad ln p is an unbiased estimate, and so is `cross`. `difference` and `fisher` are too large by the
    variance of that estimate.

    Raises:
        RuntimeError: if a solve fails.
    """
    of_ode = ode_score(score_fn, sde, x, t, probes, rtol=rtol, atol=atol)
    of_ode.info.require_success()
    of_data = None if data_score is None else _evaluate(as_pytree(data_score), x, t)
    values = _distances(_evaluate(as_pytree(score_fn), x, t), of_ode, of_data, t, x, sde=sde)
    if (lost := float(np.mean(np.asarray(values.returned) > MOST_RETURN_ERROR))) > 0:
        logging.warning(
            "The paths of %.2g of the points do not return to them within %g of the noise: the distances there are "
            "wrong; use smaller tolerances",
            lost,
            MOST_RETURN_ERROR,
        )
    return values


@jax.jit
def _evaluate(score_fn: ScoreFn, x: Batch, t: PerExample) -> Batch:
    with jax.default_matmul_precision("highest"):
        return score_fn(x, t)


class OrderErrors(NamedTuple):
    """Errors of the Jacobian of the score and of the gradient of its trace, in nats per unit of time."""

    second: PerExample
    """g^2 sigma^2 / 2 |grad e|_F^2."""
    third: PerExample
    """g^2 sigma^4 / 2 |grad tr grad e|^2."""


@partial(jax.jit, static_argnames="sde")
def order_errors(score_fn: ScoreFn, data_score: ScoreFn, x: Batch, t: PerExample, *, sde: SDE) -> OrderErrors:
    """Computes the errors of second and third order at points x of q_t, each at its own time, for few dimensions.

    Args:
        score_fn, data_score: pytrees (arrays.as_pytree).
    """
    _, jacobian, trace_gradient = _error_derivatives(score_fn, data_score, x, t)
    g, sigma = sde.diffusion(t), sde.alpha_sigma(t)[1]
    square = jnp.sum(jacobian**2, axis=(1, 2))
    return OrderErrors(
        0.5 * (g * sigma) ** 2 * square, 0.5 * (g * sigma**2) ** 2 * inner(trace_gradient, trace_gradient)
    )


def _error_derivatives(
    score_fn: ScoreFn, data_score: ScoreFn, x: Batch, t: PerExample
) -> tuple[Batch, Float[Array, "batch d d"], Batch]:
    """Returns e, its Jacobian, and the gradient of the Jacobian's trace."""
    with jax.default_matmul_precision("highest"):
        return exact_trace_gradient(lambda x: score_fn(x, t) - data_score(x, t), x)


class ErrorSources(NamedTuple):
    """The norms of the three terms of dr/dt + (grad h)^T r for each point, times sigma^3 dt / (g^2 / 2 dt).

    They have no unit: integrals over ln(sigma / alpha) give changes of sigma r.
    """

    first: PerExample
    """sigma^3 |(grad^2 ln p_t) e|."""
    second: PerExample
    """sigma^3 |(grad e)^T grad ln q_t|."""
    third: PerExample
    """sigma^3 |grad tr grad e|."""


STEP = 0.01
"""The step of the central difference of grad ln p_t, in units of the noise."""


def error_sources(
    score_fn: ScoreFn,
    data_score: ScoreFn,
    sde: SDE,
    x: Batch,
    t: PerExample,
    *,
    rtol: float = 1e-6,
    atol: float = 1e-6,
) -> ErrorSources:
    """Computes the errors of the ODE's score against the data's score, by source, at x from q_t ([L22] Theorem 3.2).

    grad^2 ln p_t along e is a central difference of `ode_score` over `STEP` times the noise.

    Raises:
        RuntimeError: if a solve fails.
    """
    score_fn, data_score = as_pytree(score_fn), as_pytree(data_score)
    points, vectors = _source_vectors(score_fn, data_score, x, t, sde=sde)
    result = ode_score(score_fn, sde, points, jnp.tile(t, 2), rtol=rtol, atol=atol)
    result.info.require_success()
    return _error_sources(result.score, vectors, t, sde=sde)


@partial(jax.jit, static_argnames="sde")
def _source_vectors(
    score_fn: ScoreFn, data_score: ScoreFn, x: Batch, t: PerExample, *, sde: SDE
) -> tuple[Float[Array, "points *dims"], tuple[Batch, Batch, Batch]]:
    """Returns the points ahead of x and behind it along e; and e, (grad e)^T grad ln q and grad tr grad e at x."""
    error, jacobian, trace_gradient = _error_derivatives(score_fn, data_score, x, t)
    along = jnp.einsum("bij,bi->bj", jacobian, data_score(x, t).reshape(len(x), -1)).reshape(x.shape)
    size, sigma = append_dims(jnp.sqrt(inner(error, error)), x), append_dims(sde.alpha_sigma(t)[1], x)
    direction = STEP * sigma * error / jnp.maximum(size, jnp.finfo(x.dtype).tiny)
    return jnp.concatenate([x + direction, x - direction]), (error, along, trace_gradient)


@partial(jax.jit, static_argnames="sde")
def _error_sources(
    of_ode: Float[Array, "points *dims"], vectors: tuple[Batch, Batch, Batch], t: PerExample, *, sde: SDE
) -> ErrorSources:
    """Args: of_ode: the ODE's score at the points of `_source_vectors`."""
    error, second, third = vectors
    size, sigma = append_dims(jnp.sqrt(inner(error, error)), error), append_dims(sde.alpha_sigma(t)[1], error)
    ahead, behind = jnp.split(of_ode, 2)
    first = size * (ahead - behind) / (2 * STEP * sigma)
    return ErrorSources(*(jnp.ravel(sigma) ** 3 * jnp.sqrt(inner(a, a)) for a in (first, second, third)))


class TimeNodes(NamedTuple):
    """Times and weights of a quadrature rule on [t_min, T]."""

    t: Float[np.ndarray, " times"]
    weight: Float[np.ndarray, " times"]


def time_nodes(sde: SDE, t_min: float, num: int) -> TimeNodes:
    """Returns Gauss-Legendre nodes in ln(sigma / alpha), the natural scale for errors of scores, for every SDE.

    Raises:
        ValueError: fewer than one node, or t_min outside (0, T).
    """
    if num < 1 or not 0 < t_min < sde.t_max:
        raise ValueError(f"need num >= 1 and t_min in (0, {sde.t_max}), got {num} and {t_min}")
    nodes, weights = np.polynomial.legendre.leggauss(num)
    total = float(sde.importance_weight(jnp.asarray(sde.t_max), t_min))
    t = sde.time_of_quantile(jnp.asarray(0.5 * total * (nodes + 1)), t_min)
    rate = jnp.square(sde.diffusion(t) / sde.alpha_sigma(t)[1])  # This is d quantile / dt.
    return TimeNodes(np.asarray(t, np.float64), 0.5 * total * weights / np.asarray(rate, np.float64))


@dataclasses.dataclass(frozen=True)
class DistanceCurve:
    """The mean of a distance at several times, its standard error, and its integral over time."""

    nodes: TimeNodes
    mean: Float[np.ndarray, " times"]
    se: Float[np.ndarray, " times"]
    num_points: int
    """Points at each time."""
    largest: float = math.nan
    """The largest value of all."""

    @property
    def integral(self) -> MeanEstimate:
        """The integral in nats. Its standard error assumes independent points at different times."""
        se = float(np.sqrt(np.sum((self.nodes.weight * self.se) ** 2)))
        return MeanEstimate(float(self.nodes.weight @ self.mean), se, self.num_points * len(self.mean))


def distance_curves(
    score_fn: ScoreFn,
    sde: SDE,
    sampler: Sampler,
    nodes: TimeNodes,
    num_points: int,
    probes: Probes | None = None,
    *,
    data_score: ScoreFn | None = None,
    rtol: float = 1e-6,
    atol: float = 1e-6,
) -> dict[str, DistanceCurve]:
    """Computes l_Diff(t) and, given the score of the data, l_SM(t), l_Fisher(t) and the integrand of Theorem 3.1.

    One solve takes all num_times x num_points examples, in which the points of one time are adjacent.

    Args:
        sampler: draws points of q_t.
        probes: for all of these examples, in their order.

    Returns:
        Curves at the nodes by the names of `Distances`, in nats per unit of time. The curve `returned` is in units of
        the noise.

    Raises:
        ValueError: fewer than 2 points, which do not give a standard error.
        RuntimeError: if a solve fails.
    """
    if num_points < 2:
        raise ValueError(f"need at least 2 points at each time, got {num_points}")
    t = jnp.asarray(np.repeat(nodes.t, num_points))
    values = distances(score_fn, sde, sampler(t), t, probes, data_score=data_score, rtol=rtol, atol=atol)
    curves = {}
    for name, value in values._asdict().items():
        if value is not None:
            curves[name] = curve_of(nodes, np.asarray(value, np.float64).reshape(-1, num_points))
    return curves


def curve_of(nodes: TimeNodes, values: Float[np.ndarray, "times points"]) -> DistanceCurve:
    """Averages the values of the points at each time."""
    rows = [mean_estimate(row) for row in values]
    means, errors = (np.array([getattr(row, part) for row in rows]) for part in ("mean", "se"))
    return DistanceCurve(nodes, means, errors, values.shape[1], float(np.max(values)))


# Theorem 3.1.


class KLIdentity(NamedTuple):
    """Both sides of [L22] Theorem 3.1, in nats, computed in two ways: from likelihoods and from scores."""

    start: MeanEstimate
    """KL(q_min || p_min): the mean of ln q - ln p, with ln p from likelihood.py."""
    end: MeanEstimate
    """KL(q_T || p_T), where p_T is the prior."""
    integral: MeanEstimate
    """The integral of g^2 / 2 E[(s - grad ln q) . (grad ln p - grad ln q)]."""

    @property
    def right(self) -> MeanEstimate:
        """The sum of `end` and `integral`."""
        return MeanEstimate(
            self.end.mean + self.integral.mean, float(np.hypot(self.end.se, self.integral.se)), self.integral.n
        )


def kl_identity(
    score_fn: ScoreFn,
    sde: SDE,
    density: Marginals,
    sampler: Sampler,
    *,
    t_min: float,
    num_points: int,
    num_times: int = 32,
    rtol: float = 1e-6,
    atol: float = 1e-6,
) -> KLIdentity:
    """Checks the ODE of a score model by Theorem 3.1, for data of few dimensions with a known density.

    Args:
        sampler: draws points of q_t. Quasi-random points are more accurate, but make the standard errors too large.
        num_points: the number of points at each end, and at each time of the integral.

    Raises:
        ValueError: as in `time_nodes` and `distance_curves`.
        RuntimeError: if a solve fails.
    """
    nodes = time_nodes(sde, t_min, num_times)
    first, last = (jnp.full(num_points, t, jnp.asarray(nodes.t).dtype) for t in (t_min, sde.t_max))
    x, x_end = sampler(first), sampler(last)
    result = ode_log_likelihood(score_fn, sde, x, None, t_min=t_min, rtol=rtol, atol=atol)
    result.info.require_success()
    data_score = partial(density.score, sde)
    curves = distance_curves(score_fn, sde, sampler, nodes, num_points, data_score=data_score, rtol=rtol, atol=atol)
    return KLIdentity(
        start=mean_estimate(np.asarray(density.log_density(sde, x, first) - result.logp)),
        end=mean_estimate(np.asarray(density.log_density(sde, x_end, last) - sde.prior_logp(x_end))),
        integral=curves["cross"].integral,
    )
