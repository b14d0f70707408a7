"""Code that all methods share: arithmetic on states that are pytrees, and the report of a solve."""

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PyTree

State = TypeVar("State", bound=PyTree)
Field: TypeAlias = Callable[[Float[Array, ""], State], State]


def times_of_state(y0: PyTree, *times: float | Float[Array, ""]) -> tuple[Float[Array, ""], ...]:
    """Returns the times in the precision of the state, at least float32."""
    dtype = jnp.result_type(*jax.tree.leaves(y0), jnp.float32)
    return tuple(jnp.asarray(time, dtype) for time in times)


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

    def require_success(self) -> None:
        """Raises RuntimeError if the solve failed, with the time and the probable example; on the host only."""
        if not bool(self.success):
            raise RuntimeError(
                f"the ODE solve failed at t = {float(self.t):.6g} after {int(self.steps)} steps; example "
                f"{int(self.worst_example)} has the largest derivative there, or one that is not finite"
            )


def combine(y: PyTree, dt: Float[Array, ""], weights: Iterable[float | Array], slopes: Iterable[PyTree]) -> PyTree:
    """y plus dt times the weighted sum of slopes."""

    def add(y: Array, *slopes: Array) -> Array:
        return y + (dt * sum(w * k for w, k in zip(weights, slopes, strict=True))).astype(y.dtype)

    return jax.tree.map(add, y, *slopes)


def is_finite(y: PyTree) -> Bool[Array, ""]:
    """Returns whether all values of a state are finite."""
    return jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda a: jnp.all(jnp.isfinite(a)), y))


def with_worst_example(field: Field, info: Info, y: PyTree, span: Float[Array, ""] | float) -> Info:
    """Returns the report of a solve that ended with the state y, with the worst example after a failure.

    Outside jit, the field is compiled for this only after a failure.
    """
    if isinstance(info.success, Tracer):
        worst = jax.lax.cond(
            info.success, lambda: info.worst_example, lambda: _find_worst_example(field, info.t, y, span)
        )
    elif info.success:
        return info
    else:
        worst = _find_worst_example(field, info.t, y, span)
    return info._replace(worst_example=worst)


NO_EXAMPLE = np.int32(-1)
"""The worst example after a success."""


@jax.jit
def _find_worst_example(field: Field, t: Float[Array, ""], y: PyTree, span: Float[Array, ""] | float) -> Int[Array, ""]:
    # Just after t, because a solver stops before the time at which a field breaks.
    derivative = field(t + 1e-6 * span, y)
    return jnp.argmax(sum(jax.tree.leaves(jax.tree.map(_size, derivative, y)))).astype(jnp.int32)


def _size(derivative: Array, y: Array) -> Float[Array, " batch"]:
    """The largest |derivative| of each example, infinite if a derivative or y is not finite."""
    size = jnp.where(jnp.isfinite(y), jnp.abs(derivative), jnp.inf)
    return jnp.max(jnp.where(jnp.isnan(size), jnp.inf, size), axis=tuple(range(1, y.ndim)))
