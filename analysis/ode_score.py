"""The score of the density of the ODE itself, and likelihoods from several start times.

The probability-flow ODE dx/dt = h(x, t) of a score model carries the prior at T back to a density p_t at every t. The
score of p_t differs from the score of the model, unless the model is exact. Along a path it obeys

    d/dt grad ln p_t = -grad(div h) - (grad h)^T grad ln p_t = -grad_x (div h + h . a),  a = grad ln p_t held constant,

which is linear in a ([L22] App. D). x is solved forward to T, then (x, a) back from the score of the prior there. With
v.Jv of a probe for div h, only the source of this linear equation changes, so the expectation of the result is exact.

Where the flow contracts, as in the valleys between modes, the solve back does not return to x. In few dimensions,
`ode_score` therefore differentiates ln p_t(x) = ln prior(x_T) + integral of div h along the forward solve instead:

    a = M^T grad ln prior(x_T) + integral of M^T grad(div h),  M = dx/dx_t, which obeys dM/dt = (grad h) M.

Sources: [L22] Lu et al., ICML 2022.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from arrays import Batch, PerExample, ScoreFn, append_dims, as_pytree, inner, num_dims
from derivatives import UNROLLED_DIMS, Field, divergence_estimates, exact_divergence
from likelihood import Probes
from sde_lib import SDE
from solvers.ode import Info, integrate


class OdeScore(NamedTuple):
    """grad_x ln p_t(x) of each example, and a report of its solves."""

    score: Batch
    latent: Batch
    """x_T."""
    returned: Batch
    """The end of the solve back: x plus the error of both solves. Without a solve back, x itself.

    If it is far from x, the score belongs to another point. See `return_error`."""
    info: Info
    """Cost and success of both solves. See `Info.require_success`."""


LEAST_NOISE = 1e-3
"""The smallest unit of `return_error`, because sub-VP can have less noise than float32 resolves in x."""


def return_error(sde: SDE, x: Batch, t: PerExample, returned: Batch) -> PerExample:
    """Computes |returned - x| in units of the noise sigma_t, or of `LEAST_NOISE` where the noise is smaller.

    Scores vary over distances of about sigma_t, so a value near 1 or above means the score of another point.
    """
    distance = jnp.sqrt(inner(returned - x, returned - x))
    return distance / jnp.maximum(sde.alpha_sigma(t)[1], LEAST_NOISE)


class OdeScorePath(NamedTuple):
    """The path of each example, and grad ln p_t along it."""

    x: Float[Array, "times batch *dims"]
    score: Float[Array, "times batch *dims"]
    info: Info


def ode_score(
    score_fn: ScoreFn,
    sde: SDE,
    x: Batch,
    t: PerExample,
    probes: Probes | None = None,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> OdeScore:
    """Computes grad_x ln p_t(x) of the density of the ODE, each example at its own time ([L22] Thm D.1).

    Can be called under jit. An eager call compiles once, and other parameters compile nothing if the score function is
    a pytree.

    Args:
        t: the time of each example, in [t_min, T].
        probes: for div h, fixed for both solves. The result is linear in the mean of v.Jv over probes, and therefore
            unbiased for entries of mean 0 and variance 1. None: the exact divergence, at the cost of d derivatives.
        rtol, atol: tolerances of the adaptive solver, which controls the error over the whole batch. The score counts
            in units of 1 / sigma_t, so that atol limits the error of the distances in score_distances.py at all t.
    """
    if probes is None and num_dims(x) <= UNROLLED_DIMS:
        return _solve_forward(as_pytree(score_fn), x, t, rtol=rtol, atol=atol, sde=sde)
    latent, path = _solve(as_pytree(score_fn), probes, x, t, jnp.zeros(1, x.dtype), rtol=rtol, atol=atol, sde=sde)
    return OdeScore(path.score[0], latent, path.x[0], path.info)


@partial(jax.jit, static_argnames=("rtol", "atol", "sde"))
def _solve_forward(score_fn: ScoreFn, x: Batch, start: PerExample, *, rtol: float, atol: float, sde: SDE) -> OdeScore:
    """Differentiates the likelihood along its forward solve, by the derivatives of x_T in each dimension."""
    unit = append_dims(sde.alpha_sigma(start)[1], x)
    basis = jnp.eye(num_dims(x), dtype=x.dtype).reshape(-1, 1, *x.shape[1:])
    with jax.default_matmul_precision("highest"):
        state = (x, tuple(unit * e for e in basis), jnp.zeros((len(x), len(basis)), x.dtype))
        (latent, columns, total), info = integrate(
            _SensitivityFlow(score_fn, start, sde), state, 0.0, 1.0, rtol=rtol, atol=atol
        )
    prior = jnp.stack([inner(column, -latent / sde.prior_sigma**2) for column in columns], axis=1)
    begun = start[jnp.maximum(info.worst_example, 0)]
    info = info._replace(t=begun + info.t * (sde.t_max - begun))
    return OdeScore((prior + total).reshape(x.shape) / unit, latent, x, info)


def ode_score_path(
    score_fn: ScoreFn,
    sde: SDE,
    x: Batch,
    times: Float[Array | np.ndarray, " times"],
    probes: Probes | None = None,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> OdeScorePath:
    """Computes the path of the ODE from x at the first of `times`, and grad ln p_t along it, at each of `times`.

    The points at later times are samples of the flow from the first time, not of q_t. Expectations over q_t need other
    points (score_distances.py).

    Args:
        times: increasing, within [t_min, T].
        probes, rtol, atol: as in `ode_score`.

    Raises:
        ValueError: times that do not increase or lie beyond T.
    """
    grid = np.asarray(times, np.float64)
    if grid.ndim != 1 or len(grid) == 0 or np.any(np.diff(grid) <= 0) or not 0 <= grid[0] < grid[-1] <= sde.t_max:
        raise ValueError(f"times must increase within [0, {sde.t_max}], got {times}")
    fractions = jnp.asarray((grid - grid[0]) / (sde.t_max - grid[0]), x.dtype)
    start = jnp.full(x.shape[:1], grid[0], x.dtype)
    return _solve(as_pytree(score_fn), probes, x, start, fractions, rtol=rtol, atol=atol, sde=sde)[1]


@partial(jax.jit, static_argnames=("rtol", "atol", "sde"))
def _solve(
    score_fn: ScoreFn,
    probes: Probes | None,
    x: Batch,
    start: PerExample,
    fractions: Float[Array, " times"],
    *,
    rtol: float,
    atol: float,
    sde: SDE,
) -> tuple[Batch, OdeScorePath]:
    """Computes x_T, and the path back from it at increasing fractions of [start, T].

    Both solves use the fraction as their variable. It is 0 at the start of each example and 1 at T, so that one solve
    takes all examples.
    """
    solve = partial(integrate, rtol=rtol, atol=atol)
    with jax.default_matmul_precision("highest"):
        latent, forward = solve(_Flow(score_fn, start, sde), x, 0.0, 1.0)
        field = _ScoreFlow(score_fn, probes, start, sde)

        def segment(carry: tuple[tuple[Batch, Batch], Float[Array, ""]], end: Float[Array, ""]):
            state, begin = carry
            state, info = jax.lax.cond(
                begin == end, lambda: (state, _no_solve(forward)), lambda: solve(field, state, begin, end)
            )
            return (state, end), (state, info)

        unit = append_dims(sde.alpha_sigma(start)[1], x)
        begin = ((latent, -unit * latent / sde.prior_sigma**2), jnp.ones((), x.dtype))
        _, ((path, scaled), back) = jax.lax.scan(segment, begin, fractions, reverse=True)
    return latent, OdeScorePath(path, scaled / unit[None], _total(forward, back, start, sde))


def _no_solve(like: Info) -> Info:
    """The report for an interval of length 0."""
    return jax.tree.map(jnp.zeros_like, like)._replace(success=jnp.asarray(True), worst_example=jnp.int32(-1))


def _total(forward: Info, back: Info, start: PerExample, sde: SDE) -> Info:
    """Combines the reports of all solves: their total cost, and the first failure, at the time of its worst example."""
    # The segments are solved from the last to the first.
    infos = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b[::-1]]), forward, back)
    failed = jnp.argmin(infos.success)
    fraction, worst_example = infos.t[failed], infos.worst_example[failed]
    begun = start[jnp.maximum(worst_example, 0)]
    success = jnp.all(infos.success)
    reached = jnp.where(success, begun, begun + fraction * (sde.t_max - begun))
    return Info(
        jnp.sum(infos.nfe), jnp.sum(infos.steps), success, reached, jnp.where(success, jnp.int32(-1), worst_example)
    )


@partial(jax.tree_util.register_dataclass, data_fields=["score_fn", "start"], meta_fields=["sde"])
@dataclasses.dataclass(frozen=True)
class _Flow:
    """dx/dfraction of the ODE, for each example between its own start and T."""

    score_fn: ScoreFn
    start: PerExample
    sde: SDE

    def __call__(self, fraction: Float[Array, ""], x: Batch) -> Batch:
        return append_dims(self.sde.t_max - self.start, x) * self.at(fraction)(x)

    def at(self, fraction: Float[Array, ""]) -> Field:
        """h at the times of the examples."""
        t = self.start + fraction * (self.sde.t_max - self.start)
        return lambda x: self.sde.probability_flow(self.score_fn, x, t)


@partial(jax.tree_util.register_dataclass, data_fields=["score_fn", "start"], meta_fields=["sde"])
@dataclasses.dataclass(frozen=True)
class _SensitivityFlow:
    """d/dfraction of x, of the columns of sigma M, and of the integral of sigma M^T grad(div h).

    sigma is the constant noise level at the start of each example.
    """

    score_fn: ScoreFn
    start: PerExample
    sde: SDE

    def __call__(
        self, fraction: Float[Array, ""], state: tuple[Batch, tuple[Batch, ...], Float[Array, "batch d"]]
    ) -> tuple[Batch, tuple[Batch, ...], Float[Array, "batch d"]]:
        x, columns, _ = state
        flow = _Flow(self.score_fn, self.start, self.sde).at(fraction)
        (value, _), push_forward = jax.linearize(lambda x: exact_divergence(flow, x), x)
        values, divergences = zip(*map(push_forward, columns), strict=True)
        rate = self.sde.t_max - self.start
        scaled = tuple(append_dims(rate, x) * value for value in values)
        return append_dims(rate, x) * value, scaled, rate[:, None] * jnp.stack(divergences, axis=1)


@partial(jax.tree_util.register_dataclass, data_fields=["score_fn", "probes", "start"], meta_fields=["sde"])
@dataclasses.dataclass(frozen=True)
class _ScoreFlow:
    """d/dfraction of (x, b), b = sigma grad ln p_t, by one reverse pass over sigma div h + h . b.

    sigma is the constant noise level at the start of each example.
    """

    score_fn: ScoreFn
    probes: Probes | None
    start: PerExample
    sde: SDE

    def __call__(self, fraction: Float[Array, ""], state: tuple[Batch, Batch]) -> tuple[Batch, Batch]:
        x, b = state
        flow = _Flow(self.score_fn, self.start, self.sde).at(fraction)
        unit = self.sde.alpha_sigma(self.start)[1]

        def potential(x: Batch) -> tuple[Float[Array, ""], Batch]:
            value, divergence = divergence_estimates(flow, x, self.probes)
            return jnp.sum(unit * jnp.mean(divergence, axis=1) + inner(value, b)), value

        # Examples do not interact, so the gradient of the sum over the batch is each example's own.
        gradient, value = jax.grad(potential, has_aux=True)(x)
        rate = append_dims(self.sde.t_max - self.start, x)
        return rate * value, -rate * gradient


def likelihood_by_start(
    score_fn: ScoreFn,
    sde: SDE,
    x: Batch,
    starts: Float[Array | np.ndarray, " starts"],
    probes: Probes | None = None,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> tuple[Float[Array, "starts batch"], Info]:
    """Computes ln p(x) in nats with each of several start times t, at which the data are x ([L22] Fig. 6).

    One solve takes all start times. The results agree with `likelihood.ode_log_likelihood` with t_min = t.

    Args:
        starts: start times in (0, T).
        probes: for div h, fixed for the solve and the same for all start times. None: the exact divergence.

    Returns:
        The log-likelihoods, and the report of the solve. See `Info.require_success`.

    Raises:
        ValueError: a start outside (0, T).
    """
    times = np.asarray(starts, np.float64)
    if np.any(times <= 0) or np.any(times >= sde.t_max):
        raise ValueError(f"starts must lie in (0, {sde.t_max}), got {starts}")
    n = len(times)
    t = jnp.asarray(np.repeat(times, len(x)), x.dtype)
    repeated = None if probes is None else jnp.tile(probes, (1, n, *(1,) * (x.ndim - 1)))
    field = _LikelihoodFlow(as_pytree(score_fn), repeated, t, sde)
    with jax.default_matmul_precision("highest"):
        state = (jnp.tile(x, (n, *(1,) * (x.ndim - 1))), jnp.zeros_like(t))
        (latent, divergence), info = integrate(field, state, 0.0, 1.0, rtol=rtol, atol=atol)
    begun = t[jnp.maximum(info.worst_example, 0)]
    # The examples are repeated for each start; the report gives the index of the example itself.
    worst_example = jnp.where(info.success, -1, info.worst_example % len(x))
    info = info._replace(t=begun + info.t * (sde.t_max - begun), worst_example=worst_example)
    return (sde.prior_logp(latent) + divergence).reshape(n, -1), info


@partial(jax.tree_util.register_dataclass, data_fields=["score_fn", "probes", "start"], meta_fields=["sde"])
@dataclasses.dataclass(frozen=True)
class _LikelihoodFlow:
    """d/dfraction of x and of the integral of div h."""

    score_fn: ScoreFn
    probes: Probes | None
    start: PerExample
    sde: SDE

    def __call__(self, fraction: Float[Array, ""], state: tuple[Batch, PerExample]) -> tuple[Batch, PerExample]:
        flow = _Flow(self.score_fn, self.start, self.sde).at(fraction)
        value, divergence = divergence_estimates(flow, state[0], self.probes)
        rate = self.sde.t_max - self.start
        return append_dims(rate, value) * value, rate * jnp.mean(divergence, axis=1)
