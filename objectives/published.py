"""The published estimates of orders 2 and 3, with one probe v ([L22] App. G).

The notation follows losses.py. The estimates have (u.v)^2 where the exact form has |u|^2. The probe multiplies the
standard deviation by about sqrt(d).
"""

import jax
from jax.lax import stop_gradient

from arrays import Batch, Factor, PerExample, ScoreFn, append_dims, inner, mean_square, num_dims
from derivatives import Field, probe_trace_gradient
from objectives.objective import Noise


def published_terms(
    scaled_score: Field, xt: Batch, sigma: Factor, order: int, noise: Noise
) -> tuple[Batch, dict[str, PerExample]]:
    """sigma times the score, and the terms of orders 2 and 3 as Hutchinson estimates ([L22] App. G)."""
    if order == 2:
        score, jacobian_probe = jax.jvp(scaled_score, (xt,), (noise.probe,))
        trace_gradient = None
    else:
        score, jacobian_probe, trace_gradient = probe_trace_gradient(scaled_score, xt, noise.probe)
    # scaled_score already holds one factor of sigma
    jacobian_probe = sigma * jacobian_probe
    terms = _second_order_terms(score, jacobian_probe, noise)
    if trace_gradient is not None:
        u = noise.z + stop_gradient(score)
        terms["third"] = third_order(sigma**2 * trace_gradient, stop_gradient(jacobian_probe), u, noise.probe)
    return score, terms


def _second_order_terms(score: Batch, jacobian_probe: Batch, noise: Noise) -> dict[str, PerExample]:
    """The terms of order 2. Args: score: sigma s. jacobian_probe: sigma^2 J v."""
    u = noise.z + stop_gradient(score)
    return {
        "second_frob": second_order_frob(jacobian_probe, u, noise.probe),
        "second_trace": second_order_trace(jacobian_probe, u, noise.probe),
    }


def residual_first_terms(
    scaled_score: Field, constant_score: Field, xt: Batch, sigma: Factor, noise: Noise
) -> tuple[Batch, dict[str, PerExample]]:
    """The values and gradients of `published_terms` of order 3, without a reverse pass inside the one for the gradient.

    The third term is the mean square of a residual r. With the constant w = 2 r / d, the product
    <w, sigma^2 grad_x (v.Jv)> has the same gradient. And <w, grad_x (v.Jv)> = v.D^2 field [v, w] is a forward
    derivative along v and then w. The gradient runs through forward derivatives only, all of which can be recomputed
    block by block, as with model.remat.

    Args:
        constant_score: the same field, without a gradient for its parameters.
    """
    value, tangent, trace_gradient = probe_trace_gradient(constant_score, xt, noise.probe)
    u, d = noise.z + value, float(num_dims(xt))  # as an integer, d^2 of large images has more than 32 bits
    residual = stop_gradient(third_order_residual(sigma**2 * trace_gradient, sigma * tangent, u, noise.probe))
    direction = 2 * sigma**2 * residual / d**2

    def along_probe(x: Batch) -> tuple[Batch, Batch]:
        return jax.jvp(scaled_score, (x,), (noise.probe,))

    (score, jacobian_probe), (_, second_derivative) = jax.jvp(along_probe, (xt,), (direction,))
    terms = _second_order_terms(score, sigma * jacobian_probe, noise)
    gradient_carrier = inner(noise.probe, second_derivative)
    terms["third"] = mean_square(residual) + (gradient_carrier - stop_gradient(gradient_carrier))
    return score, terms


def constant_score(score_fn: ScoreFn) -> ScoreFn:
    """The score function without a gradient for the parameters in it, if it is a pytree that holds them."""
    return jax.tree.map(lambda leaf: stop_gradient(leaf) if isinstance(leaf, jax.Array) else leaf, score_fn)


def second_order_frob(jacobian_probe: Batch, u: Batch, probe: Batch) -> PerExample:
    """|sigma^2 J v + v - (u.v) u|^2 / d^2: the columns of the Jacobian, along a probe ([L22] Eqn. 172).

    Args:
        jacobian_probe: sigma^2 J v.
        u: z + sigma s-bar.
        probe: v.
    """
    target = append_dims(inner(u, probe), u) * u - probe
    return mean_square(jacobian_probe - target) / num_dims(u)


def second_order_trace(jacobian_probe: Batch, u: Batch, probe: Batch) -> PerExample:
    """(sigma^2 v.J v + |v|^2 - (u.v)^2)^2 / d^2: the Jacobian's trace ([L22] Eqn. 173). Arguments as above."""
    trace = inner(probe, jacobian_probe)
    target = inner(u, probe) ** 2 - inner(probe, probe)
    return ((trace - target) / num_dims(u)) ** 2


def third_order(trace_gradient: Batch, jacobian_probe_bar: Batch, u: Batch, probe: Batch) -> PerExample:
    """The gradient of the Jacobian's trace, over d^3 ([L22] Eqn. 174).

    |sigma^3 grad(v.J v) + (u.v)^2 u - (sigma^2 v.J-bar v + |v|^2) u - 2 (u.v) (sigma^2 J-bar v + v)|^2 / d^3

    Arguments as in `third_order_residual`.
    """
    return mean_square(third_order_residual(trace_gradient, jacobian_probe_bar, u, probe))


def third_order_residual(trace_gradient: Batch, jacobian_probe_bar: Batch, u: Batch, probe: Batch) -> Batch:
    """The vector of `third_order` whose mean square is the term: the one between the bars there, over d.

    Args:
        trace_gradient: sigma^3 grad_x (v.J v).
        jacobian_probe_bar: sigma^2 J-bar v.
        u: z + sigma s-bar.
        probe: v.
    """
    along = inner(u, probe)
    spread = inner(probe, jacobian_probe_bar) + inner(probe, probe)
    error = (
        trace_gradient
        + append_dims(along**2 - spread, u) * u
        - 2 * append_dims(along, u) * (jacobian_probe_bar + probe)
    )
    return error / num_dims(u)
