"""The base class of all forward SDEs, with all that follows from their closed forms. sde_lib.py has the SDEs by name.

Every SDE is linear, dx = f(t) x dt + g(t) dw for t in [0, 1], so x_t given x_0 is N(alpha_t x_0, sigma_t^2 I).
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
from jaxtyping import Array, Float

from arrays import Batch, PerExample, ScoreFn, append_dims, inner, num_dims

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
        Entries of x0 count as the nearest of `values`, from which rounding separates them: at the smallest noise, this
        difference would count.
        """
        alpha, rho = append_dims(self.alpha_sigma(t)[0], x), append_dims(jnp.exp(self.log_noise_level(t)), x)
        y, column = x / alpha, values.reshape(-1, *(1,) * x.ndim)

        def logit(value: Array, y: Array, rho: Array) -> Array:
            return -0.5 * jnp.square((y - value) / rho)

        nearest = values[jnp.argmin(jnp.abs(x0[None] - column), axis=0)]
        logp = logit(nearest, y, rho) - jax.nn.logsumexp(logit(column, y[None], rho[None]), axis=0)
        return jnp.sum(logp, axis=range(1, x.ndim))

    def importance_weight(self, t: Times, t_min: float) -> Times:
        """Z(t), the integral of g^2 / sigma^2 over [t_min, t]."""
        return 2 * (self.log_noise_level(t) - self.log_noise_level(jnp.asarray(t_min, t.dtype)))

    def time_of_quantile(self, quantile: Times, t_min: float) -> Times:
        """The t with Z(t) = `quantile`. Quantiles uniform in (0, Z(t_max)) give t with density ~ g^2 / sigma^2."""
        log_rho_min = self.log_noise_level(jnp.asarray(t_min, quantile.dtype))
        # Near t_min, 32 bits may round ln rho so that t would be 0, where labels like ln t are infinite.
        return jnp.clip(self.time_of_log_noise_level(log_rho_min + 0.5 * quantile), t_min, self.t_max)

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
