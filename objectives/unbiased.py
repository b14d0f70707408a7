"""Unbiased estimates of the exact second and third order with two probes. Ours.

The published estimates have (u.v)^2 where the exact terms have |u|^2. This adds the noise of the probe v. Here each
square is estimated by a product of two independent unbiased estimates. The notation follows losses.py, and
M = sigma^2 J + I.
"""

from collections.abc import Sequence

from jax.lax import stop_gradient

from arrays import Batch, Factor, PerExample, append_dims, inner, num_dims
from derivatives import Field, probe_derivatives
from objectives.objective import Noise


def unbiased_terms(
    scaled_score: Field, xt: Batch, sigma: Factor, order: int, noise: Noise
) -> tuple[Batch, dict[str, PerExample]]:
    """Returns sigma times the score, and the terms of orders 2 and 3 as unbiased estimates of their exact form."""
    if noise.second_probe is None:
        raise ValueError("the unbiased estimator needs two probes; draw the noise for its objective")
    probes = noise.probe, noise.second_probe

    def unexplained(score: Batch) -> Batch:
        return noise.z + stop_gradient(score)

    derivatives = probe_derivatives(scaled_score, xt, probes, unexplained, trace_gradients=order == 3)
    u = unexplained(derivatives.value)
    # scaled_score already holds one factor of sigma
    spread_probes = [sigma * jv + v for jv, v in zip(derivatives.jacobian_probes, probes, strict=True)]
    spread_u = sigma * derivatives.jacobian_direction + u
    terms = {
        "second_frob": unbiased_second_order_frob(spread_probes, spread_u, u),
        "second_trace": unbiased_second_order_trace(spread_probes, u, probes),
    }
    if order == 3:
        trace_gradients = [sigma**2 * gradient for gradient in derivatives.trace_gradients]
        spread_bars = stop_gradient((spread_probes, spread_u))
        terms["third"] = unbiased_third_order(trace_gradients, *spread_bars, u, probes)
    return derivatives.value, terms


def unbiased_second_order_frob(spread_probes: Sequence[Batch], spread_u: Batch, u: Batch) -> PerExample:
    """(|M v|^2 - 2 u.M u + |u|^4) / d^2, |M v|^2 averaged over probes v: the Jacobian. Ours; one draw may be negative.

    Its mean over probes is |M - u u^T|_F^2 / d^2, the exact second order, where M = sigma^2 J + I.

    Args:
        spread_probes: M v for each probe.
        spread_u: M u.
        u: z + sigma s-bar.
    """
    squares = sum(inner(spread, spread) for spread in spread_probes) / len(spread_probes)
    return (squares - 2 * inner(u, spread_u) + inner(u, u) ** 2) / float(num_dims(u)) ** 2


def unbiased_second_order_trace(spread_probes: Sequence[Batch], u: Batch, probes: tuple[Batch, Batch]) -> PerExample:
    """r_1 r_2 / d^2 with r_i = v_i.M v_i - |u|^2: the Jacobian's trace. Ours; one draw may be negative.

    A product of two independent estimates is an unbiased estimate of the square, (tr M - |u|^2)^2 / d^2. The mean of
    the square of one estimate also contains the off-diagonal part of J. Arguments as in `unbiased_second_order_frob`.
    """
    first, second = (inner(v, spread) - inner(u, u) for v, spread in zip(probes, spread_probes, strict=True))
    return first * second / float(num_dims(u)) ** 2


def unbiased_third_order(
    trace_gradients: Sequence[Batch],
    spread_probes_bar: Sequence[Batch],
    spread_u_bar: Batch,
    u: Batch,
    probes: tuple[Batch, Batch],
) -> PerExample:
    """e_1.e_2 / d^3: the gradient of the Jacobian's trace. Ours; one draw may be negative.

    e_i = sigma^3 grad(v_i.J v_i) + |u|^2 u - (v_i.M-bar v_i) u - 2 M-bar u

    Its mean over probes is `exact_third_order` / d^2, which is the scale of the published term.

    Args:
        trace_gradients: sigma^3 grad_x (v.J v) for each probe.
        spread_probes_bar, spread_u_bar: M-bar v for each probe, and M-bar u.
        u: z + sigma s-bar.
        probes: v_1 and v_2.
    """
    first, second = (
        gradient + append_dims(inner(u, u) - inner(v, spread), u) * u - 2 * spread_u_bar
        for gradient, v, spread in zip(trace_gradients, probes, spread_probes_bar, strict=True)
    )
    return inner(first, second) / float(num_dims(u)) ** 3  # d^3 of an image is too large for 32 bits
