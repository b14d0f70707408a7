"""The times of examples: their density, and how they are drawn from it."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from arrays import PerExample, Scalar
from configs.default import Config
from configs.usage import count_reads, unrecorded
from sde_lib import SDE, SDES, LinearGammaSDE, chain_times


@dataclasses.dataclass(frozen=True)
class TimeDistribution:
    """Times t in [t_min, t_max]: uniform, or with `importance_weighting` for the likelihood-weighted loss.

    With `importance_weighting`, the density is proportional to the weight of an error in that loss. The error of the
    noise has the weight g^2 / sigma^2 ([S21b] Sec. 5.1). The error of the velocity has the weight alpha^2 g^2 / sigma^2
    ([Z23]), for SDEs with linear gamma only. `importance_density` chooses between the two.

    Attributes:
        noise_level: if it is not 0, every time is the one at which sigma / alpha has this value.
        levels: if it is not 0, times are drawn uniformly from this number of levels of a discrete chain.

    Raises:
        ValueError: for another `importance_density`, or a `t_min` out of range.
    """

    t_min: float
    importance_weighting: bool = False
    importance_density: str = "noise"
    stratified: bool = False
    """Spread the quantiles of a batch as evenly as possible ([K21] App. I.1), instead of drawing them independently."""
    noise_level: float = 0.0
    levels: int = 0

    def __post_init__(self) -> None:
        if self.importance_density not in DENSITIES:
            known = ", ".join(DENSITIES)
            raise ValueError(f"training.importance_density is {self.importance_density!r}; known: {known}")
        if not 0 < self.t_min < SDE.t_max:
            raise ValueError(f"training.smallest_time is {self.t_min}; it must lie in (0, {SDE.t_max})")

    def draw(self, key: Array, sde: SDE, batch: int) -> PerExample:
        """Draws one time for each of `batch` examples."""
        return self.at_quantiles(sde, self.draw_quantiles(key, batch))

    def draw_quantiles(self, key: Array, batch: int) -> PerExample:
        """Draws uniform numbers in [0, 1)."""
        if self.stratified:
            return (jax.random.uniform(key) + jnp.arange(batch) / batch) % 1.0
        return jax.random.uniform(key, (batch,))

    def at_quantiles(self, sde: SDE, quantiles: PerExample) -> PerExample:
        """Returns the times at which the distribution function has these values."""
        if self.noise_level:
            return jnp.full_like(quantiles, sde.time_of_log_noise_level(jnp.log(self.noise_level)))
        if self.levels:
            return chain_times(self.levels)[(quantiles * self.levels).astype(jnp.int32)]
        if not self.importance_weighting:
            return self.t_min + quantiles * (sde.t_max - self.t_min)
        if self.importance_density == "velocity":
            return _with_velocity(sde).time_of_velocity_quantile(quantiles, self.t_min)
        return sde.time_of_quantile(quantiles * self.total(sde), self.t_min)

    def quantiles(self, sde: SDE, t: PerExample) -> PerExample:
        """Returns the distribution function, the inverse of `at_quantiles`."""
        if not self.importance_weighting:
            return (t - self.t_min) / (sde.t_max - self.t_min)
        if self.importance_density == "velocity":
            return 1 - _with_velocity(sde).velocity_weight(t) / self.total(sde)
        return sde.importance_weight(t, self.t_min) / self.total(sde)

    def total(self, sde: SDE) -> Scalar:
        """Returns the integral of the unnormalised density over all times. For uniform times, that density is 1."""
        if not self.importance_weighting:
            return jnp.asarray(sde.t_max - self.t_min)
        if self.importance_density == "velocity":
            return _with_velocity(sde).velocity_weight(jnp.asarray(self.t_min))
        return sde.importance_weight(jnp.asarray(sde.t_max), self.t_min)

    def likelihood_weight(self, sde: SDE, t: PerExample) -> PerExample:
        """Returns g^2 / sigma^2 divided by the unnormalised density."""
        alpha, sigma = sde.alpha_sigma(t)
        if not self.importance_weighting:
            return (sde.diffusion(t) / sigma) ** 2
        return 1 / alpha**2 if self.importance_density == "velocity" else jnp.ones_like(t)


DENSITIES = ("noise", "velocity")
"""The choices of training.importance_density."""


def _with_velocity(sde: SDE) -> LinearGammaSDE:
    """Narrows the type of the SDE. `times_from_config` has checked that it defines velocities."""
    assert isinstance(sde, LinearGammaSDE)
    return sde


NEEDS_LIKELIHOOD_WEIGHTING = "training.importance_weighting needs training.likelihood_weighting=True"


def times_from_config(training: Config, *, levels: int = 0) -> TimeDistribution:
    """Builds the distribution of times that config.training describes.

    Args:
        levels: as in `TimeDistribution`.

    Raises:
        ValueError: for a field whose value is not allowed.
    """
    with unrecorded(training):
        times = TimeDistribution(
            training.smallest_time,
            training.importance_weighting,
            training.importance_density,
            stratified=training.stratified_times,
            noise_level=training.noise_level,
            levels=levels,
        )
    if training.importance_weighting and not training.likelihood_weighting:
        raise ValueError(NEEDS_LIKELIHOOD_WEIGHTING)
    by_velocity = training.importance_weighting and training.importance_density == "velocity"
    if by_velocity and not issubclass(SDES.get(training.sde, SDE), LinearGammaSDE):
        raise ValueError(
            f"training.importance_density is 'velocity', which training.sde={training.sde} does not define: set it to "
            "'noise'"
        )
    if not training.noise_level:
        count_reads(training, "stratified_times", *(() if levels else ("smallest_time",)))
    return times


def with_density(quantiles: PerExample, density: Float[Array, " bins"]) -> tuple[PerExample, PerExample]:
    """Moves uniform quantiles so that they have a piecewise constant density with mean 1.

    Returns:
        The moved quantiles, and one over the density at each.
    """
    bins = len(density)
    cumulative = jnp.concatenate([jnp.zeros(1), jnp.cumsum(density)]) / bins
    moved = jnp.interp(quantiles, cumulative / cumulative[-1], jnp.linspace(0.0, 1.0, bins + 1))
    return moved, 1 / density[jnp.minimum((moved * bins).astype(jnp.int32), bins - 1)]
