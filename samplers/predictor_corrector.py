"""The updates of predictor-corrector samplers.

Each is a pure function (score_fn, sde, x, t, noise, ...) -> (x, x_mean), where x_mean is x before noise is added.
`num_steps` is the number of steps of the discrete chain from t_max to 0.

Sources: [S21a] Song et al., ICLR 2021; [SE19] Song & Ermon, NeurIPS 2019; [H20] Ho et al., NeurIPS 2020.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from arrays import Batch, PerExample, ScoreFn, append_dims, inner
from sde_lib import SDE, VESDE, VPSDE

Update = tuple[Batch, Batch]
"""x after an update, and its mean, that is, x before noise was added."""


# Predictors: one step of the reverse-time SDE, or with `probability_flow` of the ODE with the same marginals.


def euler_maruyama(
    score_fn: ScoreFn, sde: SDE, x: Batch, t: PerExample, noise: Batch, num_steps: int, probability_flow: bool = False
) -> Update:
    """Euler-Maruyama on dx = [f - g^2 score] dt + g dw, with dt = -t_max / num_steps ([S21a] Eqn. 6)."""
    dt = sde.t_max / num_steps
    g = append_dims(sde.diffusion(t), x)
    if probability_flow:
        x_mean = x - sde.probability_flow(score_fn, x, t) * dt
        return x_mean, x_mean
    x_mean = x - (sde.drift(x, t) - g**2 * score_fn(x, t)) * dt
    return x_mean + g * dt**0.5 * noise, x_mean


def reverse_diffusion(
    score_fn: ScoreFn, sde: SDE, x: Batch, t: PerExample, noise: Batch, num_steps: int, probability_flow: bool = False
) -> Update:
    """Reverses the forward chain x_{i+1} = x_i + f_i + G_i z in the same way as the SDE ([S21a] Eqn. 46)."""
    f, g = sde.discretize(x, t, num_steps)
    g = append_dims(g, x)
    if probability_flow:
        x_mean = x - f + 0.5 * g**2 * score_fn(x, t)
        return x_mean, x_mean
    x_mean = x - f + g**2 * score_fn(x, t)
    return x_mean + g * noise, x_mean


def ancestral_sampling(
    score_fn: ScoreFn, sde: SDE, x: Batch, t: PerExample, noise: Batch, num_steps: int, probability_flow: bool = False
) -> Update:
    """Ancestral sampling of the discrete chain, which is defined for VE and VP.

    Raises:
        ValueError: for other SDEs, and for `probability_flow`.
    """
    check_ancestral(sde, probability_flow)
    return _ANCESTRAL[type(sde)](sde, x, score_fn(x, t), t, noise, num_steps)


def _ancestral_ddpm(sde: VPSDE, x: Batch, score: Batch, t: PerExample, noise: Batch, num_steps: int) -> Update:
    """x_{i-1} = (x_i + beta_i score) / sqrt(1 - beta_i) + sqrt(beta_i) z ([S21a] Eqn. 4, [H20] Alg. 2)."""
    beta = append_dims(sde.chain_beta(t, num_steps), x)
    x_mean = (x + beta * score) / jnp.sqrt(1 - beta)
    return x_mean + jnp.sqrt(beta) * noise, x_mean


def _ancestral_smld(sde: VESDE, x: Batch, score: Batch, t: PerExample, noise: Batch, num_steps: int) -> Update:
    """x_{i-1} = x_i + G^2 score + G sigma_{i-1} / sigma_i z, G^2 = sigma_i^2 - sigma_{i-1}^2 ([S21a] Eqn. 47)."""
    sigma, below = (append_dims(s, x) for s in sde.chain_sigmas(t, num_steps))
    g = append_dims(sde.discretize(x, t, num_steps)[1], x)
    x_mean = x + g**2 * score
    return x_mean + g * below / sigma * noise, x_mean


_ANCESTRAL: dict[type[SDE], Callable[..., Update]] = {VPSDE: _ancestral_ddpm, VESDE: _ancestral_smld}


def check_ancestral(sde: SDE, probability_flow: bool) -> None:
    """Raises ValueError if ancestral sampling is not defined for these settings."""
    if type(sde) not in _ANCESTRAL:
        raise ValueError(
            f"sampling.predictor is 'ancestral_sampling', which needs training.sde vesde or vpsde, got {sde}; use "
            "reverse_diffusion"
        )
    if probability_flow:
        raise ValueError(
            "sampling.predictor is 'ancestral_sampling', which has no probability_flow; use reverse_diffusion, or set "
            "sampling.probability_flow=False"
        )


# Correctors: one step of Langevin dynamics at constant t, x + step score + sqrt(2 step) noise.


def langevin(
    score_fn: ScoreFn, sde: SDE, x: Batch, t: PerExample, noise: Batch, num_steps: int, snr: float | Array
) -> Update:
    """step = 2 a (snr |noise| / |score|)^2, a = `sde.step_alpha` ([S21a] Alg. 4 and 5).

    The two norms are means over the whole batch, on all devices, as published. Therefore the images of a batch are
    coupled, and samples depend on the batch size.
    """
    score = score_fn(x, t)
    ratio = _mean_norm(noise) / _mean_norm(score)
    return langevin_step(x, score, noise, 2 * sde.step_alpha(t, num_steps) * (snr * ratio) ** 2)


def annealed_langevin(
    score_fn: ScoreFn, sde: SDE, x: Batch, t: PerExample, noise: Batch, num_steps: int, snr: float | Array
) -> Update:
    """step = 2 a (snr sigma_t)^2, a = `sde.step_alpha` ([SE19] Alg. 1, scaled as in [S21a])."""
    step = 2 * sde.step_alpha(t, num_steps) * (snr * sde.alpha_sigma(t)[1]) ** 2
    return langevin_step(x, score_fn(x, t), noise, step)


def _mean_norm(x: Batch) -> Array:
    return jnp.mean(jnp.sqrt(inner(x, x)))


def langevin_step(x: Batch, score: Batch, noise: Batch, step: PerExample) -> Update:
    """x + step score + sqrt(2 step) noise."""
    step = append_dims(step, x)
    x_mean = x + step * score
    return x_mean + jnp.sqrt(2 * step) * noise, x_mean


PREDICTORS = {
    "euler_maruyama": euler_maruyama,
    "reverse_diffusion": reverse_diffusion,
    "ancestral_sampling": ancestral_sampling,
    "none": None,
}
CORRECTORS = {"langevin": langevin, "ald": annealed_langevin, "none": None}
