"""Dormand-Prince 5(4) on the device, with diffrax's control of the step size, by the rules of SciPy's RK45."""

from functools import partial
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from arrays import ReportProgress, append_dims, in_parts
from solvers.solve import NO_EXAMPLE, Field, Info, State, combine, is_finite, with_worst_example


class _AdaptiveSolve(NamedTuple):
    """The state of an adaptive solve between two parts. Times are multiplied by the direction, so they increase."""

    steps: Int[Array, ""]
    """Attempted steps. Before the first, -2 until the derivative at the start is known, then -1 until the first step is
    chosen."""
    t: Float[Array, ""]
    t_next: Float[Array, ""]
    """The end of the step to attempt."""
    y: PyTree
    slope: PyTree
    """The derivative at (t, y)."""
    trial: Float[Array, ""]
    """The length of the Euler step that chooses the first step."""
    healthy: Bool[Array, ""]
    controller_state: PyTree


class _Interval(NamedTuple):
    """The constants of an adaptive solve, shared by its parts."""

    field: Field
    t0: Float[Array, ""]
    t1: Float[Array, ""]
    rtol: float | Float[Array, ""]
    atol: float | Float[Array, ""]

    @property
    def direction(self) -> Float[Array, ""]:
        return jnp.where(self.t0 < self.t1, 1, -1).astype(self.t0.dtype)

    @property
    def end(self) -> Float[Array, ""]:
        return self.direction * self.t1

    def slope(self, t: Float[Array, ""], y: State) -> State:
        """The derivative in the direction of the solve."""
        return jax.tree.map(lambda a: self.direction.astype(a.dtype) * a, self.field(self.direction * t, y))

    def scaled_norm(self, values: State, y: State) -> Float[Array, ""]:
        """The root mean square of values relative to the tolerance at y."""
        scaled = jax.tree.map(lambda a, y: a / (self.atol + self.rtol * jnp.abs(y)), values, y)
        return jnp.asarray(diffrax.PIDController(1, 1).norm(scaled))

    def controller(self) -> diffrax.PIDController:
        """The step-size rules of SciPy's RK45."""
        return diffrax.PIDController(
            rtol=self.rtol,
            atol=self.atol,
            pcoeff=0.0,
            icoeff=1.0,
            dcoeff=0.0,
            safety=0.9,
            factormin=0.2,
            factormax=10.0,
            # A step below the rounding error of t does not change t.
            dtmin=0.1 * jnp.finfo(self.t0.dtype).eps * jnp.abs(self.t1 - self.t0),
            force_dtmin=False,
        )


_TABLEAU, _ERROR_ORDER = diffrax.Dopri5.tableau, 5
"""The method, and the order of the error estimate of its embedded formula, which the step size control uses."""

_NUM_SLOPES = len(_TABLEAU.b_error)
_NONE, _EULER = np.zeros(_NUM_SLOPES), np.eye(_NUM_SLOPES)[0]
_WEIGHTS = np.stack([_NONE, _EULER, *(np.pad(a, (0, _NUM_SLOPES - len(a))) for a in _TABLEAU.a_lower)])
"""The weights of the derivatives in the state of each evaluation: at the start, after an Euler step, in six stages."""
_TIMES = np.array([0, 1, *_TABLEAU.c])
"""The time of each evaluation, as a part of the step."""
_INTO = np.array([0, 1, *range(1, _NUM_SLOPES)])
"""The place of each evaluation among the derivatives of the step."""


def dopri5(
    field: Field,
    y0: State,
    t0: Float[Array, ""],
    t1: Float[Array, ""],
    rtol: float,
    atol: float,
    max_steps: int,
    progress: ReportProgress | None,
) -> tuple[State, Info]:
    """Takes steps in our own loop, so that a solve can be watched and stopped between them."""
    interval = _Interval(field, t0, t1, rtol, atol)
    solve = _before_first_step(interval, y0)
    first, length = solve.t, interval.end - solve.t

    def advance(solve: _AdaptiveSolve, _: int, last: int) -> _AdaptiveSolve:
        return _steps_until(interval, solve, last)

    def percentage(solve: _AdaptiveSolve) -> tuple[int, int]:
        return (int(100 * (solve.t - first) / length) if solve.healthy else 100), 100

    solve = in_parts(advance, solve, max_steps, progress, percentage)
    y, info = _end(interval, solve)
    return y, with_worst_example(field, info, y, t1 - t0)


@jax.jit
def _before_first_step(interval: _Interval, y0: PyTree) -> _AdaptiveSolve:
    start = interval.direction * interval.t0
    state = _controller_state(interval, y0, start)
    slope = jax.tree.map(jnp.zeros_like, y0)
    return _AdaptiveSolve(jnp.int32(-2), start, start, y0, slope, jnp.zeros_like(start), jnp.asarray(True), state)


def _controller_state(interval: _Interval, y: PyTree, t: Float[Array, ""]) -> PyTree:
    """The state of the step size control before the first step."""
    term = diffrax.ODETerm(lambda t, y, _: y)  # the controller would use it only to choose the first step
    return interval.controller().init(term, t, t, y, jnp.zeros_like(t), None, lambda *_: y, _ERROR_ORDER)[1]


@jax.jit
def _steps_until(interval: _Interval, solve: _AdaptiveSolve, most_steps: Int[Array, ""] | int) -> _AdaptiveSolve:
    """Attempts steps until the end of the interval, or until `most_steps` have been attempted in total."""

    def unfinished(solve: _AdaptiveSolve) -> Bool[Array, ""]:
        return (solve.steps < most_steps) & (solve.t < interval.end) & solve.healthy

    def advance(solve: _AdaptiveSolve) -> _AdaptiveSolve:
        # What begins a solve evaluates the field in the same loop as the stages of a step, so that it is compiled once.
        phase = jnp.minimum(solve.steps + 2, 2)
        slopes, y = _evaluate(interval, solve, phase)
        after = [partial(rule, interval) for rule in (_with_trial, _with_first_step, _with_step)]
        return jax.lax.switch(phase, after, solve, slopes, y)._replace(steps=solve.steps + 1)

    return jax.lax.while_loop(unfinished, advance, solve)


def _evaluate(interval: _Interval, solve: _AdaptiveSolve, phase: Int[Array, ""]) -> tuple[State, State]:
    """Evaluates the field at the start (phase 0), after the Euler step (1) or in the stages of a step (2).

    Returns:
        the derivatives on a new first axis, and the state at which the last of them was evaluated.
    """
    length = jnp.where(phase == 1, solve.trial, solve.t_next - solve.t)
    weights, times = (jnp.asarray(a, length.dtype) for a in (_WEIGHTS, _TIMES))

    def stage(i: Int[Array, ""], carry: tuple[State, State]) -> tuple[State, State]:
        slopes, _ = carry
        y = combine(solve.y, length, [1], [_weighted(weights[i], slopes)])
        t = jnp.where(times[i] == 1, solve.t_next, solve.t + times[i] * length)
        slope = interval.slope(t, y)
        return jax.tree.map(lambda all, new: all.at[jnp.asarray(_INTO)[i]].set(new), slopes, slope), y

    def only_first(slope: Array) -> Array:
        return jnp.zeros((_NUM_SLOPES, *slope.shape), slope.dtype).at[0].set(slope)

    last = jnp.where(phase == 2, len(_WEIGHTS), phase + 1)
    return jax.lax.fori_loop(phase, last, stage, (jax.tree.map(only_first, solve.slope), solve.y))


def _weighted(weights: Float[Array, " k"], slopes: State) -> State:
    """The weighted sum over the first axis of the derivatives, in full precision on every device."""
    return jax.tree.map(lambda a: jnp.sum(append_dims(weights, a) * a, axis=0), slopes)


def _with_trial(interval: _Interval, solve: _AdaptiveSolve, slopes: State, y: State) -> _AdaptiveSolve:
    """Begins with the length of the Euler step of SciPy's RK45 (Hairer, Norsett and Wanner, Sec. II.4)."""
    slope = jax.tree.map(lambda a: a[0], slopes)
    d0, d1 = interval.scaled_norm(y, y), interval.scaled_norm(slope, y)
    trial = jnp.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
    trial = jnp.minimum(trial, interval.end - solve.t).astype(solve.t.dtype)
    return solve._replace(slope=slope, trial=trial, t_next=solve.t + trial)


def _with_first_step(interval: _Interval, solve: _AdaptiveSolve, slopes: State, _: State) -> _AdaptiveSolve:
    """Chooses the first step by the derivatives at both ends of the Euler step, as SciPy's RK45."""
    change = jax.tree.map(lambda a: a[1] - a[0], slopes)
    d1 = interval.scaled_norm(solve.slope, solve.y)
    largest = jnp.maximum(d1, interval.scaled_norm(change, solve.y) / solve.trial)
    # If the field is not finite at the trial point, it may be finite before it, so the solver begins with a small step.
    unknown = (largest <= 1e-15) | ~jnp.isfinite(largest)
    size = jnp.where(unknown, jnp.maximum(1e-6, solve.trial * 1e-3), (0.01 / largest) ** (1 / 5))
    size = jnp.minimum(100 * solve.trial, size).astype(solve.t.dtype)
    t_next = jnp.minimum(solve.t + size, interval.end)
    return solve._replace(t_next=t_next, healthy=jnp.isfinite(t_next))


def _with_step(interval: _Interval, solve: _AdaptiveSolve, slopes: State, y: State) -> _AdaptiveSolve:
    """Accepts or rejects the step to y, and chooses the next."""
    end, length = interval.end, solve.t_next - solve.t
    nearly_end = end - 100 * jnp.finfo(end.dtype).eps * jnp.abs(end)
    error = _weighted(length * jnp.asarray(_TABLEAU.b_error, length.dtype), slopes)
    error = jax.tree.map(lambda a: jnp.where(jnp.isnan(a), jnp.inf, a), error)
    accepted, t, t_next, _, controller_state, controlled = interval.controller().adapt_step_size(
        solve.t, solve.t_next, solve.y, y, None, error, _ERROR_ORDER, solve.controller_state
    )
    t = jnp.minimum(t, end)
    # A rejected step near the end must become shorter, too.
    t_next = jnp.where(t_next > nearly_end, jnp.where(accepted, end, t + 0.5 * (end - t)), t_next)
    new, old = (y, jax.tree.map(lambda a: a[-1], slopes)), (solve.y, solve.slope)
    y, slope = jax.tree.map(partial(jnp.where, accepted), new, old)
    return solve._replace(
        t=t,
        t_next=t_next,
        y=y,
        slope=slope,
        healthy=controlled == diffrax.RESULTS.successful,
        controller_state=controller_state,
    )


@jax.jit
def _end(interval: _Interval, solve: _AdaptiveSolve) -> tuple[PyTree, Info]:
    steps, t = jnp.maximum(solve.steps, 0), interval.direction * solve.t
    solved = solve.healthy & (solve.t >= interval.end) & is_finite(solve.y)
    # Six new stages in each step, one at the start, and one to choose the first step.
    nfe = 6 * steps + jnp.minimum(solve.steps, 0) + 2
    return solve.y, Info(nfe, steps, solved, t, jnp.asarray(NO_EXAMPLE))
