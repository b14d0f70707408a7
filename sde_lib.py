"""The forward SDEs in closed form, by name.

Each SDE gives the closed forms of `SDE`. linear_sde.py has this base class and all that follows from the closed forms.

Sources: [S21a] Song et al., ICLR 2021 (VE, VP, sub-VP); [K22] Karras et al., 2022 (linear VE); [K21] Kingma et al.,
NeurIPS 2021, and [Z23] Zheng et al., ICML 2023 (gamma linear in time, velocities).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from arrays import Batch, PerExample, append_dims
from configs.default import Config
from linear_sde import SDE, LinearGammaSDE, Times


def _chain_index(t: PerExample, num_steps: int) -> Array:
    """The index i = floor(t (N - 1)) of the time t in the discrete chain."""
    return (t * (num_steps - 1) / SDE.t_max).astype(jnp.int32)


def chain_times(num_steps: int) -> Float[Array, " levels"]:
    """The times t_i = i / (N - 1) of the N levels of a discrete chain.

    Where t_i (N - 1) would be rounded to less than i in float32, t_i is the next larger number, so that
    floor(t_i (N - 1)) = i.
    """
    levels, last = np.arange(num_steps), np.float32(num_steps - 1)
    times = (levels / last).astype(np.float32)
    return jnp.asarray(np.where(times * last < levels, np.nextafter(times, np.float32(2)), times))


MOST_SIGMA = 1e16
"""The largest sigma_max. Then the squared length of an image with this noise is a finite 32-bit number."""


@dataclasses.dataclass(frozen=True)
class VESDE(SDE):
    """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t ([S21a] Eqn. 9 and 30)."""

    variance_exploding = True
    scale_by_sigma = True

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max <= MOST_SIGMA:
            raise ValueError(
                f"need 0 < sigma_min < sigma_max <= {MOST_SIGMA:g}, got {self.sigma_min} and {self.sigma_max}"
            )

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    @property
    def prior_sigma(self) -> float:
        return self.sigma_max

    def alpha_sigma(self, t: Times) -> tuple[Times, Times]:
        return jnp.ones_like(t), jnp.exp(self.log_noise_level(t))

    def drift_coeff(self, t: Times) -> Times:
        return jnp.zeros_like(t)

    def diffusion(self, t: Times) -> Times:
        return self.alpha_sigma(t)[1] * math.sqrt(2 * self._log_ratio)

    def log_noise_level(self, t: Times) -> Times:
        return math.log(self.sigma_min) + t * self._log_ratio

    def time_of_log_noise_level(self, log_rho: Times) -> Times:
        return (log_rho - math.log(self.sigma_min)) / self._log_ratio

    def discretize(self, x: Batch, t: PerExample, num_steps: int) -> tuple[Batch, PerExample]:
        """The SMLD chain: G_i^2 = sigma_i^2 - sigma_{i-1}^2 on a geometric ladder, sigma_{-1} = 0 ([S21a] Eqn. 8)."""
        sigma, below = self.chain_sigmas(t, num_steps)
        log_step = self._log_ratio / (num_steps - 1)
        return jnp.zeros_like(x), sigma * jnp.where(below == 0, 1.0, math.sqrt(-math.expm1(-2 * log_step)))

    def chain_alpha_sigma(self, t: PerExample, num_steps: int) -> tuple[PerExample, PerExample]:
        return jnp.ones_like(t), self.chain_sigmas(t, num_steps)[0]

    def chain_sigmas(self, t: PerExample, num_steps: int) -> tuple[PerExample, PerExample]:
        """sigma_i and sigma_{i-1} of the SMLD chain with `num_steps` steps.

        Raises:
            ValueError: for a single step, because the chain begins at sigma_min and ends at sigma_max.
        """
        if num_steps < 2:
            raise ValueError(f"the discrete chain of {self} needs at least 2 steps, got {num_steps}")
        i = _chain_index(t, num_steps)
        log_step = self._log_ratio / (num_steps - 1)
        sigma = self.sigma_min * jnp.exp(i * log_step)
        return sigma, jnp.where(i == 0, 0.0, math.exp(-log_step) * sigma)


@dataclasses.dataclass(frozen=True)
class LinearVESDE(SDE):
    """Variance exploding with sigma linear in time: alpha = 1, sigma = sigma_max t. [K22] Sec. 3 proposes this."""

    variance_exploding = True

    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_max <= MOST_SIGMA:
            raise ValueError(f"need 0 < sigma_max <= {MOST_SIGMA:g}, got {self.sigma_max}")

    @property
    def prior_sigma(self) -> float:
        return self.sigma_max

    def alpha_sigma(self, t: Times) -> tuple[Times, Times]:
        return jnp.ones_like(t), self.sigma_max * t

    def drift_coeff(self, t: Times) -> Times:
        return jnp.zeros_like(t)

    def diffusion(self, t: Times) -> Times:
        return self.sigma_max * jnp.sqrt(2 * t)

    def log_noise_level(self, t: Times) -> Times:
        return math.log(self.sigma_max) + jnp.log(t)

    def time_of_log_noise_level(self, log_rho: Times) -> Times:
        return jnp.exp(log_rho - math.log(self.sigma_max))


MOST_BETA = 160.0
"""The largest beta_min + beta_max, which is 2 B(1). Then rho^2 is below exp(80), and float32 ends at exp(88.7)."""


@dataclasses.dataclass(frozen=True)
class _LinearBetaSDE(SDE):
    """The common part of VP and sub-VP: f = -beta / 2, beta linear in t, so alpha = exp(-B / 2), B = int_0^t beta."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta_min <= self.beta_max or self.beta_max == 0:
            raise ValueError(f"need 0 <= beta_min <= beta_max, beta_max > 0, got {self.beta_min} and {self.beta_max}")
        if self.beta_min + self.beta_max > MOST_BETA:
            raise ValueError(
                f"need beta_min + beta_max <= {MOST_BETA}, because 32-bit numbers cannot hold the noise level at t = 1 "
                f"otherwise, got {self.beta_min} and {self.beta_max}"
            )

    @property
    def prior_sigma(self) -> float:
        return 1.0

    def beta(self, t: Times) -> Times:
        """The noise rate at t, linear in time."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def beta_integral(self, t: Times) -> Times:
        """B(t)."""
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def time_of_beta_integral(self, integral: Times) -> Times:
        """The root t of B(t) = integral, in the form without cancellation."""
        slope = self.beta_max - self.beta_min
        return 2 * integral / (self.beta_min + jnp.sqrt(self.beta_min**2 + 2 * slope * integral))

    def drift_coeff(self, t: Times) -> Times:
        return -0.5 * self.beta(t)


@dataclasses.dataclass(frozen=True)
class VPSDE(_LinearBetaSDE):
    """Variance preserving: sigma^2 = 1 - exp(-B) ([S21a] Eqn. 11 and 33)."""

    def alpha_sigma(self, t: Times) -> tuple[Times, Times]:
        integral = self.beta_integral(t)
        return jnp.exp(-0.5 * integral), jnp.sqrt(-jnp.expm1(-integral))

    def diffusion(self, t: Times) -> Times:
        return jnp.sqrt(self.beta(t))

    def log_noise_level(self, t: Times) -> Times:
        integral = self.beta_integral(t)
        return 0.5 * (integral + jnp.log(-jnp.expm1(-integral)))

    def time_of_log_noise_level(self, log_rho: Times) -> Times:
        return self.time_of_beta_integral(jax.nn.softplus(2 * log_rho))

    def discretize(self, x: Batch, t: PerExample, num_steps: int) -> tuple[Batch, PerExample]:
        """The DDPM chain: x_{i+1} = sqrt(1 - beta_i) x_i + sqrt(beta_i) z ([S21a] Eqn. 10)."""
        beta = self.chain_beta(t, num_steps)
        # sqrt(1 - beta) - 1 without cancellation
        return append_dims(-beta / (1 + jnp.sqrt(1 - beta)), x) * x, jnp.sqrt(beta)

    def chain_alpha_sigma(self, t: PerExample, num_steps: int) -> tuple[PerExample, PerExample]:
        """alpha_i^2 is the product of 1 - beta_j over j <= i, and sigma_i^2 = 1 - alpha_i^2 ([H20] Eqn. 4)."""
        log_alpha_squared = jnp.cumsum(jnp.log1p(-self._chain_betas(num_steps)))[_chain_index(t, num_steps)]
        return jnp.exp(0.5 * log_alpha_squared), jnp.sqrt(-jnp.expm1(log_alpha_squared))

    def step_alpha(self, t: PerExample, num_steps: int) -> PerExample:
        """Returns 1 - beta_i, as published; with too few steps for a chain, the factor from the marginals."""
        if num_steps <= self.beta_max:
            return super().step_alpha(t, num_steps)
        return 1 - self.chain_beta(t, num_steps)

    def chain_beta(self, t: PerExample, num_steps: int) -> PerExample:
        """beta_i of the DDPM chain with `num_steps` steps.

        Raises:
            ValueError: if there are so few steps that beta_i, a variance below 1, would exceed 1.
        """
        return self._chain_betas(num_steps)[_chain_index(t, num_steps)]

    def _chain_betas(self, num_steps: int) -> Float[Array, " levels"]:
        if num_steps <= self.beta_max:
            raise ValueError(f"the discrete chain of {self} needs more than {self.beta_max} steps, got {num_steps}")
        return jnp.linspace(self.beta_min / num_steps, self.beta_max / num_steps, num_steps)


@dataclasses.dataclass(frozen=True)
class SubVPSDE(_LinearBetaSDE):
    """Sub-variance preserving: sigma = 1 - exp(-B), below VP's at every time ([S21a] Eqn. 12 and 34)."""

    def alpha_sigma(self, t: Times) -> tuple[Times, Times]:
        integral = self.beta_integral(t)
        return jnp.exp(-0.5 * integral), -jnp.expm1(-integral)

    def diffusion(self, t: Times) -> Times:
        return jnp.sqrt(-self.beta(t) * jnp.expm1(-2 * self.beta_integral(t)))

    def log_noise_level(self, t: Times) -> Times:
        integral = self.beta_integral(t)
        return 0.5 * integral + jnp.log(-jnp.expm1(-integral))

    def time_of_log_noise_level(self, log_rho: Times) -> Times:
        # rho = 2 sinh(B / 2)
        return self.time_of_beta_integral(2 * jnp.arcsinh(0.5 * jnp.exp(log_rho)))


@dataclasses.dataclass(frozen=True)
class LinearGammaVPSDE(LinearGammaSDE):
    """Variance preserving with linear gamma: alpha^2 = sigmoid(-gamma), F = alpha noise - sigma x_0 ([K21], [Z23])."""

    k = 1

    def velocity(self, x0: Batch, noise: Batch, t: PerExample) -> Batch:
        alpha, sigma = self.alpha_sigma(t)
        return append_dims(alpha, x0) * noise - append_dims(sigma, x0) * x0

    def noise_of_velocity(self, x: Batch, velocity: Batch, t: PerExample) -> Batch:
        alpha, sigma = self.alpha_sigma(t)
        return append_dims(alpha, x) * velocity + append_dims(sigma, x) * x

    def alpha_squared_above(self, gamma: Times) -> Times:
        return jax.nn.softplus(-gamma)

    def gamma_of_alpha_squared_above(self, integral: Times) -> Times:
        return -integral - jnp.log(-jnp.expm1(-integral))


@dataclasses.dataclass(frozen=True)
class StraightPathSDE(LinearGammaSDE):
    """Straight paths from data to noise: alpha = 1 - sigma, F = (noise - x_0) / sqrt(2) ([Z23])."""

    k = 2

    def velocity(self, x0: Batch, noise: Batch, t: PerExample) -> Batch:
        return (noise - x0) * math.sqrt(0.5)

    def noise_of_velocity(self, x: Batch, velocity: Batch, t: PerExample) -> Batch:
        return append_dims(math.sqrt(2) * self.alpha_sigma(t)[0], x) * velocity + x

    def alpha_squared_above(self, gamma: Times) -> Times:
        return 2 * (jax.nn.softplus(-0.5 * gamma) - jax.nn.sigmoid(-0.5 * gamma))

    def gamma_of_alpha_squared_above(self, integral: Times) -> Times:
        """The root, by Newton's method. As the integral is convex in gamma, no step passes the root from the left."""

        def step(_: Array, gamma: Times) -> Times:
            alpha_squared = jax.nn.sigmoid(-0.5 * gamma) ** 2
            return gamma + (self.alpha_squared_above(gamma) - integral) / alpha_squared

        return jax.lax.fori_loop(0, 30, step, -integral - 2)  # The start is left of the root, as integral > -gamma - 2.


SDES: dict[str, type[SDE]] = {
    "vesde": VESDE,
    "linearvesde": LinearVESDE,
    "vpsde": VPSDE,
    "subvpsde": SubVPSDE,
    "lineargammavpsde": LinearGammaVPSDE,
    "straightpathsde": StraightPathSDE,
}


def sde_from_config(config: Config) -> SDE:
    """The SDE named by training.sde, with its constants from config.model.

    A constant that config.model does not have keeps the default of the SDE's class.

    Raises:
        ValueError: if training.sde is unknown, or a constant is not allowed.
    """
    if config.training.sde not in SDES:
        raise ValueError(f"training.sde is {config.training.sde!r}; known: {', '.join(SDES)}")
    sde, model = SDES[config.training.sde], config.model
    return sde(**{field.name: model[field.name] for field in dataclasses.fields(sde) if field.name in model})
