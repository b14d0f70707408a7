"""Samplers: from noise at t_max to images at smallest_time, given a score function.

Every update of the predictor-corrector samplers is one function (score_fn, sde, x, t, noise, ...) -> (x, x_mean), where
x_mean is x before noise is added. All randomness of image k comes from (key, k) and the number of the step, so an image
does not depend on the other images of its batch, on the number of devices or on interruptions, with one exception:
`langevin` averages norms over the whole batch, as published, and so couples the images of a batch.

Sources: [S21a] Song et al., ICLR 2021; [SE19] Song & Ermon, NeurIPS 2019; [H20] Ho et al., NeurIPS 2020.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from arrays import Batch, PerExample, ScoreFn, inner, per_example
from ode import as_pytree
from sde_lib import SDE, VESDE, VPSDE

ImageKeys = Key[Array, " batch"]
"""One random key for each image."""

Progress = Callable[[int, int], None]
"""Called between compiled calls with the steps done and the steps in all."""

Update = tuple[Batch, Batch]
"""x after an update, and its mean, i.e. x before noise was added."""

PROGRESS_REPORTS = 20


class Samples(NamedTuple):
    x: Batch
    nfe: int
    """Evaluations of the score function, each on the whole batch."""


def image_keys(key: Key[Array, ""], image_indices: Int[Array, " batch"]) -> ImageKeys:
    """The keys of the images with these numbers. Where the indices are sharded over devices, the samples will be."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, image_indices)


# Predictors: one step of the reverse-time SDE, or with `probability_flow` of the ODE with the same marginals.


def euler_maruyama(
    score_fn: ScoreFn, sde: SDE, x: Batch, t: PerExample, noise: Batch, num_steps: int, probability_flow: bool = False
) -> Update:
    """Euler-Maruyama on dx = [f - g^2 score] dt + g dw, with dt = -t_max / num_steps ([S21a] Eqn. 6)."""
    dt = sde.t_max / num_steps
    g = per_example(sde.diffusion(t), x)
    if probability_flow:
        x_mean = x - sde.probability_flow(score_fn, x, t) * dt
        return x_mean, x_mean
    x_mean = x - (sde.drift(x, t) - g**2 * score_fn(x, t)) * dt
    return x_mean + g * dt**0.5 * noise, x_mean


def reverse_diffusion(
    score_fn: ScoreFn, sde: SDE, x: Batch, t: PerExample, noise: Batch, num_steps: int, probability_flow: bool = False
) -> Update:
    """The forward chain x_{i+1} = x_i + f_i + G_i z, reversed the way the SDE is ([S21a] Eqn. 46)."""
    f, g = sde.discretize(x, t, num_steps)
    g = per_example(g, x)
    if probability_flow:
        x_mean = x - f + 0.5 * g**2 * score_fn(x, t)
        return x_mean, x_mean
    x_mean = x - f + g**2 * score_fn(x, t)
    return x_mean + g * noise, x_mean


def ancestral_sampling(
    score_fn: ScoreFn, sde: SDE, x: Batch, t: PerExample, noise: Batch, num_steps: int, probability_flow: bool = False
) -> Update:
    """Ancestral sampling of the discrete chain, which VE and VP have.

    Raises:
        ValueError: for the other SDEs, and for `probability_flow`, which it has no form of.
    """
    check_ancestral(sde, probability_flow)
    return _ANCESTRAL[type(sde)](sde, x, score_fn(x, t), t, noise, num_steps)


def _ancestral_ddpm(sde: VPSDE, x: Batch, score: Batch, t: PerExample, noise: Batch, num_steps: int) -> Update:
    """x_{i-1} = (x_i + beta_i score) / sqrt(1 - beta_i) + sqrt(beta_i) z ([S21a] Eqn. 4, [H20] Alg. 2)."""
    beta = per_example(sde.chain_beta(t, num_steps), x)
    x_mean = (x + beta * score) / jnp.sqrt(1 - beta)
    return x_mean + jnp.sqrt(beta) * noise, x_mean


def _ancestral_smld(sde: VESDE, x: Batch, score: Batch, t: PerExample, noise: Batch, num_steps: int) -> Update:
    """x_{i-1} = x_i + G^2 score + G sigma_{i-1} / sigma_i z, G^2 = sigma_i^2 - sigma_{i-1}^2 ([S21a] Eqn. 47)."""
    sigma, below = (per_example(s, x) for s in sde.chain_sigmas(t, num_steps))
    g = per_example(sde.discretize(x, t, num_steps)[1], x)
    x_mean = x + g**2 * score
    return x_mean + g * below / sigma * noise, x_mean


_ANCESTRAL: dict[type[SDE], Callable[..., Update]] = {VPSDE: _ancestral_ddpm, VESDE: _ancestral_smld}


def check_ancestral(sde: SDE, probability_flow: bool) -> None:
    """Raises ValueError where ancestral sampling is not defined."""
    if type(sde) not in _ANCESTRAL:
        raise ValueError(f"sampling.predictor ancestral_sampling needs training.sde vesde or vpsde, got {sde}")
    if probability_flow:
        raise ValueError("sampling.predictor ancestral_sampling has no probability_flow; reverse_diffusion has")


# Correctors: one step of Langevin dynamics at constant t, x + step score + sqrt(2 step) noise.


def langevin(
    score_fn: ScoreFn, sde: SDE, x: Batch, t: PerExample, noise: Batch, num_steps: int, snr: float | Array
) -> Update:
    """step = 2 a (snr |noise| / |score|)^2, a = `sde.step_alpha` ([S21a] Alg. 4 and 5).

    The two norms are means over the whole batch, on all devices, as published. So the images of a batch are coupled,
    and samples depend on the size of the batch.
    """
    score = score_fn(x, t)
    ratio = _mean_norm(noise) / _mean_norm(score)
    return _langevin_step(x, score, noise, 2 * sde.step_alpha(t, num_steps) * (snr * ratio) ** 2)


def annealed_langevin(
    score_fn: ScoreFn, sde: SDE, x: Batch, t: PerExample, noise: Batch, num_steps: int, snr: float | Array
) -> Update:
    """step = 2 a (snr sigma_t)^2, a = `sde.step_alpha` ([SE19] Alg. 1, scaled as in [S21a])."""
    step = 2 * sde.step_alpha(t, num_steps) * (snr * sde.alpha_sigma(t)[1]) ** 2
    return _langevin_step(x, score_fn(x, t), noise, step)


def _mean_norm(x: Batch) -> Array:
    return jnp.mean(jnp.sqrt(inner(x, x)))


def _langevin_step(x: Batch, score: Batch, noise: Batch, step: PerExample) -> Update:
    step = per_example(step, x)
    x_mean = x + step * score
    return x_mean + jnp.sqrt(2 * step) * noise, x_mean


PREDICTORS = {
    "euler_maruyama": euler_maruyama,
    "reverse_diffusion": reverse_diffusion,
    "ancestral_sampling": ancestral_sampling,
    "none": None,
}
CORRECTORS = {"langevin": langevin, "ald": annealed_langevin, "none": None}


def pc_sample(
    score_fn: ScoreFn,
    sde: SDE,
    keys: ImageKeys,
    image_shape: tuple[int, ...],
    *,
    predictor: str = "reverse_diffusion",
    corrector: str = "langevin",
    num_steps: int = 1000,
    corrector_steps: int = 1,
    snr: float = 0.16,
    probability_flow: bool = False,
    noise_removal: bool = True,
    smallest_time: float = 1e-5,
    progress: Progress | None = None,
) -> Samples:
    """Predictor-corrector sampling ([S21a] Alg. 1): at each of `num_steps` times the corrector, then the predictor.

    With `noise_removal` the result is the mean of the last update, without its noise. (The published code returns the
    noise after all where the predictor is none.) One program is compiled and runs all steps, or, with `progress`, one
    in PROGRESS_REPORTS of them at a time.

    Args:
        keys: from `image_keys`; as many images are drawn.
        image_shape: of one image.
        predictor, corrector: names in PREDICTORS and CORRECTORS.

    Raises:
        ValueError: for an unknown name, none twice, a predictor the SDE does not have, or a number out of range.
    """
    _check_choice("sampling.predictor", predictor, PREDICTORS)
    _check_choice("sampling.corrector", corrector, CORRECTORS)
    _check_pc(sde, predictor, corrector, num_steps, corrector_steps, snr, probability_flow, smallest_time)
    run = functools.partial(
        _pc_steps,
        as_pytree(score_fn),
        keys,
        (snr, smallest_time),
        sde=sde,
        predictor=predictor,
        corrector=corrector,
        num_steps=num_steps,
        corrector_steps=corrector_steps,
        probability_flow=probability_flow,
    )
    x = prior_samples(sde, keys, image_shape)
    x, x_mean = _in_chunks(run, (x, x), num_steps, progress)
    nfe = num_steps * ((predictor != "none") + corrector_steps * (corrector != "none"))
    return Samples(x_mean if noise_removal else x, nfe)


@functools.partial(
    jax.jit,
    static_argnames=("sde", "predictor", "corrector", "num_steps", "corrector_steps", "probability_flow"),
)
def _pc_steps(
    score_fn: ScoreFn,
    keys: ImageKeys,
    snr_and_smallest_time: tuple[float, float],
    state: Update,
    first: int,
    last: int,
    *,
    sde: SDE,
    predictor: str,
    corrector: str,
    num_steps: int,
    corrector_steps: int,
    probability_flow: bool,
) -> Update:
    """Steps first, ..., last - 1. The bounds are traced, so any part of the steps runs in the same program."""
    snr, smallest_time = snr_and_smallest_time
    predict, correct = PREDICTORS[predictor], CORRECTORS[corrector]

    def step(i: Array, state: Update) -> Update:
        x = state[0]
        t = jnp.full(x.shape[0], jnp.linspace(sde.t_max, smallest_time, num_steps, dtype=x.dtype)[i])

        def correct_once(j: Array, state: Update) -> Update:
            assert correct is not None
            return correct(score_fn, sde, state[0], t, _noise(keys, x.shape[1:], i, j + 1), num_steps, snr)

        if correct is not None:
            state = jax.lax.fori_loop(0, corrector_steps, correct_once, state)
        if predict is not None:
            noise = _noise(keys, x.shape[1:], i, 0)
            state = predict(score_fn, sde, state[0], t, noise, num_steps, probability_flow)
        return state

    return jax.lax.fori_loop(first, last, step, state)


def _check_pc(
    sde: SDE,
    predictor: str,
    corrector: str,
    num_steps: int,
    corrector_steps: int,
    snr: float,
    probability_flow: bool,
    smallest_time: float,
) -> None:
    if predictor == corrector == "none":
        raise ValueError("sampling.predictor and sampling.corrector are both none: nothing would happen")
    if predictor == "ancestral_sampling":
        check_ancestral(sde, probability_flow)
    if num_steps < 1:
        raise ValueError(f"sampling.num_steps must be at least 1, got {num_steps}")
    if corrector != "none" and corrector_steps < 1:
        raise ValueError(f"sampling.n_steps_each must be at least 1, got {corrector_steps}")
    if corrector != "none" and not snr > 0:
        raise ValueError(f"sampling.snr must be positive, got {snr}")
    if not 0 < smallest_time < sde.t_max:
        raise ValueError(f"sampling.smallest_time must lie between 0 and {sde.t_max}, got {smallest_time}")


def _check_choice(field: str, value: str, allowed: dict) -> None:
    if value not in allowed:
        raise ValueError(f"{field} must be one of {', '.join(allowed)}, got {value!r}")


@functools.partial(jax.jit, static_argnames=("sde", "image_shape"))
def prior_samples(sde: SDE, keys: ImageKeys, image_shape: tuple[int, ...]) -> Batch:
    """x at t_max, from the prior."""
    # draw 0 is the prior's, step i has draw i + 1: see _noise
    return jax.vmap(lambda key: sde.prior_sample(jax.random.fold_in(key, 0), image_shape))(keys)


def _noise(keys: ImageKeys, image_shape: tuple[int, ...], step: Array, draw: Array | int) -> Batch:
    """Standard normal noise for each image."""

    def of_image(key: Key[Array, ""]) -> Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, step + 1), draw), image_shape)

    return jax.vmap(of_image)(keys)


def _in_chunks(run: Callable, state: Update, num_steps: int, progress: Progress | None) -> Update:
    """`run(state, first, last)` over all steps, in several calls where somebody wants to see them pass."""
    if progress is None:
        return run(state, 0, num_steps)
    chunk = -(-num_steps // PROGRESS_REPORTS)
    for first in range(0, num_steps, chunk):
        last = min(first + chunk, num_steps)
        state = jax.block_until_ready(run(state, first, last))
        progress(last, num_steps)
    return state
