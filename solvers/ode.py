"""Ordinary differential equations over pytrees: one function, four methods, and an explicit report of failures.

A field maps (t, y) to dy/dt, where t is a scalar and y a pytree of arrays whose first axis is the example. Preferably,
a field is a pytree itself (`jax.tree_util.Partial`, a registered dataclass) with the parameters of the network as
leaves. Then it is an argument of the compiled functions here, and new weights do not compile anything. A plain function
works too, and is compiled once for each function object.

The methods with fixed steps are here. The other files have those that use a library: diffrax on the devices, SciPy on
the host.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from arrays import ReportProgress, as_pytree, in_parts
from solvers.solve import NO_EXAMPLE, Field, Info, State, combine, is_finite, times_of_state, with_worst_example


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
    atol + rtol |y|, as SciPy does. So their steps depend on the batch, and their results change with the batch within
    the tolerance. With fixed steps, the result of one example does not depend on the others.

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
        this function works under jit. Call `Info.require_success` on the host.

    Raises:
        ValueError: unknown method, a tolerance or number of steps that is not positive, an odd number of steps for
            "adams", or as in `check_processes`.
    """
    methods = (*ADAPTIVE, *FIXED_STEP)
    if method not in methods:
        raise ValueError(f"unknown ODE method {method!r}; known: {', '.join(methods)}")
    if not (rtol > 0 and atol > 0 and num_steps > 0 and max_steps > 0):
        raise ValueError(
            f"need positive rtol, atol, num_steps, max_steps; got {rtol}, {atol}, {num_steps}, {max_steps}"
        )
    if method in FIXED_STEP and num_steps % FIXED_STEP[method].stride:
        raise ValueError(f'num_steps of "{method}" must be even, got {num_steps}')
    check_processes(method, "method")
    field = as_pytree(field)
    if method in ADAPTIVE:
        return ADAPTIVE[method]()(field, y0, t0, t1, rtol, atol, max_steps, progress)
    start, end = times_of_state(y0, t0, t1)
    return _fixed_steps(field, y0, start, end, num_steps, method, progress)


def _dopri5() -> Callable[..., tuple[Any, Info]]:
    from solvers.dormand_prince import dopri5  # diffrax takes half a second to import

    return dopri5


def _scipy() -> Callable[..., tuple[Any, Info]]:
    from solvers.scipy_rk45 import scipy_rk45  # SciPy's solvers take a quarter of a second to import

    return scipy_rk45


ADAPTIVE = {"dopri5": _dopri5, "scipy": _scipy}
"""Functions that import the solver of a method and return it, by the name of the method.

A solver is a function of field, y0, t0, t1, rtol, atol, max_steps and progress.
"""


def check_processes(method: str, field: str) -> None:
    """Raises ValueError if several processes would call the solver of SciPy. `field` is the setting that selects it."""
    if method == "scipy" and jax.process_count() > 1:
        raise ValueError(
            f"{field} asks for SciPy's solver, which runs on the host of a single process, but there are "
            f"{jax.process_count()}: use dopri5, the same method on the devices"
        )


class Node(NamedTuple):
    """The time and state of a fixed-step solve, and the derivatives there and at the two times before."""

    t: Float[Array, ""]
    y: PyTree
    slopes: tuple[PyTree, PyTree, PyTree]


def rk4_step(field: Field, node: Node, dt: Float[Array, ""], number: Int[Array, ""]) -> tuple[PyTree, PyTree]:
    """Returns the next state and derivative of the classical fourth-order Runge-Kutta method."""
    del number
    half, k1 = node.t + dt / 2, node.slopes[0]
    k2 = field(half, combine(node.y, dt, [1 / 2], [k1]))
    k3 = field(half, combine(node.y, dt, [1 / 2], [k2]))
    k4 = field(node.t + dt, combine(node.y, dt, [1], [k3]))
    y = combine(node.y, dt, [1 / 6, 1 / 3, 1 / 3, 1 / 6], [k1, k2, k3, k4])
    return y, field(node.t + dt, y)


# Weights of the derivatives, newest first. Row n is for n previous steps, so that the order rises to its final value.
ADAMS_BASHFORTH = np.array([[1, 0, 0], [3 / 2, -1 / 2, 0], [23 / 12, -16 / 12, 5 / 12]])
ADAMS_MOULTON = np.array([[1 / 2, 1 / 2, 0, 0], [5 / 12, 8 / 12, -1 / 12, 0], [9 / 24, 19 / 24, -5 / 24, 1 / 24]])


def adams_step(field: Field, node: Node, dt: Float[Array, ""], number: Int[Array, ""]) -> tuple[PyTree, PyTree]:
    """Returns the next state and derivative of Adams-Bashforth of order 3, corrected by Adams-Moulton of order 4.

    The derivative is evaluated at the predicted state, which differs from the corrected one by the error of a step.
    """
    past = jnp.minimum(number, 2)
    predicted = combine(node.y, dt, jnp.asarray(ADAMS_BASHFORTH, dt.dtype)[past], node.slopes)
    slope = field(node.t + dt, predicted)
    return combine(node.y, dt, jnp.asarray(ADAMS_MOULTON, dt.dtype)[past], [slope, *node.slopes]), slope


def adams_path(field: Field, y0: State, times: Float[Array, " n"]) -> State:
    """Solves dy/dt = field(t, y) from y0 by the steps of "adams" between equally spaced times, and keeps every state.

    For use under jit. The field is evaluated exactly once at each time.

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


class FixedStep(NamedTuple):
    """A fixed-step method."""

    step: Callable[..., tuple[PyTree, PyTree]]
    evaluations: int
    """Evaluations of the field in each step."""
    stride: int
    """Steps between every second evaluation time: the spacing of the nodes of the error estimate. It divides the number
    of steps."""


FIXED_STEP = {"rk4": FixedStep(rk4_step, 4, 1), "adams": FixedStep(adams_step, 1, 2)}
"""Methods with equal steps, by name."""


class _Grid(NamedTuple):
    """The constants of a solve with fixed steps, shared by its parts."""

    field: Field
    t0: Float[Array, ""]
    t1: Float[Array, ""]
    num_steps: Int[Array, ""] | int

    @property
    def dt(self) -> Float[Array, ""]:
        return (self.t1 - self.t0) / self.num_steps


class _FixedSolve(NamedTuple):
    """The state of a solve with fixed steps between two parts."""

    number: Int[Array, ""]
    """Steps taken; -1 before the derivative at the start is known."""
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
    """Takes `num_steps` equal steps of a method of `FIXED_STEP`, and estimates the error of the result."""
    grid = _Grid(field, t0, t1, num_steps)

    def advance(solve: _FixedSolve, _: int, last: int) -> _FixedSolve:
        return _steps_until(grid, solve, last, method=method)

    solve = in_parts(advance, _before_first_step(grid, y0, method=method), num_steps, progress)
    y, info = _end(grid, solve, method=method)
    return y, with_worst_example(field, info, y, t1 - t0)


@partial(jax.jit, static_argnames="method")
def _before_first_step(grid: _Grid, y0: PyTree, *, method: str) -> _FixedSolve:
    _, evaluations, stride = FIXED_STEP[method]
    if evaluations == 1:
        # `_steps_until` evaluates the field at y0 in a step of no length, so that the field is compiled only once.
        zero = jax.tree.map(jnp.zeros_like, y0)
        return _FixedSolve(jnp.int32(-1), Node(grid.t0, y0, (zero,) * 3), y0)
    slope = grid.field(grid.t0, y0)
    sampled = combine(y0, stride * grid.dt, [_gregory_weight(0, grid.num_steps // stride)], [slope])
    return _FixedSolve(jnp.int32(0), Node(grid.t0, y0, (slope,) * 3), sampled)


@partial(jax.jit, static_argnames="method")
def _steps_until(grid: _Grid, solve: _FixedSolve, last: Int[Array, ""] | int, *, method: str) -> _FixedSolve:
    """Takes steps until `last` steps have been taken in total, or until the state is not finite."""
    step, _, stride = FIXED_STEP[method]
    dt, num_nodes = grid.dt, grid.num_steps // stride

    def healthy(solve: _FixedSolve) -> Bool[Array, ""]:
        return (solve.number < last) & is_finite(solve.node.y)

    def advance(solve: _FixedSolve) -> _FixedSolve:
        number, node, sampled = solve
        starting = number < 0
        y, slope = step(grid.field, node, jnp.where(starting, 0, dt), jnp.maximum(number, 0))
        y = jax.tree.map(lambda start, end: jnp.where(starting, start, end), node.y, y)
        number = number + 1
        weight = jnp.where(number % stride == 0, _gregory_weight(number // stride, num_nodes), 0)
        sampled = combine(sampled, stride * dt, [weight], [slope])
        return _FixedSolve(number, Node(grid.t0 + number * dt, y, (slope, *node.slopes[:2])), sampled)

    return jax.lax.while_loop(healthy, advance, solve)


@partial(jax.jit, static_argnames="method")
def _end(grid: _Grid, solve: _FixedSolve, *, method: str) -> tuple[PyTree, Info]:
    number, node, sampled = solve
    steps, error = jnp.maximum(number, 0), jax.tree.map(jnp.subtract, node.y, sampled)
    solved = (steps == grid.num_steps) & is_finite(node.y)
    nfe = FIXED_STEP[method].evaluations * steps + 1
    return node.y, Info(nfe, steps, solved, node.t, jnp.asarray(NO_EXAMPLE), error)


def _gregory_weight(node: Int[Array, ""] | int, last: Int[Array, ""] | int) -> Float[Array, ""]:
    """The weight of a node in 0..last by Gregory's rule of third order, or by the trapezoid rule for few nodes.

    All inner weights are equal, which minimises the noise from an integrand that is too rough for the nodes.
    """
    from_end = jnp.minimum(node, last - node)
    gregory = jnp.array([3 / 8, 7 / 6, 23 / 24, 1.0])[jnp.minimum(from_end, 3)]
    return jnp.where(last >= 5, gregory, jnp.where(from_end == 0, 0.5, 1.0))
