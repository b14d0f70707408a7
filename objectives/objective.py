"""The base class of all objectives, and the noise that the terms of denoising score matching take."""

import abc
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float

from arrays import Batch, PerExample, Scalar, ScoreFn
from configs.default import Config
from sde_lib import SDE


@runtime_checkable
class Draws(Protocol):
    """The randomness of one evaluation of an objective: a pytree whose arrays have one row for each example."""

    @property
    def t(self) -> PerExample: ...


class Residual(NamedTuple):
    """The size of the noise that the score leaves unexplained, which weights may follow."""

    value: PerExample
    """r(t) = E|u|^2 / d at the time of each example."""
    harmonic_mean: Scalar
    """The harmonic mean of r over all times. Weights harmonic_mean / r have mean 1."""


class Noise(NamedTuple):
    """The randomness of one evaluation of the losses."""

    t: PerExample
    z: Batch
    probe: Batch
    second_probe: Batch | None = None
    """A second probe, independent of the first. Only the estimators with two probes use it."""
    z_start: Batch | None = None
    """Standard normal noise of x_tmin, for the reconstruction of levels only."""
    time_weight: PerExample | None = None
    """The density of the objective's times divided by the density that t was drawn from; None where they are equal."""


class TrainingObjective(abc.ABC):
    """A loss that training minimises. It sees a network only as a score function, and draws its own randomness."""

    @abc.abstractmethod
    def draw_noise(
        self, key: Array, sde: SDE, shape: tuple[int, ...], density: Float[Array, " bins"] | None = None
    ) -> Any:
        """Draws the randomness for a batch of the given shape, as `Draws`.

        Args:
            density: the density of times, for objectives with `draws_own_times`.
        """

    @abc.abstractmethod
    def losses(
        self, score_fn: ScoreFn, sde: SDE, x0: Batch, noise: Any, residual: Residual | None = None
    ) -> dict[str, PerExample]:
        """Computes the objective of each example as `total`, and its terms by their names in `losses.TERMS`.

        Args:
            noise: from `draw_noise`.
            residual: r(t), for objectives with `needs_residual`. Then the result also has |u|^2 / d as `residual`.
        """

    def for_evaluation(self) -> "TrainingObjective":
        """Returns the objective that evaluation computes, so that the values of two runs are comparable."""
        return self

    @property
    def every(self) -> int:
        """The size of the groups of examples that must stay together when a batch is divided."""
        return 1

    @property
    def needs_jacobian(self) -> bool:
        """Whether it computes the whole Jacobian of the score, which is for data of few dimensions only."""
        return False

    @property
    def needs_residual(self) -> bool:
        """Whether weights follow the residual."""
        return False

    @property
    def draws_own_times(self) -> bool:
        """Whether some examples draw their times from a density that follows the residual."""
        return False

    def quantiles(self, sde: SDE, t: PerExample) -> PerExample:
        """Returns the distribution function of times, at these times. Only for objectives with `needs_residual`."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its times are distributed")


def split_groups(a: Array, every: int) -> tuple[Array, Array]:
    """Divides the rows of an array into the first of each group of `every` rows, and the others."""
    groups = a.reshape(-1, every, *a.shape[1:])
    return groups[:, 0], groups[:, 1:].reshape(-1, *a.shape[1:])


def require_continuous_time(training: Config) -> None:
    """Raises ValueError if training is in discrete time, which this objective does not have."""
    if not training.continuous:
        raise ValueError(f"training.objective is {training.objective!r}, which needs training.continuous=True")


def require_first_order(training: Config) -> None:
    """Raises ValueError if order 2 or 3 is set, because only denoising score matching has these orders."""
    order, name = training.score_matching_order, training.objective
    if order > 1:
        raise ValueError(
            f"training.score_matching_order is {order}, but it is for training.objective=denoising, not {name}: set it "
            "to 1"
        )
