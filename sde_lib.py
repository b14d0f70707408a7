"""The forward SDEs, in closed form.

Every SDE here is linear, dx = f(t) x dt + g(t) dw for t in [0, 1], so x_t given x_0 is N(alpha_t x_0, sigma_t^2 I).
One function describes it up to the scale of x: the noise level rho = sigma / alpha. The rest follows from rho. For
example, the importance weight of the likelihood-weighted objective is g^2 / sigma^2 = d/dt ln rho^2, so sampling t in
proportion to this weight means sampling ln rho uniformly.

Sources: [S21a] Song et al., ICLR 2021 (VE, VP, sub-VP); [S21b] Song et al., NeurIPS 2021 (importance sampling);
[K21] Kingma et al., NeurIPS 2021, and [Z23] Zheng et al., ICML 2023 (gamma linear in time, velocities).
"""

import abc
import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from arrays import Batch, PerExample, ScoreFn, append_dims, inner, num_dims
from configs.default import Config

Times = Float[Array, "*times"]


@dataclasses.dataclass(frozen=True)
class SDE(abc.ABC):
    """A linear forward SDE. Subclasses give the closed forms; the other methods follow from these."""

    t_max: ClassVar[float] = 1.0

    variance_exploding: ClassVar[bool] = False
    """Whether alpha = 1 at all times, so that the data keep their scale and the noise grows."""

    scale_by_sigma: ClassVar[bool] = False
    """Whether image networks for this SDE are conditioned on sigma and divide their output by it ([S21a] App. C)."""

    @abc.abstractmethod
    def alpha_sigma(self, t: Times) -> tuple[Times, Times]:
        """Scale and standard deviation of x_t given x_0."""

    @abc.abstractmethod
    def drift_coeff(self, t: Times) -> Times:
        """f(t) in the drift f(t) x."""

    @abc.abstractmethod
    def diffusion(self, t: Times) -> Times:
        """The diffusion coefficient g(t)."""

    @abc.abstractmethod
    def log_noise_level(self, t: Times) -> Times:
        """ln rho, rho = sigma / alpha."""

    @abc.abstractmethod
    def time_of_log_noise_level(self, log_rho: Times) -> Times:
        """The inverse of `log_noise_level`."""

    @property
    @abc.abstractmethod
    def prior_sigma(self) -> float:
        """Standard deviation of the prior N(0, prior_sigma^2 I) that stands for x at t_max."""

    def marginal(self, x0: Batch, t: PerExample) -> tuple[Batch, PerExample]:
        """Mean and standard deviation of x_t given x_0."""
        alpha, sigma = self.alpha_sigma(t)
        return append_dims(alpha, x0) * x0, sigma

    def drift(self, x: Batch, t: PerExample) -> Batch:
        """The drift f(t) x of the SDE, shaped as x."""
        return append_dims(self.drift_coeff(t), x) * x

    def probability_flow(self, score_fn: ScoreFn, x: Batch, t: PerExample) -> Batch:
        """dx/dt of the ODE with the SDE's marginals: f - g^2 score / 2 ([S21a] Eqn. 13)."""
        return self.drift(x, t) - append_dims(0.5 * self.diffusion(t) ** 2, x) * score_fn(x, t)

    def drift_divergence(self, x: Batch, t: PerExample) -> PerExample:
        """div f, in closed form: d f(t)."""
        return num_dims(x) * self.drift_coeff(t)

    def prior_sample(self, key: Array, shape: tuple[int, ...]) -> Float[Array, "*shape"]:
        """Draws x at t_max from the prior N(0, prior_sigma^2 I)."""
        return self.prior_sigma * jax.random.normal(key, shape)

    def prior_logp(self, x: Batch) -> PerExample:
        """Log-density of the prior, in nats."""
        variance = self.prior_sigma**2
        return -0.5 * (num_dims(x) * math.log(2 * math.pi * variance) + inner(x, x) / variance)

    def level_logp(self, x: Batch, x0: Batch, t: PerExample, values: Float[Array, " levels"]) -> PerExample:
        """Returns ln P(x0 | x_t = x) in nats, if entries of x0 are independent and all `values` equally probable.

        Where the noise is small compared with the distance between values, this is nearly exact for every prior.
        """
        alpha, rho = append_dims(self.alpha_sigma(t)[0], x), append_dims(jnp.exp(self.log_noise_level(t)), x)
        y = x / alpha

        def logit(value: Array, y: Array, rho: Array) -> Array:
            return -0.5 * jnp.square((y - value) / rho)

        logits = logit(values.reshape(-1, *(1,) * x.ndim), y[None], rho[None])
        logp = logit(x0, y, rho) - jax.nn.logsumexp(logits, axis=0)
        return jnp.sum(logp, axis=range(1, x.ndim))

    def importance_weight(self, t: Times, t_min: float) -> Times:
        """Z(t), the integral of g^2 / sigma^2 over [t_min, t]."""
        return 2 * (self.log_noise_level(t) - self.log_noise_level(jnp.asarray(t_min, t.dtype)))

    def time_of_quantile(self, quantile: Times, t_min: float) -> Times:
        """The t with Z(t) = `quantile`. Quantiles uniform in (0, Z(t_max)) give t with density ~ g^2 / sigma^2."""
        log_rho_min = self.log_noise_level(jnp.asarray(t_min, quantile.dtype))
        return self.time_of_log_noise_level(log_rho_min + 0.5 * quantile)

    def discretize(self, x: Batch, t: PerExample, num_steps: int) -> tuple[Batch, PerExample]:
        """Returns one of `num_steps` steps of the forward chain, x_{i+1} = x_i + f_i + G_i z, by Euler-Maruyama.

        Returns:
            f_i, shaped as x, and G_i for each example.
        """
        dt = self.t_max / num_steps
        return self.drift(x, t) * dt, self.diffusion(t) * math.sqrt(dt)

    def chain_alpha_sigma(self, t: PerExample, num_steps: int) -> tuple[PerExample, PerExample]:
        """Scale and standard deviation of x_i given x_0 in the discrete chain, for the level i of each time.

        The chain has `num_steps` levels 0, ..., N - 1, and i = floor(t (N - 1)). Discretely trained models know the
        data at these noise levels only; see `chain_times`.

        Raises:
            ValueError: if no discrete chain is published for the SDE.
        """
        raise ValueError(f"{self} has no discrete chain; vesde and vpsde have one")

    def step_alpha(self, t: PerExample, num_steps: int) -> PerExample:
        """(alpha_{t + dt} / alpha_t)^2 of one forward step: the factor of the Langevin step sizes in [S21a] Alg. 5.

        It follows from the marginals, so it holds for every SDE and any number of steps. VP uses its chain's factor.
        """
        before = jnp.maximum(t - self.t_max / num_steps, 0)
        return (self.alpha_sigma(t)[0] / self.alpha_sigma(before)[0]) ** 2


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


@dataclasses.dataclass(frozen=True)
class VESDE(SDE):
    """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t ([S21a] Eqn. 9 and 30)."""

    variance_exploding = True
    scale_by_sigma = True

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"need 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")

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
        log_step = self._log_ratio / max(num_steps - 1, 1)
        return jnp.zeros_like(x), sigma * jnp.where(below == 0, 1.0, math.sqrt(-math.expm1(-2 * log_step)))

    def chain_alpha_sigma(self, t: PerExample, num_steps: int) -> tuple[PerExample, PerExample]:
        return jnp.ones_like(t), self.chain_sigmas(t, num_steps)[0]

    def chain_sigmas(self, t: PerExample, num_steps: int) -> tuple[PerExample, PerExample]:
        """sigma_i and sigma_{i-1} of the SMLD chain with `num_steps` steps."""
        i = _chain_index(t, num_steps)
        log_step = self._log_ratio / max(num_steps - 1, 1)
        sigma = self.sigma_min * jnp.exp(i * log_step)
        return sigma, jnp.where(i == 0, 0.0, math.exp(-log_step) * sigma)


@dataclasses.dataclass(frozen=True)
class LinearVESDE(SDE):
    """Variance exploding with sigma linear in time: alpha = 1, sigma = sigma_max t. [K22] Sec. 3 proposes this."""

    variance_exploding = True

    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not self.sigma_max > 0:
            raise ValueError(f"need sigma_max > 0, got {self.sigma_max}")

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


@dataclasses.dataclass(frozen=True)
class _LinearBetaSDE(SDE):
    """The common part of VP and sub-VP: f = -beta / 2, beta linear in t, so alpha = exp(-B / 2), B = int_0^t beta."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta_min <= self.beta_max or self.beta_max == 0:
            raise ValueError(f"need 0 <= beta_min <= beta_max, beta_max > 0, got {self.beta_min} and {self.beta_max}")

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
class LinearGammaSDE(SDE):
    """gamma = 2 ln(sigma / alpha) linear in t, with alpha^(2/k) + sigma^(2/k) = 1 for a number k ([K21], [Z23]).

    Networks can predict the velocity in place of the noise. In terms of the velocity, the likelihood-weighted objective
    has a weight in proportion to alpha^2 d gamma, so t can be sampled with this density.
    """

    k: ClassVar[int]

    gamma_min: float = -13.3
    gamma_max: float = 5.0

    def __post_init__(self) -> None:
        if not self.gamma_min < self.gamma_max:
            raise ValueError(f"need gamma_min < gamma_max, got {self.gamma_min} and {self.gamma_max}")

    @abc.abstractmethod
    def velocity(self, x0: Batch, noise: Batch, t: PerExample) -> Batch:
        """Returns F for data x0 and standard normal noise, shaped as x0."""

    @abc.abstractmethod
    def noise_of_velocity(self, x: Batch, velocity: Batch, t: PerExample) -> Batch:
        """Returns the noise in x = x_t according to F, shaped as x."""

    @abc.abstractmethod
    def alpha_squared_above(self, gamma: Times) -> Times:
        """Returns the integral of alpha^2 d gamma from `gamma` to infinity."""

    @abc.abstractmethod
    def gamma_of_alpha_squared_above(self, integral: Times) -> Times:
        """Inverts `alpha_squared_above`."""

    @property
    def gamma_range(self) -> float:
        return self.gamma_max - self.gamma_min

    @property
    def prior_sigma(self) -> float:
        return math.exp(-0.5 * self.k * math.log1p(math.exp(-self.gamma_max / self.k)))

    def gamma(self, t: Times) -> Times:
        return self.gamma_min + t * self.gamma_range

    def alpha_sigma(self, t: Times) -> tuple[Times, Times]:
        scaled = self.gamma(t) / self.k
        alpha, sigma = (jnp.exp(-0.5 * self.k * jax.nn.softplus(sign * scaled)) for sign in (1, -1))
        return alpha, sigma

    def drift_coeff(self, t: Times) -> Times:
        return -0.5 * self.gamma_range * jax.nn.sigmoid(self.gamma(t) / self.k)

    def diffusion(self, t: Times) -> Times:
        return self.alpha_sigma(t)[1] * math.sqrt(self.gamma_range)

    def log_noise_level(self, t: Times) -> Times:
        return 0.5 * self.gamma(t)

    def time_of_log_noise_level(self, log_rho: Times) -> Times:
        return (2 * log_rho - self.gamma_min) / self.gamma_range

    def velocity_weight(self, t: Times) -> Times:
        """Returns the integral of alpha^2 d gamma over times from t to t_max."""
        return self.alpha_squared_above(self.gamma(t)) - self.alpha_squared_above(jnp.full_like(t, self.gamma_max))

    def time_of_velocity_quantile(self, quantile: Times, t_min: float) -> Times:
        """Returns the t at the fraction `quantile` in [0, 1] of the integral of alpha^2 d gamma over [t_min, t_max]."""
        last = self.alpha_squared_above(jnp.full_like(quantile, self.gamma_max))
        above = last + (1 - quantile) * self.velocity_weight(jnp.full_like(quantile, t_min))  # accurate near t_max, too
        t = self.time_of_log_noise_level(0.5 * self.gamma_of_alpha_squared_above(above))
        return jnp.clip(t, t_min, self.t_max)


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
