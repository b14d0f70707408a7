"""The entropy of data, estimated from a score model alone ([S21b] Theorem 4).

Along a forward SDE the entropy of x_t grows by dH/dt = E[div f] + g^2 / 2 E|grad ln q_t|^2. So the entropy of the data
is

    H(q_min) = H(q_T) - integral over [t_min, T] of (E[div f] + g^2 / 2 E|s|^2) dt,           the form "score",

and, since E|grad ln q|^2 = -E[div grad ln q], the same with -E[div s] for E|s|^2, the form "divergence". With the exact
score, both are exact except for H(q_T). With the score of a model they differ, and neither is a bound.

- H(q_min) is the entropy of x_t at t_min, that is, of the data times alpha plus a little noise.
- H(q_T) is taken to be the entropy of the prior, d / 2 ln(2 pi e prior_sigma^2), as in the theorem. For VE it is too
  low by about half the variance of the data divided by the variance of the prior.

Times are drawn in proportion to g^2 / sigma^2, that is, uniformly in ln rho, rho = sigma / alpha, and stratified. In
ln rho the integrand is (sigma |s|)^2, which stays finite. At large noise it is d, plus sampling noise. Therefore the
contribution of the Gaussian with the mean and variance of the data is subtracted, and added again in closed form.

Sources: [S21b] Song et al., NeurIPS 2021.
"""

import math
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from arrays import Batch, PerExample, ScoreFn, append_dims, as_pytree, inner, num_dims
from derivatives import PROBES, exact_divergence, probe_divergence
from evaluation import MeanEstimate, mean_estimate
from sde_lib import SDE

FORMS = ("score", "divergence")

MeanAndVariance: TypeAlias = tuple[Float[Array, "*dims"], Float[Array, "*dims"]]
"""Mean and variance of each dimension of the data."""


class EntropyNoise(NamedTuple):
    """The randomness of an estimate: for each example a time, its noise, and a probe for the form "divergence"."""

    t: PerExample
    z: Batch
    probe: Batch | None


def draw_entropy_noise(
    key: Array, sde: SDE, shape: tuple[int, ...], *, t_min: float, probe: str = "exact", num_batches: int = 16
) -> EntropyNoise:
    """Draws times, which are stratified within each batch, noise, and probes.

    Args:
        shape: the shape of the array of examples.
        probe: for the form "divergence": "exact", from d derivatives, or a kind of Hutchinson probe, one for each
            example.
        num_batches: as in `entropy`.

    Raises:
        ValueError: unknown probe, t_min outside (0, T), fewer than 2 batches, or a number of examples that is not
            divisible by the number of batches.
    """
    if probe not in (*PROBES, "exact"):
        raise ValueError(f"unknown probe {probe!r}; known: {', '.join((*PROBES, 'exact'))}")
    _check(sde, shape[0], t_min, num_batches)
    time_key, z_key, probe_key = jax.random.split(key, 3)
    keys = jax.random.split(time_key, num_batches)
    times = jax.vmap(lambda key: stratified_times(key, sde, t_min, shape[0] // num_batches))(keys)
    probes = None if probe == "exact" else PROBES[probe](probe_key, shape)
    return EntropyNoise(times.reshape(-1), jax.random.normal(z_key, shape), probes)


def stratified_times(key: Array, sde: SDE, t_min: float, num: int) -> PerExample:
    """Draws increasing times, one in each of `num` parts of [t_min, T] that are equal in ln(sigma / alpha)."""
    fractions = (jnp.arange(num) + jax.random.uniform(key, (num,))) / num
    return sde.time_of_quantile(fractions * sde.importance_weight(jnp.asarray(sde.t_max), t_min), t_min)


def entropy(
    score_fn: ScoreFn,
    sde: SDE,
    x0: Batch,
    noise: EntropyNoise,
    *,
    t_min: float,
    form: str = "score",
    num_batches: int = 16,
) -> MeanEstimate:
    """Estimates the entropy of q_min in nats, from samples of the data. The estimate's `n` is the number of batches.

    Args:
        x0: samples of the data, each used with one time and noise.
        noise: from `draw_entropy_noise`, for the same t_min and number of batches.
        form: one of `FORMS`.
        num_batches: the number of parts of x0; the standard error is computed from their means.

    Raises:
        ValueError: unknown form, t_min outside (0, T), fewer than 2 batches, or a number of examples that is not
            divisible by the number of batches.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r} of the entropy; known: {', '.join(FORMS)}")
    _check(sde, len(x0), t_min, num_batches)
    batches = jax.tree.map(lambda a: a.reshape(num_batches, -1, *a.shape[1:]), (x0, noise))
    moments = jnp.mean(x0, axis=0), jnp.var(x0, axis=0)
    with jax.default_matmul_precision("highest"):
        means = _batch_means(as_pytree(score_fn), *batches, moments, sde=sde, form=form)
    total = float(sde.importance_weight(jnp.asarray(sde.t_max), t_min))
    # g^2 / 2 dt = sigma^2 / 2 dZ
    values = _known_terms(sde, num_dims(x0), t_min) - 0.5 * total * np.asarray(means, np.float64)
    return mean_estimate(values)


def _check(sde: SDE, num_examples: int, t_min: float, num_batches: int) -> None:
    if not 0 < t_min < sde.t_max:
        raise ValueError(f"t_min is {t_min}; it must lie in (0, {sde.t_max})")
    if num_batches < 2 or num_examples % num_batches:
        raise ValueError(f"num_batches is {num_batches}; it must be at least 2 and divide the {num_examples} examples")


def _known_terms(sde: SDE, d: int, t_min: float) -> float:
    """H(q_T) minus the integral of div f = d dln(alpha)/dt, in nats."""
    ends = jnp.asarray([t_min, sde.t_max])
    log_alpha = np.log(np.asarray(sde.alpha_sigma(ends)[0], np.float64))
    prior = 0.5 * math.log(2 * math.pi * math.e * sde.prior_sigma**2)
    return d * (prior - float(log_alpha[1] - log_alpha[0]))


@partial(jax.jit, static_argnames=("sde", "form"))
def _batch_means(
    score_fn: ScoreFn,
    x0: Float[Array, "batches batch *dims"],
    noise: EntropyNoise,
    moments: MeanAndVariance,
    *,
    sde: SDE,
    form: str,
) -> Float[Array, " batches"]:
    """The mean over each batch of sigma^2 |s|^2, or of -sigma^2 div s."""

    def one(batch: tuple[Batch, EntropyNoise]) -> Float[Array, ""]:
        x0, noise = batch
        center, sigma = sde.marginal(x0, noise.t)
        x = center + append_dims(sigma, x0) * noise.z
        if form == "score":
            return jnp.mean(sigma**2 * _square_of_score(score_fn, sde, x, noise.t, moments))
        return -jnp.mean(sigma**2 * _divergence(score_fn, x, noise))

    return jax.lax.map(one, (x0, noise))


def _square_of_score(score_fn: ScoreFn, sde: SDE, x: Batch, t: PerExample, moments: MeanAndVariance) -> PerExample:
    """|s|^2 - |r|^2 + E|r|^2, where r is the score of the Gaussian with the moments of the data."""
    alpha, sigma = (append_dims(a, x) for a in sde.alpha_sigma(t))
    mean, variance = (moment[None] for moment in moments)
    spread = alpha**2 * variance + sigma**2
    gaussian_score = -(x - alpha * mean) / spread
    score = score_fn(x, t)
    return inner(score, score) - inner(gaussian_score, gaussian_score) + inner(1 / spread, jnp.ones_like(x))


def _divergence(score_fn: ScoreFn, x: Batch, noise: EntropyNoise) -> PerExample:
    if noise.probe is None:
        return exact_divergence(lambda x: score_fn(x, noise.t), x)[1]
    return probe_divergence(lambda x: score_fn(x, noise.t), x, noise.probe)[1]
