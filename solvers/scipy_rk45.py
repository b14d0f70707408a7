"""SciPy's RK45, with the field on the devices and the steps on the host: the published protocol."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree
from scipy.integrate import RK45

from arrays import ReportProgress
from solvers.solve import NO_EXAMPLE, Field, Info, State, is_finite, with_worst_example


def scipy_rk45(
    field: Field,
    y0: State,
    t0: float | Float[Array, ""],
    t1: float | Float[Array, ""],
    rtol: float,
    atol: float,
    max_steps: int,
    progress: ReportProgress | None,
) -> tuple[State, Info]:
    """Runs SciPy's RK45 step by step, because solve_ivp would store every intermediate state."""
    t0, t1 = float(t0), float(t1)
    leaves, structure = jax.tree.flatten(y0)
    dtype = jnp.result_type(*leaves)
    ends = np.cumsum([leaf.size for leaf in leaves])

    def state(flat: np.ndarray) -> State:
        parts = np.split(flat.astype(dtype), ends[:-1])  # in NumPy, which compiles nothing and dispatches faster
        return structure.unflatten(map(_spread_as, parts, leaves))

    def derivative(t: float, flat: np.ndarray) -> np.ndarray:
        return _flat(_evaluate(field, np.asarray(t, dtype), state(flat)))

    if not bool(is_finite(y0)):  # SciPy would raise an exception.
        zero, failed = jnp.int32(0), jnp.asarray(False)
        info = Info(zero, zero, failed, jnp.asarray(t0, dtype), jnp.asarray(NO_EXAMPLE))
        return y0, with_worst_example(field, info, y0, t1 - t0)
    solver = RK45(derivative, t0, _flat(y0), t1, rtol=rtol, atol=atol)
    # If the first derivative is not finite, SciPy would reduce a first step of NaN forever.
    healthy = bool(np.isfinite(solver.f).all())
    while healthy and solver.status == "running" and _attempted_steps(solver) < max_steps:
        solver.step()
        if progress is not None:
            progress(int(100 * (solver.t - t0) / (t1 - t0)), 100)
    y = jax.tree.map(jnp.asarray, state(solver.y))
    solved = jnp.asarray(solver.status == "finished" and bool(is_finite(y)))
    nfe, steps = jnp.int32(solver.nfev), jnp.int32(_attempted_steps(solver))
    info = Info(nfe, steps, solved, jnp.asarray(solver.t, dtype), jnp.asarray(NO_EXAMPLE))
    return y, with_worst_example(field, info, y, t1 - t0)


def _attempted_steps(solver: RK45) -> int:
    return (solver.nfev - 2) // 6


@jax.jit
def _evaluate(field: Field, t: Float[Array, ""], y: State) -> State:
    return field(t, y)


def _flat(y: PyTree) -> np.ndarray:
    """Returns all entries of the state, for SciPy."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(y)]).astype(np.float64)


def _spread_as(entries: np.ndarray, like: Array | np.ndarray) -> Array | np.ndarray:
    """Shapes the entries as `like`, and shards them so if that is on several devices."""
    array = entries.reshape(like.shape)
    if isinstance(like, jax.Array) and len(like.sharding.device_set) > 1:
        return jax.device_put(array, like.sharding)
    return array
