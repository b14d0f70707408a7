"""The terms that make a likelihood-weighted loss a bound on -ln P of an image ([K21] Eqn. 11, [Z23]).

-ln P(x_0) <= E[-ln P(x_0 | x_tmin)] + KL(q(x_1 | x_0) | prior) + 1/2 integral of g^2 / sigma^2 E|sigma s + z|^2 dt

Both terms here depend on the SDE only, so they have no gradient.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from arrays import Batch, PerExample, inner, num_dims
from sde_lib import SDE


def bound_terms(
    sde: SDE, x0: Batch, z_start: Batch | None, t_min: float, values: Float[Array, " levels"]
) -> dict[str, PerExample]:
    """Returns both terms in bits/dim, by their names in `losses.TERMS`.

    Args:
        z_start: the standard normal noise of x_tmin.
        values: the data of each grey level.
    """
    if z_start is None:
        raise ValueError("losses in bits/dim need noise at the start; draw the noise for their objective")
    nats = {
        "reconstruction": reconstruction(sde, x0, z_start, t_min, values),
        "prior": prior_divergence(sde, x0, sde.prior_sigma),
    }
    return {name: value / (num_dims(x0) * math.log(2)) for name, value in nats.items()}


def reconstruction(sde: SDE, x0: Batch, z: Batch, t_min: float, values: Float[Array, " levels"]) -> PerExample:
    """-ln P(x_0 | x_tmin) in nats, for levels x_0 among `values` and x_tmin with the standard normal noise z."""
    t = jnp.full(len(x0), t_min, x0.dtype)
    mean, sigma = sde.marginal(x0, t)
    return -sde.level_logp(mean + sigma.reshape(-1, *(1,) * (x0.ndim - 1)) * z, x0, t, values)


def prior_divergence(sde: SDE, x0: Batch, prior_sigma: float) -> PerExample:
    """KL(q(x_1 | x_0) | N(0, prior_sigma^2 I)) in nats."""
    alpha, sigma = sde.alpha_sigma(jnp.asarray(sde.t_max, x0.dtype))
    ratio = jnp.square(sigma / prior_sigma)
    return 0.5 * (inner(x0, x0) * jnp.square(alpha / prior_sigma) + num_dims(x0) * (ratio - 1 - jnp.log(ratio)))
