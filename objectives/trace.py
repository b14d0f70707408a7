"""The second order as its trace only, with |u|^2 as target, as i-DODE fine-tunes [Z23].

The residual is r = v.M v - |u|^2 with M = sigma^2 J + I, in the notation of losses.py. In terms of velocities [Z23] has
e = sigma div F - alpha (d - |F* - F|^2) for VP, and sigma div F - d / sqrt(2) + sqrt(2) alpha |F* - F|^2 for straight
paths. Then r = -alpha e for VP and -sqrt(2) alpha e for straight paths. So the loss of [Z23], e^2 / d times the weight
that |F* - F|^2 has in the first order, is r^2 / d times the weight that |u|^2 has there.
"""

import jax
from jax.lax import stop_gradient

from arrays import Batch, Factor, PerExample
from derivatives import Field
from objectives.objective import Noise
from objectives.unbiased import unbiased_second_order_trace


def squared_trace(
    scaled_score: Field, xt: Batch, sigma: Factor, order: int, noise: Noise
) -> tuple[Batch, dict[str, PerExample]]:
    """Returns sigma times the score, and the trace term as the square of one probe's residual [Z23].

    Its mean over probes is the exact term plus 2 |S|^2 / d^2, where S is the symmetric part of M without its diagonal.
    """
    return _trace(scaled_score, xt, sigma, noise, (noise.probe,))


def unbiased_trace(
    scaled_score: Field, xt: Batch, sigma: Factor, order: int, noise: Noise
) -> tuple[Batch, dict[str, PerExample]]:
    """Returns sigma times the score, and the trace term as the product of two probes' residuals (ours).

    Raises:
        ValueError: if the noise has only one probe.
    """
    if noise.second_probe is None:
        raise ValueError("the unbiased trace needs two probes; draw the noise for its objective")
    return _trace(scaled_score, xt, sigma, noise, (noise.probe, noise.second_probe))


def _trace(
    scaled_score: Field, xt: Batch, sigma: Factor, noise: Noise, probes: tuple[Batch, ...]
) -> tuple[Batch, dict[str, PerExample]]:
    score, push_forward = jax.linearize(scaled_score, xt)
    # scaled_score already holds one factor of sigma
    spread = [sigma * push_forward(v) + v for v in probes]
    u = noise.z + stop_gradient(score)
    ends = [spread[0], spread[-1]], u, (probes[0], probes[-1])
    return score, {"second_trace": unbiased_second_order_trace(*ends)}


TRACE_ESTIMATORS = {"squared_trace": squared_trace, "unbiased_trace": unbiased_trace}
"""Estimators of the second order that use only its trace."""
