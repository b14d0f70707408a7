"""Objectives that [L22] compares with high-order score matching, for points of few dimensions.

- Second-order denoising score matching of Meng et al. [M21]. Its target z z^T has the noise of the whole z.
  The target of [L22] is u u^T, where u is the part of the noise that the score does not explain.
- The likelihood of the ODE itself, differentiated through the solver ([L22] App. F.E3). Each step of training solves
  the ODE. likelihood.py computes the same number for evaluation, by loops that have no gradient.

Sources: [L22] Lu et al., ICML 2022; [M21] Meng et al., NeurIPS 2021.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from arrays import Batch, PerExample, Scalar, ScoreFn, append_dims, mean_square, num_dims
from configs.default import Config
from derivatives import exact_divergence, exact_jacobian
from objectives.objective import Residual, TrainingObjective, require_continuous_time, require_first_order
from objectives.times import TimeDistribution, times_from_config
from sde_lib import SDE


class TimedNoise(NamedTuple):
    """The randomness of one evaluation of the losses."""

    t: PerExample
    z: Batch


@dataclasses.dataclass(frozen=True)
class MengObjective(TrainingObjective):
    """First-order denoising score matching plus `second_weight` times the second-order loss of [M21]."""

    times: TimeDistribution
    second_weight: float = 1.0
    likelihood_weighting: bool = False

    @property
    def needs_jacobian(self) -> bool:
        return True

    def draw_noise(
        self, key: Array, sde: SDE, shape: tuple[int, ...], density: Float[Array, " bins"] | None = None
    ) -> TimedNoise:
        del density  # All examples draw their times from the same density.
        t_key, z_key = jax.random.split(key)
        return TimedNoise(self.times.draw(t_key, sde, shape[0]), jax.random.normal(z_key, shape))

    def losses(
        self, score_fn: ScoreFn, sde: SDE, x0: Batch, noise: TimedNoise, residual: Residual | None = None
    ) -> dict[str, PerExample]:
        del residual  # The weights do not depend on it.
        mean, sigma = sde.marginal(x0, noise.t)
        factor = append_dims(sigma, x0)
        score, jacobian = exact_jacobian(lambda x: factor * score_fn(x, noise.t), mean + factor * noise.z)
        first = mean_square(score + noise.z)
        if self.likelihood_weighting:
            first = first * self.times.likelihood_weight(sde, noise.t)
        flat_score, z = (a.reshape(len(x0), -1) for a in (stop_gradient(score), noise.z))
        second = second_order_of_noise(sigma[:, None, None] * jacobian, flat_score, z)
        return {"total": first + self.second_weight * second, "first": first, "second_frob": second}


def second_order_of_noise(
    jacobian: Float[Array, "batch d d"], score_bar: Float[Array, "batch d"], z: Float[Array, "batch d"]
) -> PerExample:
    """|sigma^2 (J + s-bar s-bar^T) + I - z z^T|_F^2 / d^2 ([M21] Sec. 3).

    The second derivative of q_t is q_t (J + s s^T) for the exact score, and E[z z^T] given x_t is sigma^2 (J + s s^T) +
    I. So the minimiser is the Jacobian only where the score is exact.

    Args:
        jacobian: sigma^2 J.
        score_bar: sigma s-bar.
    """
    identity = jnp.eye(z.shape[1], dtype=z.dtype)[None]
    return mean_square(
        jacobian + score_bar[:, :, None] * score_bar[:, None, :] + identity - z[:, :, None] * z[:, None, :]
    )


class StartTime(NamedTuple):
    """The time at which the data are x, for each example. It is not random."""

    t: PerExample


@dataclasses.dataclass(frozen=True)
class OdeLikelihoodObjective(TrainingObjective):
    """-ln p(x) / d in nats, for the density p of the ODE, with the exact divergence and the gradient through all steps.

    Attributes:
        t_min: the time at which the data are x.
        num_steps: the number of Runge-Kutta steps, of equal size in the logarithm of the noise level.
    """

    t_min: float = 1e-5
    num_steps: int = 20

    @property
    def needs_jacobian(self) -> bool:
        return True

    def draw_noise(
        self, key: Array, sde: SDE, shape: tuple[int, ...], density: Float[Array, " bins"] | None = None
    ) -> StartTime:
        del key, sde, density
        return StartTime(jnp.full(shape[0], self.t_min))

    def losses(
        self, score_fn: ScoreFn, sde: SDE, x0: Batch, noise: StartTime, residual: Residual | None = None
    ) -> dict[str, PerExample]:
        del noise, residual
        return {"total": -log_likelihood(score_fn, sde, x0, self.t_min, self.num_steps) / num_dims(x0)}


State: TypeAlias = tuple[Batch, PerExample]
"""The position of each example, and the integral of the divergence so far."""


def log_likelihood(score_fn: ScoreFn, sde: SDE, x: Batch, t_min: float, num_steps: int) -> PerExample:
    """Returns ln p(x) = ln prior(x_T) + integral of div h dt, in nats ([L22] Eqn. 7), with a gradient in reverse mode.

    The backward pass recomputes each step, so memory holds one state for each step.
    """
    first, last = sde.log_noise_level(jnp.asarray([t_min, sde.t_max], x.dtype))
    step_size = (last - first) / num_steps

    def slope(log_rho: Scalar, state: State) -> State:
        """Returns the derivative in ln rho, by g^2 / sigma^2 = d/dt ln rho^2."""
        t = jnp.full(len(x), sde.time_of_log_noise_level(log_rho))
        rate = 2 * (sde.alpha_sigma(t)[1] / sde.diffusion(t)) ** 2
        flow, divergence = exact_divergence(lambda x: sde.probability_flow(score_fn, x, t), state[0])
        return append_dims(rate, flow) * flow, rate * divergence

    @jax.checkpoint
    def step(state: State, number: Array) -> tuple[State, None]:
        return _runge_kutta_step(slope, first + number * step_size, state, step_size), None

    (latent, change), _ = jax.lax.scan(step, (x, jnp.zeros(len(x), x.dtype)), jnp.arange(num_steps))
    return sde.prior_logp(latent) + change


def _runge_kutta_step(slope: Callable[[Scalar, State], State], s: Scalar, state: State, step_size: Scalar) -> State:
    """Takes one step of the classical method of order 4."""

    def moved(direction: State, part: float) -> State:
        return jax.tree.map(lambda y, k: y + part * step_size * k, state, direction)

    k1 = slope(s, state)
    k2 = slope(s + step_size / 2, moved(k1, 1 / 2))
    k3 = slope(s + step_size / 2, moved(k2, 1 / 2))
    k4 = slope(s + step_size, moved(k3, 1))
    mean = jax.tree.map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, k1, k2, k3, k4)
    return moved(mean, 1)


def meng_from_config(config: Config) -> MengObjective:
    """Builds the objective of Meng et al., as config.training describes it.

    Raises:
        ValueError: for a field whose value is not allowed.
    """
    training = config.training
    require_continuous_time(training)
    require_first_order(training)
    if not training.reduce_mean:
        raise ValueError(
            "training.reduce_mean is False, but training.objective=meng averages over dimensions: set it to True"
        )
    return MengObjective(times_from_config(training), training.second_order_weight, training.likelihood_weighting)


def ode_likelihood_from_config(config: Config) -> OdeLikelihoodObjective:
    """Builds the likelihood of the ODE, as config.training describes it.

    Raises:
        ValueError: for a field whose value is not allowed.
    """
    require_continuous_time(config.training)
    require_first_order(config.training)
    return OdeLikelihoodObjective(config.training.smallest_time, config.training.likelihood_steps)
