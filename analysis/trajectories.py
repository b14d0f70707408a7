"""Paths of points between data and prior for figures, by the SDE and the ODE, forward and in reverse.

The paths take Euler steps on a grid of times. sampling.py draws samples, and likelihood.py computes likelihoods.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from arrays import Batch, ScoreFn, as_pytree
from sde_lib import SDE

TimeGrid = Float[Array, " times"]
Path = Float[Array, "times batch *dims"]


def ode_path(score_fn: ScoreFn, sde: SDE, x: Batch, times: TimeGrid) -> Path:
    """Follows the probability-flow ODE from x at the first of `times`, which increase or decrease, to the last."""
    return _euler(as_pytree(score_fn), x, times, None, sde=sde)


def sde_path(score_fn: ScoreFn, sde: SDE, x: Batch, times: TimeGrid, key: Array) -> Path:
    """Follows the SDE from x at the first of `times` to the last, forward or in reverse.

    Increasing times follow the forward SDE, which does not use the score. Decreasing times follow the reverse SDE
    ([S21a] Eqn. 6).
    """
    noise = jax.random.normal(key, (len(times) - 1, *x.shape), x.dtype)
    return _euler(as_pytree(score_fn), x, times, noise, sde=sde)


@partial(jax.jit, static_argnames="sde")
def _euler(
    score_fn: ScoreFn, x: Batch, times: TimeGrid, noise: Float[Array, "times-1 batch *dims"] | None, *, sde: SDE
) -> Path:
    reverse = times[-1] < times[0]
    # The weight of g^2 score in the drift is 0 in the forward SDE, 1 in the reverse SDE, and 1/2 in the ODE.
    weight = 0.5 if noise is None else jnp.where(reverse, 1.0, 0.0)

    def step(x: Batch, now: tuple[Array, Array, Batch | None]) -> tuple[Batch, Batch]:
        start, end, z = now
        t = jnp.full(x.shape[:1], start)
        g = sde.diffusion(start)
        drift = sde.drift(x, t) - weight * g**2 * score_fn(x, t)
        x = x + (end - start) * drift
        if z is not None:
            x = x + g * jnp.sqrt(jnp.abs(end - start)) * z
        return x, x

    _, path = jax.lax.scan(step, x, (times[:-1], times[1:], noise))
    return jnp.concatenate([x[None], path])
