"""Distances between the scores of a model, of its ODE's own density, and of the data; the KL identity they make up.

With q_t the density of the data's x_t, p_t that of the ODE, and s the model's score, three distances in nats per unit
of time tell them apart, each g^2 / 2 times an expectation over q_t ([L22] Fig. 3 and 7):

    score_matching  |s - grad ln q_t|^2             what first-order score matching minimises
    fisher          |grad ln p_t - grad ln q_t|^2   what it would take to bound the likelihood
    difference      |s - grad ln p_t|^2             needs no grad ln q_t, so that it can be had for images

Theorem 3.1 of [L22], for q and p at t_min and at T:

    KL(q_min || p_min) = KL(q_T || p_T) + integral of g^2 / 2 E[(s - grad ln q_t) . (grad ln p_t - grad ln q_t)] dt.

Sources: [L22] Lu et al., ICML 2022.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from analysis.ode_score import ode_score
from arrays import Batch, PerExample, ScoreFn, inner
from evaluation import MeanEstimate, mean_estimate
from likelihood import Probes, ode_log_likelihood
from ode import as_pytree, require_success
from sde_lib import SDE
from sources.marginals import Marginals

Sampler: TypeAlias = Callable[[PerExample], Batch]
"""Points of q_t, one for each of the times given; the same ones for the same times."""


class Distances(NamedTuple):
    """g^2 / 2 times products of differences of scores, of each point, in nats per unit of time.

    Without the data's score only `difference` is there.
    """

    difference: PerExample
    """|s - grad ln p|^2, of l_Diff."""
    score_matching: PerExample | None = None
    """|s - grad ln q|^2, of l_SM."""
    fisher: PerExample | None = None
    """|grad ln p - grad ln q|^2, of l_Fisher."""
    cross: PerExample | None = None
    """(s - grad ln q) . (grad ln p - grad ln q), the integrand of Theorem 3.1."""


@partial(jax.jit, static_argnames="sde")
def _distances(
    score: Batch, of_ode: Batch, of_data: Batch | None, t: PerExample, like: Batch, *, sde: SDE
) -> Distances:
    weight = 0.5 * sde.diffusion(t) ** 2
    difference = weight * inner(score - of_ode, score - of_ode)
    if of_data is None:
        return Distances(difference)
    model, ode = score - of_data, of_ode - of_data
    return Distances(difference, weight * inner(model, model), weight * inner(ode, ode), weight * inner(model, ode))


def distances(
    score_fn: ScoreFn,
    sde: SDE,
    x: Batch,
    t: PerExample,
    probes: Probes | None = None,
    *,
    data_score: ScoreFn | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Distances:
    """The distances at points x of q_t, each at a time of its own. Their means over q_t are the curves of [L22] Fig. 3.

    With probes, grad ln p is an unbiased estimate and so is `cross`; `difference` and `fisher` are too large by its
    variance.

    Raises:
        RuntimeError: if a solve fails.
    """
    of_ode = ode_score(score_fn, sde, x, t, probes, rtol=rtol, atol=atol)
    require_success(of_ode.info)
    of_data = None if data_score is None else _evaluate(as_pytree(data_score), x, t)
    return _distances(_evaluate(as_pytree(score_fn), x, t), of_ode.score, of_data, t, x, sde=sde)


@jax.jit
def _evaluate(score_fn: ScoreFn, x: Batch, t: PerExample) -> Batch:
    with jax.default_matmul_precision("highest"):
        return score_fn(x, t)


class TimeNodes(NamedTuple):
    """Times, and the weights that turn values there into an integral over [t_min, T]."""

    t: Float[np.ndarray, " times"]
    weight: Float[np.ndarray, " times"]


def time_nodes(sde: SDE, t_min: float, num: int) -> TimeNodes:
    """Gauss-Legendre nodes in ln(sigma / alpha): errors of scores matter on its scale, whatever the SDE.

    Raises:
        ValueError: fewer than one node, or t_min outside (0, T).
    """
    if num < 1 or not 0 < t_min < sde.t_max:
        raise ValueError(f"need num >= 1 and t_min in (0, {sde.t_max}), got {num} and {t_min}")
    nodes, weights = np.polynomial.legendre.leggauss(num)
    total = float(sde.importance_weight(jnp.asarray(sde.t_max), t_min))
    t = sde.time_of_quantile(jnp.asarray(0.5 * total * (nodes + 1)), t_min)
    rate = jnp.square(sde.diffusion(t) / sde.alpha_sigma(t)[1])  # of the quantile in time
    return TimeNodes(np.asarray(t, np.float64), 0.5 * total * weights / np.asarray(rate, np.float64))


@dataclasses.dataclass(frozen=True)
class DistanceCurve:
    """The mean of one of the distances at each of some times, its standard error, and its integral over time."""

    nodes: TimeNodes
    mean: Float[np.ndarray, " times"]
    se: Float[np.ndarray, " times"]
    num_points: int
    """At each time."""

    @property
    def integral(self) -> MeanEstimate:
        """In nats; the standard error is that of the points, which are independent from time to time."""
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
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> dict[str, DistanceCurve]:
    """l_Diff(t), and with the data's score l_SM(t), l_Fisher(t) and Theorem 3.1's integrand, at each of the nodes.

    One solve takes all times and points together, num_times x num_points examples, the points of a time in a row.

    Args:
        sampler: points of q_t.
        probes: for all of these examples, in their order.

    Returns:
        Curves by the names of `Distances`, in nats per unit of time.

    Raises:
        ValueError: fewer than 2 points, which have no standard error. RuntimeError: if a solve fails.
    """
    if num_points < 2:
        raise ValueError(f"need at least 2 points at each time, got {num_points}")
    t = jnp.asarray(np.repeat(nodes.t, num_points))
    values = distances(score_fn, sde, sampler(t), t, probes, data_score=data_score, rtol=rtol, atol=atol)
    curves = {}
    for name, value in values._asdict().items():
        if value is not None:
            rows = [mean_estimate(row) for row in np.asarray(value, np.float64).reshape(-1, num_points)]
            curves[name] = DistanceCurve(
                nodes, np.array([r.mean for r in rows]), np.array([r.se for r in rows]), num_points
            )
    return curves


# --- the theorem ---


class KLIdentity(NamedTuple):
    """Both sides of [L22] Theorem 3.1, in nats, found independently of each other: by likelihoods and by scores."""

    start: MeanEstimate
    """KL(q_min || p_min): the mean of ln q - ln p, ln p by the likelihood's solver."""
    end: MeanEstimate
    """KL(q_T || p_T), p_T being the prior."""
    integral: MeanEstimate
    """Of g^2 / 2 E[(s - grad ln q) . (grad ln p - grad ln q)]."""

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
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> KLIdentity:
    """Checks a score model's ODE against Theorem 3.1, for data of few dimensions known in closed form.

    Args:
        sampler: points of q_t; quasi-random ones for accuracy, whose standard errors are then too large.
        num_points: at each end, and at each time of the integral.

    Raises:
        ValueError: of `time_nodes` and `distance_curves`. RuntimeError: if a solve fails.
    """
    nodes = time_nodes(sde, t_min, num_times)
    first, last = (jnp.full(num_points, t, jnp.asarray(nodes.t).dtype) for t in (t_min, sde.t_max))
    x, x_end = sampler(first), sampler(last)
    result = ode_log_likelihood(score_fn, sde, x, None, t_min=t_min, rtol=rtol, atol=atol)
    require_success(result.info)
    data_score = partial(density.score, sde)
    curves = distance_curves(score_fn, sde, sampler, nodes, num_points, data_score=data_score, rtol=rtol, atol=atol)
    return KLIdentity(
        start=mean_estimate(np.asarray(density.log_density(sde, x, first) - result.logp)),
        end=mean_estimate(np.asarray(density.log_density(sde, x_end, last) - sde.prior_logp(x_end))),
        integral=curves["cross"].integral,
    )
