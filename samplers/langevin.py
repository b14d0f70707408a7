"""Langevin dynamics at one noise level, and annealed from large noise levels to small ones.

Like the few-step samplers, they work on y = x_t / alpha, whose noise level is rho = sigma / alpha for every SDE. (For
VE, y = x.) One step is y + a / 2 score(y) + sqrt(a) z. At a fixed noise level, the density of y approaches the density
of the data with this noise, up to an error of the order of a. If modes are far apart compared with rho, it takes very
long to move mass between them. Annealing starts at a noise level at which there is only one mode ([SE19] Sec. 3.2.2 and
4.3).

Source: [SE19] Song & Ermon, NeurIPS 2019.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from arrays import Batch, ReportProgress, ScoreFn, append_dims, in_parts
from configs.default import Config
from samplers.few_step import LogNoiseLevels, noise_levels
from samplers.predictor_corrector import langevin_step
from samplers.sampler import (
    DataRange,
    ImageKeys,
    Sampler,
    Samples,
    StepNoise,
    check_at_least,
    check_positive,
    common_fields,
    denoise_at,
    first_noise,
)
from sde_lib import SDE


def annealed_langevin_dynamics(
    score_fn: ScoreFn,
    sde: SDE,
    x: Batch,
    log_rhos: LogNoiseLevels,
    steps_per_level: int,
    step_size: float,
    noise: StepNoise,
    progress: ReportProgress | None = None,
) -> Batch:
    """Takes `steps_per_level` steps at each of the noise levels, from the first to the last ([SE19] Alg. 1).

    The step size at the level rho_i is a_i = step_size (rho_i / rho_L)^2, where rho_L is the last level. The score is
    evaluated steps_per_level times at each level.

    Args:
        x: at t_max.
        log_rhos: ln rho of the levels. One level is plain Langevin dynamics.
        step_size: a_L, the step size at the last level.

    Returns:
        x at the time of the last level.
    """
    log_levels = jnp.asarray(log_rhos, x.dtype)
    times = sde.time_of_log_noise_level(log_levels)
    alphas = sde.alpha_sigma(times)[0]
    step_sizes = step_size * jnp.exp(2 * (log_levels - log_levels[-1]))

    def advance(y: Batch, first: int, last: int) -> Batch:
        return _steps(score_fn, y, (times, alphas, step_sizes), steps_per_level, noise, first, last)

    y = x / sde.alpha_sigma(jnp.asarray(sde.t_max, x.dtype))[0]
    y = in_parts(advance, y, steps_per_level * len(log_rhos), progress)
    return y * alphas[-1]


@jax.jit
def _steps(
    score_fn: ScoreFn,
    y: Batch,
    levels: tuple[Float[Array, " levels"], Float[Array, " levels"], Float[Array, " levels"]],
    steps_per_level: Int[Array, ""] | int,
    noise: StepNoise,
    first: Int[Array, ""] | int,
    last: Int[Array, ""] | int,
) -> Batch:
    """Takes steps first, ..., last - 1. One compiled program runs any part of the steps, with any number per level.

    Args:
        levels: the time, alpha, and the step size of each level.
    """

    def step(k: Array, y: Batch) -> Batch:
        t, alpha, step_size = (jnp.full(len(y), values[k // steps_per_level]) for values in levels)
        alpha = append_dims(alpha, y)
        return langevin_step(y, alpha * score_fn(alpha * y, t), noise(y.shape[1:], k), 0.5 * step_size)[0]

    return jax.lax.fori_loop(first, last, step, y)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LangevinSampler(Sampler):
    """Langevin dynamics, see `annealed_langevin_dynamics`. The defaults are from [SE19] Sec. 5.

    Attributes:
        num_levels: noise levels, in geometric steps from the one at t_max to the one at `smallest_time`. With one
            level, the one at `smallest_time`, this is Langevin dynamics without annealing.
        steps_per_level: steps at each level.
        step_size: the step size at the last level.
    """

    num_levels: int = 10
    steps_per_level: int = 100
    step_size: float = 2e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("sampling.num_levels", self.num_levels, 1)
        check_at_least("sampling.steps_per_level", self.steps_per_level, 1)
        check_positive("sampling.step_size", self.step_size)

    @property
    def log_rhos(self) -> LogNoiseLevels:
        """Returns ln rho of the levels."""
        # The smallest level comes last, so that it is also the only one.
        return noise_levels(self.sde, self.smallest_time, max(self.num_levels, 2), "log_snr", 1.0)[-self.num_levels :]

    @property
    def stable_step_size(self) -> float:
        """4 rho_L^2: with larger steps, differences from a point or a surface of data grow.

        Near it, the score of y is -(y - x) / rho^2, so a step multiplies the difference by 1 - a / (2 rho^2).
        """
        return 4 * math.exp(2 * float(self.log_rhos[-1]))

    def concerns(self, *, discrete: bool) -> list[str]:
        if self.step_size < self.stable_step_size:
            return super().concerns(discrete=discrete)
        return [
            f"sampling.step_size is {self.step_size:g}: Langevin dynamics diverges from about "
            f"{self.stable_step_size:.3g} on, 4 (sigma / alpha)^2 at sampling.smallest_time; lower it"
        ]

    def solve(self, score_fn: ScoreFn, x: Batch, keys: ImageKeys, progress: ReportProgress | None = None) -> Samples:
        noise = jax.tree_util.Partial(first_noise, keys)
        settings = self.log_rhos, self.steps_per_level, self.step_size, noise, progress
        x = annealed_langevin_dynamics(score_fn, self.sde, x, *settings)
        if self.noise_removal:
            x = denoise_at(score_fn, self.sde, x, self.smallest_time)
        return Samples(x, self.num_levels * self.steps_per_level + self.noise_removal)


def langevin_from_config(config: Config, sde: SDE, data_range: DataRange) -> Sampler:
    """Builds Langevin dynamics with the fields of `sampling`, with one level unless the method is annealed."""
    del data_range
    sampling = config.sampling
    return LangevinSampler(
        num_levels=sampling.num_levels if sampling.method == "annealed_langevin" else 1,
        steps_per_level=sampling.steps_per_level,
        step_size=sampling.step_size,
        **common_fields(config, sde),
    )
