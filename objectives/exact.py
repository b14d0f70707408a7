"""Orders 2 and 3 from the whole Jacobian, for few dimensions ([L22] Theorems 4.1 and 4.3).

The notation follows losses.py.
"""

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from arrays import Batch, Factor, PerExample, inner, mean_square, num_dims
from derivatives import Field, exact_jacobian, exact_trace_gradient
from objectives.objective import Noise


def exact_terms(
    scaled_score: Field, xt: Batch, sigma: Factor, order: int, noise: Noise
) -> tuple[Batch, dict[str, PerExample]]:
    """sigma times the score, and the terms of orders 2 and 3 from the whole Jacobian ([L22] Theorems 4.1 and 4.3)."""
    if order == 2:
        score, jacobian = exact_jacobian(scaled_score, xt)
        trace_gradient = None
    else:
        score, jacobian, trace_gradient = exact_trace_gradient(scaled_score, xt)
    batch, d = len(xt), num_dims(xt)
    flat_sigma = sigma.reshape(batch, 1)
    u = (noise.z + stop_gradient(score)).reshape(batch, d)
    jacobian = flat_sigma[..., None] * jacobian
    terms = {"second_frob": exact_second_order(jacobian, u)}
    if trace_gradient is not None:
        trace_gradient = flat_sigma**2 * trace_gradient.reshape(batch, d)
        terms["third"] = exact_third_order(trace_gradient, stop_gradient(jacobian), u)
    return score, terms


def exact_second_order(jacobian: Float[Array, "batch d d"], u: Float[Array, "batch d"]) -> PerExample:
    """|sigma^2 J + I - u u^T|_F^2 / d^2: the Jacobian of the score ([L22] Theorem 4.1).

    Args:
        jacobian: sigma^2 J.
        u: z + sigma s-bar.
    """
    identity = jnp.eye(u.shape[1], dtype=u.dtype)[None]
    return mean_square(jacobian + identity - u[:, :, None] * u[:, None, :])


def exact_second_order_trace(jacobian: Float[Array, "batch d d"], u: Float[Array, "batch d"]) -> PerExample:
    """(sigma^2 tr J + d - |u|^2)^2 / d: the Jacobian's trace ([L22] Corollary 4.2). Arguments as above."""
    d = u.shape[1]
    return (jnp.trace(jacobian, axis1=1, axis2=2) + d - inner(u, u)) ** 2 / d


def exact_third_order(
    trace_gradient: Float[Array, "batch d"], jacobian_bar: Float[Array, "batch d d"], u: Float[Array, "batch d"]
) -> PerExample:
    """The gradient of the Jacobian's trace ([L22] Theorem 4.3).

    |sigma^3 grad tr J + |u|^2 u - (sigma^2 tr J-bar + d) u - 2 (sigma^2 J-bar + I) u|^2 / d

    Args:
        trace_gradient: sigma^3 grad_x tr J.
        jacobian_bar: sigma^2 J-bar.
        u: z + sigma s-bar.
    """
    spread = jacobian_bar + jnp.eye(u.shape[1], dtype=u.dtype)[None]
    trace = jnp.trace(spread, axis1=1, axis2=2)
    error = trace_gradient + (inner(u, u) - trace)[:, None] * u - 2 * jnp.einsum("bij,bj->bi", spread, u)
    return mean_square(error)
