"""The score of the density of the ODE itself, and likelihoods from several starts.

The probability-flow ODE dx/dt = h(x, t) of a score model carries the prior at T back to a density p_t at every t. Its
score is not the model's, unless the model is exact. Along a path it obeys

    d/dt grad ln p_t = -grad(div h) - (grad h)^T grad ln p_t = -grad_x (div h + h . a),  a = grad ln p_t held constant,

which is linear in a ([L22] App. D): x is solved forward to T, then (x, a) back from the prior's score there. With a
probe's v.Jv for div h the result is that linear equation's with another source, so its expectation is exact.

Sources: [L22] Lu et al., ICML 2022.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from arrays import Batch, PerExample, ScoreFn, append_dims, inner
from derivatives import Field, divergence_estimates
from likelihood import Probes
from ode import Info, as_pytree, integrate
from sde_lib import SDE


class OdeScore(NamedTuple):
    """grad_x ln p_t(x) of each example, and how it was found."""

    score: Batch
    latent: Batch
    """x_T."""
    returned: Batch
    """Where the solve back ended: x, but for the error of the two solves. Far from x the score is another point's: in
    the valleys between modes the flow back is unstable."""
    info: Info
    """How both solves went. See `ode.require_success`."""


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
    """grad_x ln p_t(x) of the ODE's density, each example at a time of its own ([L22] Thm D.1).

    Can be called under jit. Called eagerly it compiles once, for any parameters of a score function that is a pytree.

    Args:
        t: the times that the examples are at, in [t_min, T].
        probes: of div h, fixed for both solves; the result is linear in their mean of v.Jv and so unbiased for entries
            of mean 0 and variance 1. None: exact, at the cost of d derivatives.
        rtol, atol: of the adaptive solver, which controls the error over the whole batch.
    """
    latent, path = _solve(as_pytree(score_fn), probes, x, t, jnp.zeros(1, x.dtype), rtol=rtol, atol=atol, sde=sde)
    return OdeScore(path.score[0], latent, path.x[0], path.info)


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
    """Where the ODE carries x, which is at the first of `times`, and grad ln p_t there, at each of them.

    The points at a later time are samples of the flow from the first, not of q_t: expectations over q_t need points of
    their own (score_distances.py).

    Args:
        times: increasing, within [t_min, T].
        probes, rtol, atol: as of `ode_score`.

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
    """x_T, and the path back from it at fractions of [start, T] that increase.

    Both solves are in the fraction, 0 at an example's own start and 1 at T, so that one solve serves them all.
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

        begin = ((latent, -latent / sde.prior_sigma**2), jnp.ones((), x.dtype))
        _, ((path, score), back) = jax.lax.scan(segment, begin, fractions, reverse=True)
    return latent, OdeScorePath(path, score, _total(forward, back, start, sde))


def _no_solve(like: Info) -> Info:
    """That of an interval without length."""
    return jax.tree.map(jnp.zeros_like, like)._replace(success=jnp.asarray(True), worst_example=jnp.int32(-1))


def _total(forward: Info, back: Info, start: PerExample, sde: SDE) -> Info:
    """All solves as one: their cost, and the first failure, its time being that of the example to look at."""
    # the segments are solved from the last to the first
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
    """dx/dfraction: the ODE, each example between its own start and T."""

    score_fn: ScoreFn
    start: PerExample
    sde: SDE

    def __call__(self, fraction: Float[Array, ""], x: Batch) -> Batch:
        return append_dims(self.sde.t_max - self.start, x) * self.at(fraction)(x)

    def at(self, fraction: Float[Array, ""]) -> Field:
        """h at the times of the examples."""
        t = self.start + fraction * (self.sde.t_max - self.start)
        return lambda x: self.sde.probability_flow(self.score_fn, x, t)


@partial(jax.tree_util.register_dataclass, data_fields=["score_fn", "probes", "start"], meta_fields=["sde"])
@dataclasses.dataclass(frozen=True)
class _ScoreFlow:
    """d/dfraction of (x, a), a = grad ln p_t: both from one reverse pass over div h + h . a."""

    score_fn: ScoreFn
    probes: Probes | None
    start: PerExample
    sde: SDE

    def __call__(self, fraction: Float[Array, ""], state: tuple[Batch, Batch]) -> tuple[Batch, Batch]:
        x, a = state
        flow = _Flow(self.score_fn, self.start, self.sde).at(fraction)

        def potential(x: Batch) -> tuple[Float[Array, ""], Batch]:
            value, divergence = divergence_estimates(flow, x, self.probes)
            return jnp.sum(jnp.mean(divergence, axis=1) + inner(value, a)), value

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
    """ln p(x) in nats if x stands for x_t at each of some times t where the solve may start ([L22] Fig. 6).

    One solve takes all of them. Its results are those of `likelihood.ode_log_likelihood` with t_min = t.

    Args:
        starts: in (0, T).
        probes: of div h, fixed for the solve and the same for all starts. None: exact.

    Returns:
        The log-likelihoods, and how the solve went. See `ode.require_success`.

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
    worst_example = jnp.where(
        info.success, -1, info.worst_example % len(x)
    )  # of the examples, not of their repetitions
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
