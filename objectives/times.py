"""The times of examples: their density, and how they are drawn from it."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from arrays import PerExample
from sde_lib import SDE


@dataclasses.dataclass(frozen=True)
class TimeDistribution:
    """Times t in [t_min, t_max]: uniform, or with density proportional to g^2 / sigma^2 ([S21b] Sec. 5.1)."""

    t_min: float
    importance_weighting: bool = False
    stratified: bool = False
    """Spread the quantiles of a batch as evenly as possible ([K21] App. I.1), instead of drawing them independently."""

    def draw(self, key: Array, sde: SDE, batch: int) -> PerExample:
        return self.at_quantiles(sde, self.draw_quantiles(key, batch))

    def draw_quantiles(self, key: Array, batch: int) -> PerExample:
        """Draws uniform numbers in [0, 1)."""
        if self.stratified:
            return (jax.random.uniform(key) + jnp.arange(batch) / batch) % 1.0
        return jax.random.uniform(key, (batch,))

    def at_quantiles(self, sde: SDE, quantiles: PerExample) -> PerExample:
        """Returns the times at which the distribution function has these values."""
        if self.importance_weighting:
            total = sde.importance_weight(jnp.asarray(sde.t_max), self.t_min)
            return sde.time_of_quantile(quantiles * total, self.t_min)
        return self.t_min + quantiles * (sde.t_max - self.t_min)

    def quantiles(self, sde: SDE, t: PerExample) -> PerExample:
        """Returns the distribution function, the inverse of `at_quantiles`."""
        if self.importance_weighting:
            total = sde.importance_weight(jnp.asarray(sde.t_max), self.t_min)
            return sde.importance_weight(t, self.t_min) / total
        return (t - self.t_min) / (sde.t_max - self.t_min)


def with_density(quantiles: PerExample, density: Float[Array, " bins"]) -> tuple[PerExample, PerExample]:
    """Moves uniform quantiles so that they have a piecewise constant density with mean 1.

    Returns:
        The moved quantiles, and one over the density at each.
    """
    bins = len(density)
    cumulative = jnp.concatenate([jnp.zeros(1), jnp.cumsum(density)]) / bins
    moved = jnp.interp(quantiles, cumulative / cumulative[-1], jnp.linspace(0.0, 1.0, bins + 1))
    return moved, 1 / density[jnp.minimum((moved * bins).astype(jnp.int32), bins - 1)]
