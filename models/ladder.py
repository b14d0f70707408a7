"""The ladder of noise levels of networks that are trained in discrete time."""

import dataclasses

from arrays import PerExample
from configs.default import Config
from sde_lib import VESDE


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Noise levels in geometric steps from the largest to the smallest ([SE19] Sec. 4, [SE20] Sec. 3).

    Raises:
        ValueError: if the noise levels are not positive and in order, or there are fewer than two.
    """

    sigma_min: float
    sigma_max: float
    levels: int

    def __post_init__(self) -> None:
        VESDE(self.sigma_min, self.sigma_max)  # raises ValueError
        if self.levels < 2:
            raise ValueError(f"a ladder needs at least 2 noise levels, got {self.levels}")

    def sigma(self, labels: PerExample) -> PerExample:
        """Returns the noise level of each label: the largest for label 0, the smallest for label `levels` - 1."""
        return VESDE(self.sigma_min, self.sigma_max).alpha_sigma(1 - labels / (self.levels - 1))[1]


def ladder_from_fields(model: Config) -> Ladder:
    """Builds the ladder with the fields of config.model."""
    return Ladder(float(model.sigma_min), float(model.sigma_max), model.num_scales)


def ladder_from_config(config: Config) -> Ladder | None:
    """Builds the ladder of a network that divides its output by the sigma of a level; None for other networks."""
    return ladder_from_fields(config.model) if config.model.scale_by_sigma and not config.training.continuous else None
