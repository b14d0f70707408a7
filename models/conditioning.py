"""The label by which a network receives the time, and the meaning of its output ([S21a] App. C)."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from arrays import Batch, PerExample, append_dims
from models.mlp import TIMES_PER_UNIT
from sde_lib import SDE, VESDE, VPSDE, LinearGammaSDE


@runtime_checkable
class Conditioning(Protocol):
    """Converts times to the labels of a network, and its output to the score."""

    def network_input(self, x: Batch, t: PerExample) -> Batch:
        """Returns what the network receives in place of x: x itself, unless a class says otherwise."""
        del t
        return x

    def labels(self, t: PerExample) -> PerExample:
        """Returns the labels that the network receives for these times."""
        ...

    def score(self, output: Batch, x: Batch, t: PerExample) -> Batch:
        """Returns the score at x and these times, from the network's output."""
        ...


@dataclasses.dataclass(frozen=True)
class NoiseLevels(Conditioning):
    """Labels are sigma_t, and the output is the score: the network divides by sigma_t itself."""

    sde: SDE

    def labels(self, t: PerExample) -> PerExample:
        return self.sde.alpha_sigma(t)[1]

    def score(self, output: Batch, x: Batch, t: PerExample) -> Batch:
        del x, t
        return output


@dataclasses.dataclass(frozen=True)
class ScaledTimes(Conditioning):
    """Labels are 999 t, and the output is the noise in x: -sigma_t times the score."""

    sde: SDE

    def labels(self, t: PerExample) -> PerExample:
        return TIMES_PER_UNIT * t

    def score(self, output: Batch, x: Batch, t: PerExample) -> Batch:
        return -output / append_dims(self.sde.alpha_sigma(t)[1], x)


@dataclasses.dataclass(frozen=True)
class Velocities(Conditioning):
    """Labels are 999 t, and the output is the velocity of [Z23], from which the noise in x follows."""

    sde: LinearGammaSDE

    def labels(self, t: PerExample) -> PerExample:
        return TIMES_PER_UNIT * t

    def score(self, output: Batch, x: Batch, t: PerExample) -> Batch:
        return -self.sde.noise_of_velocity(x, output, t) / append_dims(self.sde.alpha_sigma(t)[1], x)


@dataclasses.dataclass(frozen=True)
class Preconditioned(Conditioning):
    """Labels are 999 t, and the network is preconditioned as in [K22] Table 1.

    The network receives x / w. With its output F, the score is

        -x / w^2 + alpha data_std F / (sigma w)    with w^2 = alpha^2 data_std^2 + sigma^2.

    With F = 0, this is the score of Gaussian data with variance data_std^2. The larger the noise, the smaller the
    network's part. Group norms hide the norm of x from the network, and the first term supplies it.
    """

    sde: SDE
    data_std: float = 0.5
    """The value of [K22], for images in [-1, 1]."""

    def network_input(self, x: Batch, t: PerExample) -> Batch:
        return x / append_dims(self._std(t), x)

    def labels(self, t: PerExample) -> PerExample:
        return TIMES_PER_UNIT * t

    def score(self, output: Batch, x: Batch, t: PerExample) -> Batch:
        (alpha, sigma), std = self.sde.alpha_sigma(t), self._std(t)
        scale = alpha * self.data_std / (sigma * std)
        return append_dims(scale, x) * output - x / append_dims(std**2, x)

    def _std(self, t: PerExample) -> PerExample:
        """w: the standard deviation of x at these times, for data with the standard deviation data_std."""
        alpha, sigma = self.sde.alpha_sigma(t)
        return jnp.hypot(alpha * self.data_std, sigma)


PARAMETERIZATIONS: dict[str, tuple[type[SDE], Callable[[Any], Conditioning]]] = {
    "noise": (SDE, ScaledTimes),
    "velocity": (LinearGammaSDE, Velocities),
    "preconditioned": (SDE, Preconditioned),
}
"""Conditionings of networks without `scale_by_sigma` in continuous time, by model.parameterization, with the SDEs that
define them."""


@dataclasses.dataclass(frozen=True)
class LadderLevels(Conditioning):
    """For SMLD: labels number the levels of a ladder from the largest sigma, and the output is the score.

    Each time has the label of the nearest level, so the score function jumps between two levels.
    """

    sde: VESDE
    levels: int

    def labels(self, t: PerExample) -> PerExample:
        return jnp.round((self.sde.t_max - t) * (self.levels - 1) / self.sde.t_max)

    def score(self, output: Batch, x: Batch, t: PerExample) -> Batch:
        del x, t
        return output


@dataclasses.dataclass(frozen=True)
class ChainLevels(Conditioning):
    """For DDPM: labels number the levels of the chain from the smallest noise, and the output is the noise in x.

    Labels between two levels are not rounded, but the output is divided by the sigma of the level below, as published.
    """

    sde: VPSDE
    levels: int

    def labels(self, t: PerExample) -> PerExample:
        return t * (self.levels - 1) / self.sde.t_max

    def score(self, output: Batch, x: Batch, t: PerExample) -> Batch:
        return -output / append_dims(self.sde.chain_alpha_sigma(t, self.levels)[1], x)


DISCRETE: dict[type[SDE], type[LadderLevels] | type[ChainLevels]] = {VESDE: LadderLevels, VPSDE: ChainLevels}
"""The conditionings of networks trained in discrete time, by SDE."""


def conditioning(sde: SDE, scale_by_sigma: bool, levels: int | None, parameterization: str = "noise") -> Conditioning:
    """Returns the conditioning of a network.

    Args:
        scale_by_sigma: whether the network divides its output by sigma.
        levels: the number of noise levels of a network that was trained in discrete time; None for continuous time.
        parameterization: one of `PARAMETERIZATIONS`.

    Raises:
        ValueError: if discrete time or the parameterization is not defined for the SDE, there are fewer than two
            levels, or a level has no noise.
    """
    if parameterization not in PARAMETERIZATIONS:
        known = ", ".join(PARAMETERIZATIONS)
        raise ValueError(f"model.parameterization is {parameterization!r}; known: {known}")
    if parameterization != "noise" and (scale_by_sigma or levels is not None):
        raise ValueError(
            f"model.parameterization is {parameterization!r}, which needs model.scale_by_sigma=False and "
            "training.continuous=True"
        )
    if levels is None:
        sdes, without_scale = PARAMETERIZATIONS[parameterization]
        if not isinstance(sde, sdes):
            raise ValueError(f"model.parameterization is {parameterization!r}, which {sde} does not define")
        return NoiseLevels(sde) if scale_by_sigma else without_scale(sde)
    if type(sde) not in DISCRETE:
        raise ValueError(f"training.continuous is False, which needs training.sde vesde or vpsde, got {sde}")
    if levels < 2:
        raise ValueError(f"model.num_scales is {levels}; training in discrete time needs at least 2 noise levels")
    # Without computing anything, this raises ValueError if there are too few levels.
    jax.eval_shape(lambda t: sde.chain_alpha_sigma(t, levels), jnp.zeros(1))
    if isinstance(sde, VPSDE) and sde.beta_min == 0:
        raise ValueError(
            "model.beta_min is 0, so the first noise level has no noise; with training.continuous=False it must be "
            "positive"
        )
    return DISCRETE[type(sde)](sde, levels)  # type: ignore[arg-type]
