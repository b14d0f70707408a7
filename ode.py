"""Ordinary differential equations over pytrees: one function, four methods, and an explicit report of failures.

A field maps (t, y) to dy/dt, where t is a scalar and y a pytree of arrays whose first axis is the example. Preferably,
a field is a pytree itself (`jax.tree_util.Partial`, a registered dataclass) with the parameters of the network as
leaves. Then it is an argument of the compiled functions here, and new weights do not compile anything. A plain function
works too, and is compiled once for each function object.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, TypeAlias, TypeVar

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree
from scipy.integrate import RK45

from arrays import ReportProgress, in_parts

State = TypeVar("State", bound=PyTree)
Function = TypeVar("Function", bound=Callable)
Field: TypeAlias = Callable[[Float[Array, ""], State], State]

METHODS = ("dopri5", "scipy", "rk4", "adams")


class Info(NamedTuple):
    """The cost of a solve, and whether it succeeded."""

    nfe: Int[Array, ""]
    """Evaluations of the field, including those of rejected steps."""
    steps: Int[Array, ""]
    """Attempted steps."""
    success: Bool[Array, ""]
    """Whether the solve reached its end with a finite state."""
    t: Float[Array, ""]
    """The time at which the solve stopped."""
    worst_example: Int[Array, ""]
    """The example that probably caused a failure; -1 after a success.

    It is the first example whose state or derivative just after t is not finite or, if all are finite, the one with the
    largest derivative."""
    error_estimate: PyTree = None
    """An estimate of the error of y1 with fixed steps, with the same structure as y1; None for adaptive methods.

    It is the difference between y1 and the integral of dy/dt by a rule that uses only every second time. If dy/dt is
    too rough for the steps, as for networks that resolve time finely, it has the size of the error. If dy/dt is smooth,
    it has the size of the error for "adams", and is several times larger for "rk4"."""


def integrate(
    field: Field,
    y0: State,
    t0: float | Float[Array, ""],
    t1: float | Float[Array, ""],
    *,
    method: str = "dopri5",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    num_steps: int = 100,
    max_steps: int = 10_000,
    progress: ReportProgress | None = None,
) -> tuple[State, Info]:
    """Solves dy/dt = field(t, y) from y(t0) = y0 to t1, forward or backward.

    Adaptive methods control the root mean square, over the WHOLE state of all examples, of the error relative to
    atol + rtol |y|, as SciPy does. So their steps depend on the batch, and their results do within the tolerance. With
    fixed steps, the result of one example does not depend on the others.

    Args:
        method: "dopri5", Dormand-Prince 5(4) on the device, with the step-size rules of SciPy's RK45;
            "scipy", RK45 itself, with steps in float64 on the host of a single process, the published protocol, which
            cannot be called under jit;
            "rk4", classical Runge-Kutta in `num_steps` equal steps of 4 evaluations;
            "adams", the fourth-order Adams-Bashforth-Moulton pair (predict, evaluate, correct) in `num_steps` equal
            steps of 1 evaluation, useful if dy/dt is rougher than y and has to be evaluated often.
        rtol, atol: tolerances of the adaptive methods.
        max_steps: the number of attempted steps after which an adaptive method fails.
        progress: called between parts of the solve, with the number of fixed steps, or the percentage of the interval
            that an adaptive method has passed. It cannot be used under jit.

    Returns:
        y at the time at which the solve stopped, and the report of the solve. A failed solve does not raise, so that
        this function works under jit. Pass the second result to `require_success` on the host.

    Raises:
        ValueError: unknown method, a tolerance or number of steps that is not positive, an odd number for "adams", or
            as in `check_processes`.
    """
    if method not in METHODS:
        raise ValueError(f"unknown ODE method {method!r}; known: {', '.join(METHODS)}")
    if not (rtol > 0 and atol > 0 and num_steps > 0 and max_steps > 0):
        raise ValueError(
            f"need positive rtol, atol, num_steps, max_steps; got {rtol}, {atol}, {num_steps}, {max_steps}"
        )
    if method == "adams" and num_steps % 2:
        raise ValueError(f'num_steps of "adams" must be even, got {num_steps}')
    check_processes(method, "method")
    field = as_pytree(field)
    dtype = jnp.result_type(*jax.tree.leaves(y0), jnp.float32)
    start, end = jnp.asarray(t0, dtype), jnp.asarray(t1, dtype)
    if method in FIXED_STEP:
        return _fixed_steps(field, y0, start, end, num_steps, method, progress)
    if method == "dopri5":
        return _dopri5(field, y0, start, end, rtol, atol, max_steps, progress)
    return _scipy_rk45(field, y0, float(t0), float(t1), rtol, atol, max_steps, progress)


def check_processes(method: str, field: str) -> None:
    """Raises ValueError if several processes would call the solver of SciPy. `field` is the setting that selects it."""
    if method == "scipy" and jax.process_count() > 1:
        raise ValueError(
            f"{field} asks for SciPy's solver, which runs on the host of a single process, but there are "
            f"{jax.process_count()}: use dopri5, the same method on the devices"
        )


def require_success(info: Info) -> None:
    """Raises RuntimeError if the solve failed, with the time and the probable example; on the host only."""
    if not bool(info.success):
        raise RuntimeError(
            f"the ODE solve failed at t = {float(info.t):.6g} after {int(info.steps)} steps; example "
            f"{int(info.worst_example)} has the largest derivative there, or one that is not finite"
        )


def as_pytree(function: Function) -> Function:
    """Makes a callable an argument of jit: returns it if it is a pytree of arrays, otherwise wraps it as one."""
    is_leaf = jax.tree.all(jax.tree.map(lambda leaf: leaf is function, function))
    return jax.tree_util.Partial(function) if is_leaf and jax.tree.leaves(function) else function  # pyright: ignore[reportReturnType]


class Node(NamedTuple):
    """The time and state of a fixed-step solve, and the derivatives there and at the two times before."""

    t: Float[Array, ""]
    y: PyTree
    slopes: tuple[PyTree, PyTree, PyTree]


def rk4_step(field: Field, node: Node, dt: Float[Array, ""], number: Int[Array, ""]) -> tuple[PyTree, PyTree]:
    """Returns the next state and derivative of the classical fourth-order Runge-Kutta method."""
    del number
    half, k1 = node.t + dt / 2, node.slopes[0]
    k2 = field(half, _combine(node.y, dt, [1 / 2], [k1]))
    k3 = field(half, _combine(node.y, dt, [1 / 2], [k2]))
    k4 = field(node.t + dt, _combine(node.y, dt, [1], [k3]))
    y = _combine(node.y, dt, [1 / 6, 1 / 3, 1 / 3, 1 / 6], [k1, k2, k3, k4])
    return y, field(node.t + dt, y)


# Weights of the derivatives, newest first. Row n is for n previous steps, so that the order rises to its final value.
ADAMS_BASHFORTH = np.array([[1, 0, 0], [3 / 2, -1 / 2, 0], [23 / 12, -16 / 12, 5 / 12]])
ADAMS_MOULTON = np.array([[1 / 2, 1 / 2, 0, 0], [5 / 12, 8 / 12, -1 / 12, 0], [9 / 24, 19 / 24, -5 / 24, 1 / 24]])


def adams_step(field: Field, node: Node, dt: Float[Array, ""], number: Int[Array, ""]) -> tuple[PyTree, PyTree]:
    """Returns the next state and derivative of Adams-Bashforth of order 3, corrected by Adams-Moulton of order 4.

    The derivative is evaluated at the predicted state, which differs from the corrected one by the error of a step.
    """
    past = jnp.minimum(number, 2)
    predicted = _combine(node.y, dt, jnp.asarray(ADAMS_BASHFORTH)[past], node.slopes)
    slope = field(node.t + dt, predicted)
    return _combine(node.y, dt, jnp.asarray(ADAMS_MOULTON)[past], [slope, *node.slopes]), slope


def _combine(y: PyTree, dt: Float[Array, ""], weights: Iterable[float | Array], slopes: Iterable[PyTree]) -> PyTree:
    """y plus dt times the weighted sum of slopes."""

    def combine(y: Array, *slopes: Array) -> Array:
        return y + (dt * sum(w * k for w, k in zip(weights, slopes, strict=True))).astype(y.dtype)

    return jax.tree.map(combine, y, *slopes)


def adams_path(field: Field, y0: State, times: Float[Array, " n"]) -> State:
    """Solves dy/dt = field(t, y) from y0 by the steps of "adams" between equally spaced times, and keeps every state.

    For use under jit. The field is evaluated once at each time, and nowhere else.

    Returns:
        The state at each of `times`, on a new first axis. If the solve fails, they are not finite.
    """
    dt = times[1] - times[0]

    def advance(node: Node, step: tuple[Int[Array, ""], Float[Array, ""]]) -> tuple[Node, State]:
        number, t = step
        # The first step has no length. It evaluates the field at y0, so that the field is compiled only once.
        length = jnp.where(number == 0, 0, dt)
        y, slope = adams_step(lambda _, y: field(t, y), node, length, jnp.maximum(number - 1, 0))
        return Node(t, y, (slope, *node.slopes[:2])), y

    zero = jax.tree.map(jnp.zeros_like, y0)
    return jax.lax.scan(advance, Node(times[0], y0, (zero, zero, zero)), (jnp.arange(len(times)), times))[1]


class _FixedStep(NamedTuple):
    """A fixed-step method."""

    step: Callable[..., tuple[PyTree, PyTree]]
    evaluations: int
    """Evaluations of the field in each step."""
    stride: int
    """Steps between every second evaluation time: the spacing of the nodes of the error estimate."""


FIXED_STEP = {"rk4": _FixedStep(rk4_step, 4, 1), "adams": _FixedStep(adams_step, 1, 2)}


class _FixedSolve(NamedTuple):
    """A solve with fixed steps between two parts."""

    number: Int[Array, ""]
    """Steps taken."""
    node: Node
    sampled: PyTree
    """The integral of dy/dt by the rule of the error estimate, so far."""


def _fixed_steps(
    field: Field,
    y0: State,
    t0: Float[Array, ""],
    t1: Float[Array, ""],
    num_steps: int,
    method: str,
    progress: ReportProgress | None,
) -> tuple[State, Info]:
    def advance(solve: _FixedSolve, first: int, last: int) -> _FixedSolve:
        del first
        return _fixed_steps_until(field, solve, t0, t1, num_steps, last, method=method)

    solve = in_parts(advance, _first_node(field, y0, t0, t1, num_steps, method=method), num_steps, progress)
    return _end_of_fixed_steps(field, solve, t0, t1, num_steps, method=method)


@partial(jax.jit, static_argnames="method")
def _first_node(
    field: Field,
    y0: PyTree,
    t0: Float[Array, ""],
    t1: Float[Array, ""],
    num_steps: Int[Array, ""] | int,
    *,
    method: str,
) -> _FixedSolve:
    stride, slope = FIXED_STEP[method].stride, field(t0, y0)
    weight = stride * (t1 - t0) / num_steps
    sampled = _combine(y0, weight, [_gregory_weight(0, num_steps // stride)], [slope])
    return _FixedSolve(jnp.int32(0), Node(t0, y0, (slope,) * 3), sampled)


@partial(jax.jit, static_argnames="method")
def _fixed_steps_until(
    field: Field,
    solve: _FixedSolve,
    t0: Float[Array, ""],
    t1: Float[Array, ""],
    num_steps: Int[Array, ""] | int,
    last: Int[Array, ""] | int,
    *,
    method: str,
) -> _FixedSolve:
    step, _, stride = FIXED_STEP[method]
    dt = (t1 - t0) / num_steps

    def healthy(solve: _FixedSolve) -> Bool[Array, ""]:
        return (solve.number < last) & _is_finite(solve.node.y)

    def advance(solve: _FixedSolve) -> _FixedSolve:
        number, node, sampled = solve
        y, slope = step(field, node, dt, number)
        number = number + 1
        weight = jnp.where(number % stride == 0, _gregory_weight(number // stride, num_steps // stride), 0)
        sampled = _combine(sampled, stride * dt, [weight], [slope])
        return _FixedSolve(number, Node(t0 + number * dt, y, (slope, *node.slopes[:2])), sampled)

    return jax.lax.while_loop(healthy, advance, solve)


@partial(jax.jit, static_argnames="method")
def _end_of_fixed_steps(
    field: Field,
    solve: _FixedSolve,
    t0: Float[Array, ""],
    t1: Float[Array, ""],
    num_steps: Int[Array, ""] | int,
    *,
    method: str,
) -> tuple[PyTree, Info]:
    steps, node, sampled = solve
    solved = (steps == num_steps) & _is_finite(node.y)
    info = _info(field, node.t, node.y, t1 - t0, solved, FIXED_STEP[method].evaluations * steps + 1, steps)
    return node.y, info._replace(error_estimate=jax.tree.map(jnp.subtract, node.y, sampled))


def _gregory_weight(node: Int[Array, ""] | int, last: Int[Array, ""] | int) -> Float[Array, ""]:
    """The weight of a node in 0..last by Gregory's rule of third order, or by the trapezoid rule for few nodes.

    All inner weights are equal, which minimises the noise from an integrand that is too rough for the nodes.
    """
    from_end = jnp.minimum(node, last - node)
    gregory = jnp.array([3 / 8, 7 / 6, 23 / 24, 1.0])[jnp.minimum(from_end, 3)]
    return jnp.where(last >= 5, gregory, jnp.where(from_end == 0, 0.5, 1.0))


class _AdaptiveSolve(NamedTuple):
    """A solve with adaptive steps between two parts. Times are multiplied by the direction of time, and so increase."""

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
    """What the parts of an adaptive solve have in common."""

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
            # A step below the rounding error of t does not change t.
            dtmin=0.1 * jnp.finfo(self.t0.dtype).eps * jnp.abs(self.t1 - self.t0),
            force_dtmin=False,
        )


_DOPRI5, _ERROR_ORDER = diffrax.Dopri5(), 5
"""The method, and the order of the error estimate of its embedded formula, which the step size control uses."""


def _dopri5(
    field: Field,
    y0: State,
    t0: Float[Array, ""],
    t1: Float[Array, ""],
    rtol: float,
    atol: float,
    max_steps: int,
    progress: ReportProgress | None,
) -> tuple[State, Info]:
    """Runs diffrax's steps in a loop of our own, which can be left and entered again between steps."""
    interval = _Interval(field, t0, t1, rtol, atol)
    solve = _before_first_step(interval, y0)
    first, length = solve.t, interval.end - solve.t

    def advance(solve: _AdaptiveSolve, _: int, last: int) -> _AdaptiveSolve:
        return _adaptive_steps_until(interval, solve, last)

    def percentage(solve: _AdaptiveSolve) -> tuple[int, int]:
        return (int(100 * (solve.t - first) / length) if solve.healthy else 100), 100

    solve = in_parts(advance, solve, max_steps, progress, percentage)
    return _end_of_adaptive_steps(interval, solve)


@jax.jit
def _before_first_step(interval: _Interval, y0: PyTree) -> _AdaptiveSolve:
    term, controller, start = interval.term(), interval.controller(), interval.direction * interval.t0
    slope = term.vf(start, y0, None)
    size = _first_step_size(interval, y0, slope)
    t_next, controller_state = controller.init(term, start, interval.end, y0, size, None, _DOPRI5.func, _ERROR_ORDER)
    # The state of the solver says that this is not a step without a derivative, because there is one: `slope`.
    solver_state = jnp.asarray(False), slope
    t_next = jnp.minimum(t_next, interval.end)
    return _AdaptiveSolve(jnp.int32(0), start, t_next, y0, jnp.isfinite(t_next), solver_state, controller_state)


def _first_step_size(interval: _Interval, y0: State, slope: State) -> Float[Array, ""]:
    """The size of the first step by the rule of SciPy's RK45 (Hairer, Norsett and Wanner, Sec. II.4)."""
    term, start, norm = interval.term(), interval.direction * interval.t0, diffrax.PIDController(1, 1).norm
    scaled = partial(jax.tree.map, lambda y, a: a / (interval.atol + interval.rtol * jnp.abs(y)), y0)
    d0, d1 = norm(scaled(y0)), norm(scaled(slope))
    h0 = jnp.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
    h0 = jnp.minimum(h0, interval.end - start)
    slope1 = term.vf(start + h0, _combine(y0, h0, [1], [slope]), None)
    d2 = norm(scaled(jax.tree.map(jnp.subtract, slope1, slope))) / h0
    largest = jnp.maximum(d1, d2)
    # A field that is not finite at the trial point may be finite before it, so the solver begins with a small step.
    unknown = (largest <= 1e-15) | ~jnp.isfinite(largest)
    h1 = jnp.where(unknown, jnp.maximum(1e-6, h0 * 1e-3), (0.01 / largest) ** (1 / 5))
    return jnp.minimum(100 * h0, h1).astype(start.dtype)


@jax.jit
def _adaptive_steps_until(
    interval: _Interval, solve: _AdaptiveSolve, most_steps: Int[Array, ""] | int
) -> _AdaptiveSolve:
    """Attempts steps until the end of the interval, or until `most_steps` were attempted since its beginning."""
    term, controller, end = interval.term(), interval.controller(), interval.end
    nearly_end = end - 100 * jnp.finfo(end.dtype).eps * jnp.abs(end)

    def unfinished(solve: _AdaptiveSolve) -> Bool[Array, ""]:
        return (solve.steps < most_steps) & (solve.t < end) & solve.healthy

    def attempt(solve: _AdaptiveSolve) -> _AdaptiveSolve:
        y, error, _, solver_state, solved = _DOPRI5.step(
            term, solve.t, solve.t_next, solve.y, None, solve.solver_state, made_jump=False
        )
        error = jax.tree.map(lambda a: jnp.where(jnp.isnan(a), jnp.inf, a), error)
        accepted, t, t_next, _, controller_state, controlled = controller.adapt_step_size(
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
        healthy = (~accepted | (solved == successful)) & (controlled == successful)
        return _AdaptiveSolve(solve.steps + 1, t, t_next, y, healthy, solver_state, controller_state)  # pyright: ignore[reportArgumentType]

    return jax.lax.while_loop(unfinished, attempt, solve)


@jax.jit
def _end_of_adaptive_steps(interval: _Interval, solve: _AdaptiveSolve) -> tuple[PyTree, Info]:
    field, t0, t1 = interval[:3]
    solved = solve.healthy & (solve.t >= interval.end) & _is_finite(solve.y)
    # Six new stages in each step, one at the start, and one to choose the first step.
    nfe, t = 6 * solve.steps + 2, interval.direction * solve.t
    return solve.y, _info(field, t, solve.y, t1 - t0, solved, nfe, solve.steps)


def _scipy_rk45(
    field: Field,
    y0: State,
    t0: float,
    t1: float,
    rtol: float,
    atol: float,
    max_steps: int,
    progress: ReportProgress | None,
) -> tuple[State, Info]:
    """Runs SciPy's RK45 step by step, because solve_ivp would store every intermediate state."""
    flat0, unravel = ravel_pytree(y0)

    def state(flat: np.ndarray) -> State:
        return jax.tree.map(_spread_as, unravel(jnp.asarray(flat, flat0.dtype)), y0)

    def derivative(t: float, flat: np.ndarray) -> np.ndarray:
        dy = _evaluate(field, jnp.asarray(t, flat0.dtype), state(flat))
        return np.asarray(ravel_pytree(dy)[0], np.float64)

    if not bool(_is_finite(y0)):  # SciPy would raise an exception.
        zero = jnp.int32(0)
        return y0, _info(field, jnp.asarray(t0, flat0.dtype), y0, t1 - t0, jnp.asarray(False), zero, zero)
    solver = RK45(derivative, t0, np.asarray(flat0, np.float64), t1, rtol=rtol, atol=atol)
    # If the first derivative is not finite, SciPy would reduce a first step of NaN forever.
    healthy = bool(np.isfinite(solver.f).all())
    while healthy and solver.status == "running" and _attempted_steps(solver) < max_steps:
        solver.step()
        if progress is not None:
            progress(int(100 * (solver.t - t0) / (t1 - t0)), 100)
    y = state(solver.y)
    solved = jnp.asarray(solver.status == "finished" and bool(_is_finite(y)))
    nfe, steps = jnp.int32(solver.nfev), jnp.int32(_attempted_steps(solver))
    return y, _info(field, jnp.asarray(solver.t, flat0.dtype), y, t1 - t0, solved, nfe, steps)


def _attempted_steps(solver: RK45) -> int:
    return (solver.nfev - 2) // 6


@jax.jit
def _evaluate(field: Field, t: Float[Array, ""], y: State) -> State:
    return field(t, y)


def _spread_as(array: Array, like: Array | np.ndarray) -> Array:
    """Shards the array as `like`, if that is on several devices."""
    if isinstance(like, jax.Array) and len(like.sharding.device_set) > 1:
        return jax.device_put(array, like.sharding)
    return array


def _is_finite(y: PyTree) -> Bool[Array, ""]:
    return jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda a: jnp.all(jnp.isfinite(a)), y))


@jax.jit
def _info(
    field: Field,
    t: Float[Array, ""],
    y: PyTree,
    span: Float[Array, ""],
    success: Bool[Array, ""],
    nfe: Int[Array, ""],
    steps: Int[Array, ""],
) -> Info:
    """Fills in the report of a solve, and finds the worst example after a failure."""

    def worst_example() -> Int[Array, ""]:
        # Just after t, because a solver stops before the time at which a field breaks.
        derivative = field(t + 1e-6 * span, y)
        return jnp.argmax(sum(jax.tree.leaves(jax.tree.map(_size, derivative, y)))).astype(jnp.int32)

    return Info(nfe, steps, success, t, jax.lax.cond(success, lambda: jnp.int32(-1), worst_example))


def _size(derivative: Array, y: Array) -> Float[Array, " batch"]:
    """The largest |derivative| of each example, infinite if a derivative or y is not finite."""
    size = jnp.where(jnp.isfinite(y), jnp.abs(derivative), jnp.inf)
    return jnp.max(jnp.where(jnp.isnan(size), jnp.inf, size), axis=tuple(range(1, y.ndim)))
