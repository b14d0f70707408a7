"""What the methods have in common: states that are pytrees, and the report of a solve."""

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

State = TypeVar("State", bound=PyTree)
Field: TypeAlias = Callable[[Float[Array, ""], State], State]


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


def combine(y: PyTree, dt: Float[Array, ""], weights: Iterable[float | Array], slopes: Iterable[PyTree]) -> PyTree:
    """y plus dt times the weighted sum of slopes."""

    def add(y: Array, *slopes: Array) -> Array:
        return y + (dt * sum(w * k for w, k in zip(weights, slopes, strict=True))).astype(y.dtype)

    return jax.tree.map(add, y, *slopes)


def is_finite(y: PyTree) -> Bool[Array, ""]:
    return jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda a: jnp.all(jnp.isfinite(a)), y))


def report_of(
    field: Field,
    t: Float[Array, ""],
    y: PyTree,
    span: float | Float[Array, ""],
    success: Bool[Array, ""],
    nfe: Int[Array, ""],
    steps: Int[Array, ""],
) -> Info:
    """Fills in the report of a solve, and finds the worst example after a failure.

    That needs the field. Outside jit, a successful solve does not compile it for this.
    """
    if not isinstance(success, jax.core.Tracer) and bool(success):
        return Info(nfe, steps, success, t, jnp.int32(-1))
    return _report_with_example(field, t, y, span, success, nfe, steps)


@jax.jit
def _report_with_example(
    field: Field,
    t: Float[Array, ""],
    y: PyTree,
    span: Float[Array, ""],
    success: Bool[Array, ""],
    nfe: Int[Array, ""],
    steps: Int[Array, ""],
) -> Info:
    def worst_example() -> Int[Array, ""]:
        # Just after t, because a solver stops before the time at which a field breaks.
        derivative = field(t + 1e-6 * span, y)
        return jnp.argmax(sum(jax.tree.leaves(jax.tree.map(_size, derivative, y)))).astype(jnp.int32)

    return Info(nfe, steps, success, t, jax.lax.cond(success, lambda: jnp.int32(-1), worst_example))


def _size(derivative: Array, y: Array) -> Float[Array, " batch"]:
    """The largest |derivative| of each example, infinite if a derivative or y is not finite."""
    size = jnp.where(jnp.isfinite(y), jnp.abs(derivative), jnp.inf)
    return jnp.max(jnp.where(jnp.isnan(size), jnp.inf, size), axis=tuple(range(1, y.ndim)))
