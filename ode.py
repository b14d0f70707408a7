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
        return _fixed_steps(field, y0, start, end, num_steps, method=method)
    if method == "dopri5":
        return _dopri5(field, y0, start, end, rtol, atol, max_steps)
    return _scipy_rk45(field, y0, float(t0), float(t1), rtol, atol, max_steps)


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


class _Node(NamedTuple):
    """The time and state of a fixed-step solve, and the derivatives there and at the two times before."""

    t: Float[Array, ""]
    y: PyTree
    slopes: tuple[PyTree, PyTree, PyTree]


def rk4_step(field: Field, node: _Node, dt: Float[Array, ""], number: Int[Array, ""]) -> tuple[PyTree, PyTree]:
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


def adams_step(field: Field, node: _Node, dt: Float[Array, ""], number: Int[Array, ""]) -> tuple[PyTree, PyTree]:
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


class _FixedStep(NamedTuple):
    """A fixed-step method."""

    step: Callable[..., tuple[PyTree, PyTree]]
    evaluations: int
    """Evaluations of the field in each step."""
    stride: int
    """Steps between every second evaluation time: the spacing of the nodes of the error estimate."""


FIXED_STEP = {"rk4": _FixedStep(rk4_step, 4, 1), "adams": _FixedStep(adams_step, 1, 2)}


@partial(jax.jit, static_argnames="method")
def _fixed_steps(
    field: Field, y0: State, t0: Float[Array, ""], t1: Float[Array, ""], num_steps: Int[Array, ""] | int, *, method: str
) -> tuple[State, Info]:
    step, evaluations, stride = FIXED_STEP[method]
    dt = (t1 - t0) / num_steps
    slope = field(t0, y0)
    sampled = _combine(y0, stride * dt, [_gregory_weight(0, num_steps // stride)], [slope])

    def healthy(loop: tuple[Int[Array, ""], _Node, State]) -> Bool[Array, ""]:
        return (loop[0] < num_steps) & _is_finite(loop[1].y)

    def advance(loop: tuple[Int[Array, ""], _Node, State]) -> tuple[Int[Array, ""], _Node, State]:
        number, node, sampled = loop
        y, slope = step(field, node, dt, number)
        number = number + 1
        weight = jnp.where(number % stride == 0, _gregory_weight(number // stride, num_steps // stride), 0)
        sampled = _combine(sampled, stride * dt, [weight], [slope])
        return number, _Node(t0 + number * dt, y, (slope, *node.slopes[:2])), sampled

    start = (jnp.int32(0), _Node(t0, y0, (slope,) * 3), sampled)
    steps, node, sampled = jax.lax.while_loop(healthy, advance, start)
    solved = (steps == num_steps) & _is_finite(node.y)
    info = _info(field, node.t, node.y, t1 - t0, solved, evaluations * steps + 1, steps)
    return node.y, info._replace(error_estimate=jax.tree.map(jnp.subtract, node.y, sampled))


def _gregory_weight(node: Int[Array, ""] | int, last: Int[Array, ""] | int) -> Float[Array, ""]:
    """The weight of a node in 0..last by Gregory's rule of third order, or by the trapezoid rule for few nodes.

    All inner weights are equal, which minimises the noise from an integrand that is too rough for the nodes.
    """
    from_end = jnp.minimum(node, last - node)
    gregory = jnp.array([3 / 8, 7 / 6, 23 / 24, 1.0])[jnp.minimum(from_end, 3)]
    return jnp.where(last >= 5, gregory, jnp.where(from_end == 0, 0.5, 1.0))


@partial(jax.jit, static_argnames="max_steps")
def _dopri5(
    field: Field,
    y0: State,
    t0: Float[Array, ""],
    t1: Float[Array, ""],
    rtol: float | Float[Array, ""],
    atol: float | Float[Array, ""],
    max_steps: int,
) -> tuple[State, Info]:
    controller = diffrax.PIDController(
        rtol=rtol,
        atol=atol,
        pcoeff=0.0,
        icoeff=1.0,
        dcoeff=0.0,
        safety=0.9,
        factormin=0.2,
        factormax=10.0,
        # A step below the rounding error of t does not change t.
        dtmin=0.1 * jnp.finfo(t0.dtype).eps * jnp.abs(t1 - t0),
        force_dtmin=False,
    )
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, field: field(t, y)),
        diffrax.Dopri5(),
        t0,
        t1,
        None,
        y0,
        args=field,
        stepsize_controller=controller,
        adjoint=diffrax.ForwardMode(),
        max_steps=max_steps,
        throw=False,  # The host callbacks of True would gather a sharded state.
    )
    assert solution.ys is not None
    assert solution.ts is not None
    y = jax.tree.map(lambda a: a[-1], solution.ys)
    t = solution.ts[-1]
    solved = solution.result == diffrax.RESULTS.successful
    steps = solution.stats["num_steps"]
    # Six new stages in each step, one at the start, and one to choose the first step.
    return y, _info(field, t, y, t1 - t0, solved & _is_finite(y), 6 * steps + 2, steps)


def _scipy_rk45(
    field: Field, y0: State, t0: float, t1: float, rtol: float, atol: float, max_steps: int
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
