"""Dormand-Prince 5(4) on the device, by diffrax's steps, with the step-size rules of SciPy's RK45."""

from functools import partial
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from arrays import ReportProgress, in_parts
from solvers.solve import NO_EXAMPLE, Field, Info, State, combine, is_finite, times_of_state, with_worst_example


class _AdaptiveSolve(NamedTuple):
    """The state of an adaptive solve between two parts. Times are multiplied by the direction, so they increase."""

    steps: Int[Array, ""]
    """Attempted steps."""
    t: Float[Array, ""]
    t_next: Float[Array, ""]
    """The end of the step to attempt."""
    y: PyTree
    healthy: Bool[Array, ""]
    solver_state: PyTree
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

    def term(self) -> diffrax.ODETerm:
        return diffrax.ODETerm(lambda s, y, _: jax.tree.map(self._directed, self.field(self.direction * s, y)))

    def _directed(self, slope: Array) -> Array:
        return self.direction.astype(slope.dtype) * slope

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
        )


_DOPRI5, _ERROR_ORDER = diffrax.Dopri5(), 5
"""The method, and the order of the error estimate of its embedded formula, which the step size control uses."""


def dopri5(
    field: Field,
    y0: State,
    t0: float | Float[Array, ""],
    t1: float | Float[Array, ""],
    rtol: float,
    atol: float,
    max_steps: int,
    progress: ReportProgress | None,
) -> tuple[State, Info]:
    """Takes diffrax's steps in our own loop, so that a solve can be watched and stopped between steps."""
    start, end = times_of_state(y0, t0, t1)
    interval = _Interval(field, start, end, rtol, atol)
    solve = _before_first_step(interval, y0)
    first, length = solve.t, interval.end - solve.t

    def advance(solve: _AdaptiveSolve, _: int, last: int) -> _AdaptiveSolve:
        return _steps_until(interval, solve, last)

    def percentage(solve: _AdaptiveSolve) -> tuple[int, int]:
        if not solve.healthy or solve.t >= interval.end:
            return 100, 100
        return min(99, int(100 * (solve.t - first) / length)), 100  # 32 bits may round the fraction to 1.

    solve = in_parts(advance, solve, max_steps, progress, percentage)
    y, info = _end(interval, solve)
    return y, with_worst_example(field, info, y, end - start)


@jax.jit
def _before_first_step(interval: _Interval, y0: PyTree) -> _AdaptiveSolve:
    term, controller, start = interval.term(), interval.controller(), interval.direction * interval.t0
    size, slope = _first_step(interval, y0)
    t_next, controller_state = controller.init(term, start, interval.end, y0, size, None, _DOPRI5.func, _ERROR_ORDER)
    # The solver must reuse the derivative `slope`, and not compute it again at the start of a part.
    solver_state = jnp.asarray(False), slope
    t_next = jnp.minimum(t_next, interval.end)
    return _AdaptiveSolve(jnp.int32(0), start, t_next, y0, jnp.isfinite(t_next), solver_state, controller_state)


def _first_step(interval: _Interval, y0: State) -> tuple[Float[Array, ""], State]:
    """The size of the first step by the rule of SciPy's RK45 (Hairer, Norsett and Wanner, Sec. II.4), and dy/dt."""
    term, start, norm = interval.term(), interval.direction * interval.t0, diffrax.PIDController(1, 1).norm
    scaled = partial(jax.tree.map, lambda y, a: a / (interval.atol + interval.rtol * jnp.abs(y)), y0)

    def evaluate(point: tuple[Float[Array, ""], State], _: None) -> tuple[tuple, tuple]:
        slope = term.vf(*point, None)
        d0, d1 = norm(scaled(y0)), norm(scaled(slope))
        h0 = jnp.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
        h0 = jnp.minimum(h0, interval.end - start).astype(start.dtype)
        return (start + h0, combine(y0, h0, [1], [slope])), (slope, d1, h0)

    # The second point depends on the first. A loop over both compiles the field once.
    _, (slopes, (d1, _), (h0, _)) = jax.lax.scan(evaluate, (start, y0), length=2)
    slope, slope1 = (jax.tree.map(lambda a, i=i: a[i], slopes) for i in range(2))
    d2 = norm(scaled(jax.tree.map(jnp.subtract, slope1, slope))) / h0
    largest = jnp.maximum(d1, d2)
    # If the field is not finite at the trial point, it may be finite before it, so the solver begins with a small step.
    unknown = (largest <= 1e-15) | ~jnp.isfinite(largest)
    h1 = jnp.where(unknown, jnp.maximum(1e-6, h0 * 1e-3), (0.01 / largest) ** (1 / 5))
    return jnp.minimum(100 * h0, h1).astype(start.dtype), slope


@jax.jit
def _steps_until(interval: _Interval, solve: _AdaptiveSolve, most_steps: Int[Array, ""] | int) -> _AdaptiveSolve:
    """Attempts steps until the end of the interval, or until `most_steps` have been attempted in total."""
    term, controller, end = interval.term(), interval.controller(), interval.end
    nearly_end = end - 100 * jnp.finfo(end.dtype).eps * jnp.abs(end)

    def unfinished(solve: _AdaptiveSolve) -> Bool[Array, ""]:
        return (solve.steps < most_steps) & (solve.t < end) & solve.healthy

    def attempt(solve: _AdaptiveSolve) -> _AdaptiveSolve:
        y, error, _, solver_state, solved = _DOPRI5.step(
            term, solve.t, solve.t_next, solve.y, None, solve.solver_state, made_jump=False
        )
        error = jax.tree.map(lambda a: jnp.where(jnp.isnan(a), jnp.inf, a), error)
        accepted, t, t_next, _, controller_state, _ = controller.adapt_step_size(
            solve.t,
            solve.t_next,
            solve.y,
            y,
            None,
            error,
            _ERROR_ORDER,
            solve.controller_state,  # pyright: ignore[reportArgumentType]
        )
        t = jnp.minimum(t, end)
        # A rejected step near the end must become shorter, too.
        t_next = jnp.where(t_next > nearly_end, jnp.where(accepted, end, t + 0.5 * (end - t)), t_next)
        y, solver_state = jax.tree.map(
            lambda new, old: jnp.where(accepted, new, old), (y, solver_state), (solve.y, solve.solver_state)
        )
        successful = diffrax.RESULTS.successful
        # A step below the rounding error of t does not change t.
        healthy = (~accepted | (solved == successful)) & ((t_next > t) | (t >= end))
        return _AdaptiveSolve(solve.steps + 1, t, t_next, y, healthy, solver_state, controller_state)  # pyright: ignore[reportArgumentType]

    return jax.lax.while_loop(unfinished, attempt, solve)


@jax.jit
def _end(interval: _Interval, solve: _AdaptiveSolve) -> tuple[PyTree, Info]:
    solved = solve.healthy & (solve.t >= interval.end) & is_finite(solve.y)
    # Six new stages in each step, one at the start, and one to choose the first step.
    nfe, t = 6 * solve.steps + 2, interval.direction * solve.t
    return solve.y, Info(nfe, solve.steps, solved, t, jnp.asarray(NO_EXAMPLE))
