"""The size of the noise that the score leaves unexplained, as training measures it; weights and times may follow it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from arrays import PerExample
from objectives.objective import Residual

WEIGHTINGS = ("constant", "residual")
"""Weights by noise level: the published constants, or one over the variance of each term's error."""

HIGH_ORDER_WEIGHTINGS = (*WEIGHTINGS, "first_order")
"""The weightings of orders 2 and 3. "first_order": the first order's weights, with its likelihood weighting ([Z23])."""

RESIDUAL_BINS, RESIDUAL_MEMORY = 64, 0.999
"""The number of parts of a `ResidualTable`, and the factor that multiplies its sums in each step."""


class ResidualTable(NamedTuple):
    """A running estimate of r(t) = E|u|^2 / d by noise level, over equal parts of `TrainingObjective.quantiles`.

    Each step multiplies both sums by `RESIDUAL_MEMORY`, so that they forget old batches. They begin as one batch with
    r = 1, as for a score of 0.
    """

    total: Float[Array, " bins"]
    """The sum of |u|^2 / d over the examples in each part, divided by the number of examples in a batch."""
    number: Float[Array, " bins"]
    """The number of these examples, divided by the number of examples in a batch."""

    @classmethod
    def start(cls) -> "ResidualTable":
        """Returns the table before the first step: one batch with r = 1."""
        # Without the dtype the arrays are weakly typed, and the second training step compiles again.
        total, number = (jnp.full(RESIDUAL_BINS, 1 / RESIDUAL_BINS, jnp.float32) for _ in range(2))
        return cls(total, number)

    @classmethod
    def of_batch(cls, quantiles: PerExample, residual: PerExample) -> "ResidualTable":
        """Returns the sums over one batch."""
        part = jnp.minimum((quantiles * RESIDUAL_BINS).astype(jnp.int32), RESIDUAL_BINS - 1)
        member = jax.nn.one_hot(part, RESIDUAL_BINS)
        return cls(jnp.mean(member * residual[:, None], axis=0), jnp.mean(member, axis=0))

    def updated(self, batch: "ResidualTable") -> "ResidualTable":
        """Returns the table after one more batch."""
        return jax.tree.map(lambda old, new: RESIDUAL_MEMORY * old + new, self, batch)

    def values(self) -> Float[Array, " bins"]:
        """r in each part."""
        return self.total / self.number

    def at(self, quantiles: PerExample) -> Residual:
        """r, interpolated linearly between the middles of the parts."""
        middles = (jnp.arange(RESIDUAL_BINS) + 0.5) / RESIDUAL_BINS
        return Residual(jnp.interp(quantiles, middles, self.values()), 1 / jnp.mean(1 / self.values()))

    def density(self) -> Float[Array, " bins"]:
        """The density of times for orders 2 and 3: half the objective's, and half in proportion to 1 / r."""
        inverse = 1 / self.values()
        return 0.5 + 0.5 * inverse / jnp.mean(inverse)


def variance_weights(estimator: str, r: PerExample, d: int) -> dict[str, PerExample]:
    """Returns the weights of the terms of orders 2 and 3, relative to the weight of the first order.

    They come from generalised least squares (ours), which divides each squared error by its variance. The variance is
    known if u given x_t is N(0, r I). The error of the third order is (|u|^2 - (d + 2) r) u.

    Args:
        estimator: "published", "exact", or an unbiased one.
    """
    third = 1 / (2 * r**2 * (d + 2))
    # As an integer, d^2 may be too large for JAX.
    unbiased = {"second_frob": d / (2 * r), "second_trace": 1 / (2 * r), "third": third * d * d}
    return {
        "published": {"second_frob": d / (r * (d + 1)), "second_trace": 1 / (2 * r * d), "third": d * third},
        "exact": {"second_frob": d / (2 * r), "third": third},
    }.get(estimator, unbiased)
