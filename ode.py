"""Ordinary differential equations over pytrees: one call, four methods, and failure that cannot be overlooked.

A field maps (t, y) to dy/dt, where t is a scalar and y a pytree of arrays; the first axis of an array is the example.
A field is best a pytree itself (`jax.tree_util.Partial`, a registered dataclass) that holds the network's parameters
as leaves: it is then an argument of what is compiled here, and new weights compile nothing anew. A plain function
works too and is compiled once for each function object.
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
    """What a solve cost and whether it reached its end."""

    nfe: Int[Array, ""]
    """Evaluations of the field, those of rejected steps included."""
    steps: Int[Array, ""]
    """Attempted steps."""
    success: Bool[Array, ""]
    """The end was reached and the state there is finite."""
    t: Float[Array, ""]
    """Where the solve stopped."""
    worst_example: Int[Array, ""]
    """After a failure, the first example whose state or derivative just after t is not finite or, if there is none,
    the one whose derivative is the largest; -1 after a success."""
    error_estimate: PyTree = None
    """Of fixed steps, an estimate of the error of y1, of the same structure: its difference to the integral of dy/dt by
    a rule that uses every second of the times only. Where dy/dt is too rough for the steps, as networks are that
    resolve time finely, it is of the size of the error; where dy/dt is smooth, so it is for "adams", and for "rk4"
    several times larger."""


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

    Adaptive methods control the root mean square over the WHOLE state, all examples together, of the error relative
    to atol + rtol |y|, as SciPy does: their steps, and so to within the tolerance their results, depend on the batch.
    A fixed-step solve of one example does not depend on the others.

    Args:
        method: "dopri5", Dormand-Prince 5(4) on the device, with the step-size rules of SciPy's RK45;
            "scipy", that RK45 itself, stepping in float64 on the host of a single process: the published protocol,
            which cannot be called under jit; "rk4", classical Runge-Kutta in `num_steps` equal steps, 4 evaluations
            each; "adams", the fourth-order Adams-Bashforth-Moulton pair (predict, evaluate, correct) in `num_steps`
            equal steps, 1 evaluation each: of use where dy/dt is rougher than y and needs to be seen often.
        rtol, atol: tolerances of the adaptive methods.
        max_steps: attempted steps after which an adaptive method gives up.

    Returns:
        y where the solve stopped, and how it went. A failed solve raises nothing, so that this works under jit:
        pass the second result to `require_success` on the host.

    Raises:
        ValueError: unknown method, a tolerance or number of steps that is not positive, an odd number for "adams";
            that of `check_processes`.
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
    """Raises ValueError, naming the field that asks for it, if several processes would call SciPy's solver."""
    if method == "scipy" and jax.process_count() > 1:
        raise ValueError(
            f"{field} asks for SciPy's solver, which steps on the host of a single process, but there are "
            f"{jax.process_count()}: use dopri5, the same on the devices"
        )


def require_success(info: Info) -> None:
    """Raises RuntimeError, naming the time and the example to look at, unless the solve succeeded; on the host only."""
    if not bool(info.success):
        raise RuntimeError(
            f"the ODE solve failed at t = {float(info.t):.6g} after {int(info.steps)} steps; example "
            f"{int(info.worst_example)} has the largest derivative there, or one that is not finite"
        )


def as_pytree(function: Function) -> Function:
    """The callable itself if it is a pytree of arrays, else wrapped to be one without leaves: a jit-able argument."""
    is_leaf = jax.tree.all(jax.tree.map(lambda leaf: leaf is function, function))
    return jax.tree_util.Partial(function) if is_leaf and jax.tree.leaves(function) else function  # pyright: ignore[reportReturnType]


class _Node(NamedTuple):
    """Where a fixed-step solve is: the time, the state, and the derivatives here and at up to two steps before."""

    t: Float[Array, ""]
    y: PyTree
    slopes: tuple[PyTree, PyTree, PyTree]


def rk4_step(field: Field, node: _Node, dt: Float[Array, ""], number: Int[Array, ""]) -> tuple[PyTree, PyTree]:
    """One step of the classical fourth-order Runge-Kutta method: the next state and derivative."""
    del number
    half, k1 = node.t + dt / 2, node.slopes[0]
    k2 = field(half, _combine(node.y, dt, [1 / 2], [k1]))
    k3 = field(half, _combine(node.y, dt, [1 / 2], [k2]))
    k4 = field(node.t + dt, _combine(node.y, dt, [1], [k3]))
    y = _combine(node.y, dt, [1 / 6, 1 / 3, 1 / 3, 1 / 6], [k1, k2, k3, k4])
    return y, field(node.t + dt, y)


# Weights of the derivatives, newest first, by how many steps went before: the orders rise as the past allows.
ADAMS_BASHFORTH = np.array([[1, 0, 0], [3 / 2, -1 / 2, 0], [23 / 12, -16 / 12, 5 / 12]])
ADAMS_MOULTON = np.array([[1 / 2, 1 / 2, 0, 0], [5 / 12, 8 / 12, -1 / 12, 0], [9 / 24, 19 / 24, -5 / 24, 1 / 24]])


def adams_step(field: Field, node: _Node, dt: Float[Array, ""], number: Int[Array, ""]) -> tuple[PyTree, PyTree]:
    """One step of Adams-Bashforth of order 3, evaluated, then Adams-Moulton of order 4.

    The derivative is that at the predicted state: the corrected one differs by the error of a step.
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
    step: Callable[..., tuple[PyTree, PyTree]]
    evaluations: int
    """Of the field, for each step."""
    stride: int
    """Steps between the nodes that stand for every second time of evaluation."""


FIXED_STEP = {"rk4": _FixedStep(rk4_step, 4, 1), "adams": _FixedStep(adams_step, 1, 2)}


@partial(jax.jit, static_argnames="method")
def _fixed_steps(
    field: Field, y0: State, t0: Float[Array, ""], t1: Float[Array, ""], num_steps: int, *, method: str
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
    """The weight of node 0..last in Gregory's rule of third order; in the trapezoid rule if there are few nodes.

    All inner weights are equal: the least noise from an integrand too rough for the nodes.
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
    rtol: float,
    atol: float,
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
        # Below the rounding of t a step goes nowhere.
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
        throw=False,  # its host callbacks would gather a sharded state
    )
    assert solution.ys is not None
    assert solution.ts is not None
    y = jax.tree.map(lambda a: a[-1], solution.ys)
    t = solution.ts[-1]
    solved = solution.result == diffrax.RESULTS.successful
    steps = solution.stats["num_steps"]
    # Six new stages a step, one at the start, one more to choose the first step.
    return y, _info(field, t, y, t1 - t0, solved & _is_finite(y), 6 * steps + 2, steps)


def _scipy_rk45(
    field: Field, y0: State, t0: float, t1: float, rtol: float, atol: float, max_steps: int
) -> tuple[State, Info]:
    """SciPy's RK45, step by step: solve_ivp with the same solver would keep every state on the way."""
    flat0, unravel = ravel_pytree(y0)

    def state(flat: np.ndarray) -> State:
        return jax.tree.map(_spread_as, unravel(jnp.asarray(flat, flat0.dtype)), y0)

    def derivative(t: float, flat: np.ndarray) -> np.ndarray:
        dy = _evaluate(field, jnp.asarray(t, flat0.dtype), state(flat))
        return np.asarray(ravel_pytree(dy)[0], np.float64)

    if not bool(_is_finite(y0)):  # SciPy refuses this with an exception
        zero = jnp.int32(0)
        return y0, _info(field, jnp.asarray(t0, flat0.dtype), y0, t1 - t0, jnp.asarray(False), zero, zero)
    solver = RK45(derivative, t0, np.asarray(flat0, np.float64), t1, rtol=rtol, atol=atol)
    # Without a finite derivative at the start SciPy would shrink a first step of NaN for ever.
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
    """The array over the devices that `like` is on, if these are several."""
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
    def worst_example() -> Int[Array, ""]:
        # Just after t: a solver stops short of where a field ends.
        derivative = field(t + 1e-6 * span, y)
        return jnp.argmax(sum(jax.tree.leaves(jax.tree.map(_size, derivative, y)))).astype(jnp.int32)

    return Info(nfe, steps, success, t, jax.lax.cond(success, lambda: jnp.int32(-1), worst_example))


def _size(derivative: Array, y: Array) -> Float[Array, " batch"]:
    """Largest |derivative| of each example, infinite where it or y is not finite."""
    size = jnp.where(jnp.isfinite(y), jnp.abs(derivative), jnp.inf)
    return jnp.max(jnp.where(jnp.isnan(size), jnp.inf, size), axis=tuple(range(1, y.ndim)))
