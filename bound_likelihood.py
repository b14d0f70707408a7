"""Upper bounds on -ln p(x) of the SDE model, which runs the reverse SDE with the score network from the prior.

-ln p(x) <= -E ln prior(x_T) + integral over [t_min, T] of E[r_t] dt, with the expectation over x_t given x.
r_t has two forms of equal expectation ([S21b] Theorems 3 and 6):

- "dsm": g^2 / 2 (|score + z / sigma|^2 - |z / sigma|^2) - div f, with the noise z of x_t = alpha x + sigma z;
- "sm": g^2 (div score + |score|^2 / 2) - div f, div score by one Rademacher probe.

The right-hand side bounds E[-ln p of x_{t_min}] given x. Adding the start-time correction
E[ln p(x_{t_min} | x) - ln p(x | x_{t_min})], with one denoising step for p(x | x_{t_min}), makes it a bound for x
itself.

Both forms are integrals over ln rho, rho = sigma / alpha, since g^2 dt = 2 sigma^2 d ln rho; importance sampling draws
ln rho uniformly. Everything known in closed form is computed instead of sampled: div f, the expectation of the prior
and, as a control variate, the contribution of a Gaussian N(m, c^2 I) of the data, the reference. With its score, u = z
+ sigma score has E|u|^2 = d w^2 + |x - m|^2 rho^2 / (c^2 + rho^2)^2, w = c^2 / (c^2 + rho^2). The integral of E|u|^2 -
d over ln rho is

    sum_i [ w_i - ln(c_i^2 + rho^2) - (x_i - m_i)^2 / (c_i^2 + rho^2) ] / 2   from one end to the other.

Without a reference, c is infinite, the score of the Gaussian is 0, and the estimator is the published one. The data
have a mean and standard deviation in each dimension; deviations below `SMALLEST_STD` are raised.

Sources: [S21b] Song et al., "Maximum Likelihood Training of Score-Based Diffusion Models", NeurIPS 2021.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from arrays import Batch, Factor, PerExample, ReportProgress, ScoreFn, append_dims, as_pytree, in_parts, inner, num_dims
from coordinates import GaussianReference
from derivatives import probe_divergence
from sde_lib import SDE

FORMS = ("dsm", "sm")

SMALLEST_STD = 0.25
"""The smallest standard deviation of the control variate, relative to the root mean square over all dimensions.

Some pixels are nearly constant in the training images. For an image with another value there, the Gaussian would be so
wrong that subtracting its contribution would add more noise than it removes.
"""

Keys = Key[Array, " batch"]


class Bound(NamedTuple):
    """An upper bound on -ln p(x) of each example in nats, in its parts."""

    prior: PerExample
    """-E ln prior(x_T), in closed form."""
    integral: PerExample
    """The integral of E[r_t] over [t_min, T]."""
    start: PerExample
    """The start-time correction; 0 without it."""
    error: PerExample
    """Standard error of `total` due to the sampled times, noise and probes."""
    nfe: int
    """Evaluations of the score. One with its derivative along a probe counts as one."""

    @property
    def total(self) -> PerExample:
        """The bound on -ln p(x), in nats."""
        return self.prior + self.integral + self.start

    @property
    def terms(self) -> dict[str, PerExample]:
        """The terms of the bound, in nats."""
        return {"prior": self.prior, "integral": self.integral, "start_correction": self.start}


def likelihood_bound(
    score_fn: ScoreFn,
    sde: SDE,
    x: Batch,
    keys: Keys,
    *,
    t_min: float,
    form: str = "dsm",
    importance_sampling: bool = True,
    num_times: int = 1000,
    num_starts: int = 0,
    reference: GaussianReference | None = None,
    progress: ReportProgress | None = None,
) -> Bound:
    """Estimates an upper bound on -ln p(x) of each example, in nats, for every SDE ([S21b] Theorems 3 and 6).

    Args:
        keys: one for each example, so that its random numbers do not depend on its batch.
        form: "dsm" or "sm".
        importance_sampling: draws t in proportion to g^2 / sigma^2; otherwise uniformly.
        num_times: values of t for each example (published: 1000), one in each of `num_times` equal strata. The standard
            error is computed as for independent times, so it is an upper limit.
        num_starts: draws of x_{t_min} for the start-time correction. 0: no correction, for a bound on the likelihood of
            x_{t_min}.
        reference: the Gaussian of the data, for the control variate. None: no control variate, as published.
        progress: called between parts of the draws. It cannot be used under jit.

    Raises:
        ValueError: unknown form, or fewer than 2 times.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form of the bound {form!r}; known: {', '.join(FORMS)}")
    if num_times < 2 or num_starts < 0:
        raise ValueError(f"need num_times >= 2 and num_starts >= 0, got {num_times} and {num_starts}")
    score_fn, reference = as_pytree(score_fn), _control_variate(reference)
    time_keys, start_keys = (jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, n) for n in range(2))
    with jax.default_matmul_precision("highest"):
        times = _StratifiedTimes(t_min, num_times, importance_sampling)
        draw = _IntegralDraw(score_fn, x, time_keys, reference, sde, times, form)
        integral, error = _mean_and_error(draw, num_times, progress)
        integral += _reference_integral(sde, x, t_min, reference) - _drift_integral(sde, x, t_min)
        start = jnp.zeros_like(integral)
        if num_starts:
            draw = _StartDraw(score_fn, x, start_keys, reference, sde, t_min)
            start, start_error = _mean_and_error(draw, num_starts, progress)
            error = jnp.hypot(error, start_error)
    return Bound(-expected_prior_logp(sde, x), integral, start, error, num_times + num_starts)


def bound_draw(
    score_fn: ScoreFn,
    sde: SDE,
    x: Batch,
    quantile: PerExample,
    z: Batch,
    start_z: Batch | None,
    t_min: float,
    reference: GaussianReference | None = None,
) -> PerExample:
    """Computes one draw of the bound in its "dsm" form, in nats, for training. `likelihood_bound` averages such draws.

    Args:
        quantile: uniform in [0, 1), one for the importance-sampled time of each example.
        z: standard normal noise for the integral.
        start_z: standard normal noise for the start-time correction. None: no correction.
    """
    reference = _control_variate(reference)
    t, weight = _StratifiedTimes(t_min, 1, importance_sampling=True).at(sde, jnp.asarray(0), quantile)
    integral = weight * dsm_integrand(score_fn, sde, x, t, z, reference) + _reference_integral(sde, x, t_min, reference)
    total = integral - _drift_integral(sde, x, t_min) - expected_prior_logp(sde, x)
    return total if start_z is None else total + start_correction(score_fn, sde, x, start_z, t_min, reference)


def expected_prior_logp(sde: SDE, x: Batch) -> PerExample:
    """E ln prior(x_T) over x_T given x, in nats."""
    alpha, sigma = sde.alpha_sigma(jnp.asarray(sde.t_max, x.dtype))
    return sde.prior_logp(alpha * x) - 0.5 * num_dims(x) * (sigma / sde.prior_sigma) ** 2


def dsm_integrand(
    score_fn: ScoreFn, sde: SDE, x: Batch, t: PerExample, z: Batch, reference: GaussianReference | None = None
) -> PerExample:
    """|u|^2 - |z|^2, u = z + sigma score, at x_t = alpha x + sigma z: r_t dt / d ln rho, without div f.

    With a reference, |z|^2 is replaced by the |u|^2 of its score.
    """
    xt, sigma = _perturb(sde, x, t, z)
    scaled, known = sigma * score_fn(xt, t), _reference_score(sde, xt, t, reference)
    return inner(scaled - known, scaled + known + 2 * z)


def sm_integrand(
    score_fn: ScoreFn,
    sde: SDE,
    x: Batch,
    t: PerExample,
    z: Batch,
    probe: Batch,
    reference: GaussianReference | None = None,
) -> PerExample:
    """2 sigma^2 div score + |sigma score|^2, with the same expectation and reference as `dsm_integrand`."""
    xt, sigma = _perturb(sde, x, t, z)

    def excess(xt: Batch) -> Batch:
        return sigma * score_fn(xt, t) - _reference_score(sde, xt, t, reference)

    value, divergence = probe_divergence(excess, xt, probe)
    known = _reference_score(sde, xt, t, reference)
    return 2 * jnp.ravel(sigma) * divergence + inner(value, value + 2 * known)


def start_correction(
    score_fn: ScoreFn, sde: SDE, x: Batch, z: Batch, t_min: float, reference: GaussianReference | None = None
) -> PerExample:
    """One draw of ln p(x_{t_min} | x) - ln p(x | x_{t_min}), in nats ([S21b] Sec. 4, App. on the start time).

    p(x | x_{t_min}) is one step of denoising, N((x_{t_min} + sigma^2 score) / alpha, (sigma / alpha)^2 I). With a
    reference, the contribution of the reference to the difference is replaced by its expectation.
    """
    t = jnp.full(x.shape[:1], t_min, x.dtype)
    alpha, sigma = sde.alpha_sigma(t)
    sampled = dsm_integrand(score_fn, sde, x, t, z, reference)
    return -num_dims(x) * jnp.log(alpha) + 0.5 * (sampled + _reference_excess(sigma / alpha, x, reference))


def _perturb(sde: SDE, x: Batch, t: PerExample, z: Batch) -> tuple[Batch, Factor]:
    """Returns x_t, and sigma shaped to multiply a batch."""
    mean, sigma = sde.marginal(x, t)
    sigma = append_dims(sigma, x)
    return mean + sigma * z, sigma


def _control_variate(reference: GaussianReference | None) -> GaussianReference | None:
    """Raises standard deviations below `SMALLEST_STD`."""
    if reference is None:
        return None
    std = jnp.asarray(reference.std)
    return reference._replace(std=jnp.maximum(std, SMALLEST_STD * jnp.sqrt(jnp.mean(jnp.square(std)))))


def _reference_score(sde: SDE, xt: Batch, t: PerExample, reference: GaussianReference | None) -> Batch:
    """sigma times the score of the reference."""
    if reference is None:
        return jnp.zeros_like(xt)
    mean, std = reference.of_batch(xt)
    alpha, sigma = (append_dims(a, xt) for a in sde.alpha_sigma(t))
    return -sigma * (xt - alpha * mean) / (jnp.square(alpha * std) + sigma**2)


def _reference_excess(rho: PerExample, x: Batch, reference: GaussianReference | None) -> PerExample:
    """E|u|^2 - d for the score of the reference at noise level rho."""
    if reference is None:
        return jnp.zeros(x.shape[0], x.dtype)
    mean, std = reference.of_batch(x)
    noise, spread = append_dims(rho, x) ** 2, std**2
    excess = noise * (jnp.square(x - mean) - 2 * spread - noise) / (spread + noise) ** 2
    return jnp.sum(excess, axis=range(1, x.ndim))


def _reference_integral(sde: SDE, x: Batch, t_min: float, reference: GaussianReference | None) -> PerExample:
    """The integral of `_reference_excess` over ln rho: see the module's docstring."""
    if reference is None:
        return jnp.zeros(x.shape[0], x.dtype)
    mean, std = reference.of_batch(x)

    def antiderivative(t: float) -> Batch:
        total = std**2 + jnp.exp(2 * sde.log_noise_level(jnp.asarray(t, x.dtype)))
        return 0.5 * ((std**2 - jnp.square(x - mean)) / total - jnp.log(total))

    return jnp.sum(antiderivative(sde.t_max) - antiderivative(t_min), axis=range(1, x.ndim))


def _drift_integral(sde: SDE, x: Batch, t_min: float) -> Float[Array, ""]:
    """The integral of div f over [t_min, T]."""
    first, last = (sde.alpha_sigma(jnp.asarray(t, x.dtype))[0] for t in (t_min, sde.t_max))
    return num_dims(x) * jnp.log(last / first)


Draw = Callable[[Int[Array, ""]], PerExample]
"""draw(number): the draw with this number, one value for each example. A pytree."""


def _mean_and_error(draw: Draw, num: int, progress: ReportProgress | None) -> tuple[PerExample, PerExample]:
    """Mean and standard error of the draws with numbers 0 to num - 1. The error of a single draw is not a number."""

    def advance(draws: Float[Array, "num batch"], first: int, last: int) -> Float[Array, "num batch"]:
        return _draws(draw, draws, first, last)

    draws = in_parts(advance, _no_draws(draw, num), num, progress)
    return jnp.mean(draws, axis=0), jnp.std(draws, axis=0, ddof=1) / math.sqrt(num)


@partial(jax.jit, static_argnames="num")
def _no_draws(draw: Draw, num: int) -> Float[Array, "num batch"]:
    like = jax.eval_shape(draw, jnp.int32(0))
    return jnp.zeros((num, *like.shape), like.dtype)


@jax.jit
def _draws(
    draw: Draw, draws: Float[Array, "num batch"], first: Int[Array, ""] | int, last: Int[Array, ""] | int
) -> Float[Array, "num batch"]:
    """Fills in the draws first, ..., last - 1. The bounds are traced, so one program can fill in any part."""
    return jax.lax.fori_loop(first, last, lambda number, draws: draws.at[number].set(draw(number)), draws)


def _draw_noise(keys: Keys, number: Int[Array, ""], like: Batch) -> tuple[PerExample, Batch, Batch]:
    """Draws for each example a uniform number, normal noise and a Rademacher probe."""

    def draw_one(key: Array) -> tuple[Array, Array, Array]:
        uniform, normal, sign = jax.random.split(jax.random.fold_in(key, number), 3)
        dims, dtype = like.shape[1:], like.dtype
        return (
            jax.random.uniform(uniform, dtype=dtype),
            jax.random.normal(normal, dims, dtype),
            jax.random.rademacher(sign, dims, dtype),
        )

    return jax.vmap(draw_one)(keys)


SHARED = ("score_fn", "x", "keys", "reference")
"""The arrays of a draw."""


class _StratifiedTimes(NamedTuple):
    """Times in [t_min, T], one in each of `num` strata of equal probability."""

    t_min: float
    num: int
    importance_sampling: bool

    def at(self, sde: SDE, number: Int[Array, ""], uniform: PerExample) -> tuple[PerExample, PerExample]:
        """The time at fraction `uniform` of stratum `number`, and d ln rho / d quantile there."""
        quantile = (number + uniform) / self.num
        if self.importance_sampling:
            total = sde.importance_weight(jnp.asarray(sde.t_max, quantile.dtype), self.t_min)
            return sde.time_of_quantile(quantile * total, self.t_min), jnp.full_like(quantile, 0.5 * total)
        t = self.t_min + (sde.t_max - self.t_min) * quantile
        rate = jnp.square(sde.diffusion(t) / sde.alpha_sigma(t)[1])
        return t, 0.5 * (sde.t_max - self.t_min) * rate


@partial(jax.tree_util.register_dataclass, data_fields=SHARED, meta_fields=("sde", "times", "form"))
@dataclasses.dataclass(frozen=True)
class _IntegralDraw:
    """A draw of the integral of the bound, without the integral of the reference."""

    score_fn: ScoreFn
    x: Batch
    keys: Keys
    reference: GaussianReference | None
    sde: SDE
    times: _StratifiedTimes
    form: str

    def __call__(self, number: Int[Array, ""]) -> PerExample:
        uniform, z, probe = _draw_noise(self.keys, number, self.x)
        t, weight = self.times.at(self.sde, number, uniform)
        if self.form == "dsm":
            return weight * dsm_integrand(self.score_fn, self.sde, self.x, t, z, self.reference)
        return weight * sm_integrand(self.score_fn, self.sde, self.x, t, z, probe, self.reference)


@partial(jax.tree_util.register_dataclass, data_fields=SHARED, meta_fields=("sde", "t_min"))
@dataclasses.dataclass(frozen=True)
class _StartDraw:
    """A draw of the start-time correction."""

    score_fn: ScoreFn
    x: Batch
    keys: Keys
    reference: GaussianReference | None
    sde: SDE
    t_min: float

    def __call__(self, number: Int[Array, ""]) -> PerExample:
        z = _draw_noise(self.keys, number, self.x)[1]
        return start_correction(self.score_fn, self.sde, self.x, z, self.t_min, self.reference)
