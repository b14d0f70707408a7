"""The cases that `make ncsn` compares: ladders of noise levels for Langevin dynamics."""

import dataclasses

import jax.numpy as jnp

from build import build
from configs.default import Config

SAMPLING_SEEDS, TRAINING_SEEDS = range(5), range(3)
POINTS, IMAGES = 5000, 256
POINT_STEPS, IMAGE_STEPS = 1000, 200
"""About the number of steps of Langevin dynamics over all levels. Each level has the same number of steps."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A ladder of noise levels from the largest one of the SDE to `smallest`. If there is one level, it is `smallest`.

    Attributes:
        denoised: whether samples are the mean of x_0 given the last x, instead of the last x.
        longer: a factor that multiplies the number of steps.
    """

    levels: int
    smallest: float
    denoised: bool = True
    longer: int = 1

    @property
    def name(self) -> str:
        noisy, longer = "" if self.denoised else "_noisy", "" if self.longer == 1 else f"_longer{self.longer}"
        return f"levels{self.levels}_to{self.smallest:g}{noisy}{longer}"

    def steps_per_level(self, steps: int) -> int:
        """Returns the steps at each level that make about `steps` steps over all levels, times `longer`."""
        return round(self.longer * steps / self.levels)

    def total_steps(self, steps: int) -> int:
        """Returns the steps that the sampler takes over all levels."""
        return self.levels * self.steps_per_level(steps)

    def configure(self, config: Config, steps: int) -> Config:
        """Sets the sampler of this case, with about `steps` steps over all levels. Returns the configuration.

        The step size is 0.2 smallest^2, as in [SE19] Sec. 5.
        """
        smallest_time = float(build(config).sde.time_of_log_noise_level(jnp.log(self.smallest)))
        config.sampling.update(
            method="annealed_langevin" if self.levels > 1 else "langevin",
            num_levels=self.levels,
            steps_per_level=self.steps_per_level(steps),
            step_size=0.2 * self.smallest**2,
            smallest_time=max(smallest_time, 1e-5),
            noise_removal=self.denoised,
        )
        return config


POINT_CASES = [Case(levels, 0.5) for levels in (1, 2, 3, 5, 10, 30, 100)]
"""Ladders on points, which differ in the number of levels."""

LONG_CASES = [Case(levels, 0.5, longer=10) for levels in (10, 100)]
"""The same ladders with more steps, for the exact score only."""

PLAIN_CASES = [Case(1, sigma) for sigma in (0.01, 0.1, 0.3)]
"""Langevin dynamics on digits, at one noise level."""

LEVEL_CASES = [Case(levels, 0.01) for levels in (4, 10, 34, 100)]
"""Ladders on digits that differ in the number of levels. Each is a part of the ladder with 100 levels."""

SMALLEST_CASES = {sigma: (Case(10, sigma), Case(10, sigma, denoised=False)) for sigma in (0.01, 0.1, 0.3, 1.0)}
"""Ladders on digits that differ in the smallest noise level, with and without a last step that removes the noise."""

IMAGE_CASES = list(
    dict.fromkeys([*PLAIN_CASES, *LEVEL_CASES, *(case for pair in SMALLEST_CASES.values() for case in pair)])
)
"""All ladders on digits."""
