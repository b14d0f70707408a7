"""Samplers for 10 to 50 network evaluations.

They work on y = x_t / alpha, whose noise level rho = sigma / alpha describes every SDE of sde_lib. With the denoiser
D(y, rho) = E[x_0 | x_t], the probability-flow ODE is dy / d rho = (y - D) / rho for every SDE. (For VE, y = x.)
The samplers take ln rho at the points of a decreasing grid. At the last level they either stop, or take a step to
rho = 0. That step is y = D, denoising, for all first-order methods.

If the range of the data is an interval for each pixel, E[x_0 | x_t] lies in it. Given the range, the samplers project D
onto it. The projection brings every estimate nearer to the truth, and much nearer at large rho, where an error of the
score is multiplied by rho^2 in D ([LZ22] Sec. 4.1, called thresholding there).

Sources: [K22] Karras et al., NeurIPS 2022; [LZ22] Lu et al., "DPM-Solver++", 2022.
"""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from arrays import Batch, ReportProgress, ScoreFn, in_parts
from configs.default import Config
from samplers.sampler import (
    DataRange,
    ImageKeys,
    Sampler,
    Samples,
    StepNoise,
    check_at_least,
    check_choice,
    check_positive,
    common_fields,
    denoise,
    first_noise,
)
from sde_lib import SDE

SCHEDULES = ("log_snr", "power", "time")

LogNoiseLevels = Float[np.ndarray, " levels"]
"""ln rho on a grid, decreasing."""


def noise_levels(sde: SDE, smallest_time: float, num_levels: int, schedule: str, exponent: float) -> LogNoiseLevels:
    """Returns `num_levels` values of ln rho from t_max down to `smallest_time`, in float64.

    Args:
        schedule: "log_snr", uniform in ln rho; "power", uniform in rho^(1 / exponent) ([K22] Eqn. 5, with exponent 7);
            "time", uniform in t.
    """
    first, last = np.asarray(sde.log_noise_level(jnp.asarray([sde.t_max, smallest_time])), np.float64)
    if schedule == "log_snr":
        return np.linspace(first, last, num_levels)
    if schedule == "power":
        # The logarithm of the mean of two powers. Relative to the first, they cannot overflow for small exponents.
        fractions = np.linspace(0, 1, num_levels)[:-1]
        before_last = first + exponent * np.log1p(fractions * np.expm1((last - first) / exponent))
        return np.append(before_last, last)
    if schedule == "time":
        times = np.linspace(sde.t_max, smallest_time, num_levels)
        return np.asarray(sde.log_noise_level(jnp.asarray(times)), np.float64)
    raise ValueError(f"unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}")


def heun(
    score_fn: ScoreFn,
    sde: SDE,
    x: Batch,
    log_rhos: Float[Array, " levels"],
    to_zero: bool,
    data_range: DataRange = None,
    progress: ReportProgress | None = None,
) -> Batch:
    """Heun's second-order method in rho ([K22] Alg. 1), from x at the first level to the last or to zero.

    Evaluations: 2 (levels - 1), and one more for the step to zero.
    """

    def advance(y: Batch, first: int, last: int) -> Batch:
        return _heun_steps(score_fn, sde, y, log_rhos, data_range, first, last)

    y = in_parts(advance, _scale_down(sde, x, log_rhos[0]), log_rhos.shape[0] - 1, progress)
    if to_zero:
        return _denoise_scaled(score_fn, sde, data_range, y, log_rhos[-1])
    return _scale_up(sde, y, log_rhos[-1])


@functools.partial(jax.jit, static_argnames=("sde", "data_range"))
def _heun_steps(
    score_fn: ScoreFn,
    sde: SDE,
    y: Batch,
    log_rhos: Float[Array, " levels"],
    data_range: DataRange,
    first: Int[Array, ""] | int,
    last: Int[Array, ""] | int,
) -> Batch:
    """Steps first, ..., last - 1. The bounds are traced, so one program can run any part of the steps."""
    rhos = jnp.exp(log_rhos)

    def slope(y: Batch, i: Array) -> Batch:
        return (y - _denoise_scaled(score_fn, sde, data_range, y, log_rhos[i])) / rhos[i]

    def step(i: Array, y: Batch) -> Batch:
        d_rho = rhos[i + 1] - rhos[i]
        here = slope(y, i)
        there = slope(y + d_rho * here, i + 1)
        return y + 0.5 * d_rho * (here + there)

    return jax.lax.fori_loop(first, last, step, y)


def dpm_solver(
    score_fn: ScoreFn,
    sde: SDE,
    x: Batch,
    log_rhos: LogNoiseLevels,
    order: int,
    to_zero: bool,
    eta: float = 0.0,
    noise: StepNoise | None = None,
    data_range: DataRange = None,
    progress: ReportProgress | None = None,
) -> Batch:
    """DPM-Solver++ multistep of the given order ([LZ22]), from x at the first level to the last or to zero.

    The SDEs that share the data's marginals at every noise level are, with lambda = -ln rho and c = 1 + eta^2,
        dy = c (D - y) d lambda + sqrt(2) eta rho dw:
    eta = 0 is the probability-flow ODE, eta = 1 the reverse-time SDE. All are linear except for D, so over one step h
        y(lambda + h) = exp(-c h) y(lambda) + integral over s in [0, h] of c exp(c (s - h)) D(lambda + s) + n,
    n normal with variance rho(lambda + h)^2 (1 - exp(-2 eta^2 h)). D is replaced by the polynomial through its last
    `order` values, and the integral is then exact. For c = 1 and the nodes s_0 = 0 > s_1 > s_2 it is sum_j w_j D_j,
    the weights following from the moments that a polynomial has to meet,
        sum_j w_j s_j^k = m_k,   m_0 = 1 - exp(-h),   m_k = h^k - k m_{k-1}   (by parts),
    and c only rescales lambda. [LZ22]'s 2M takes (1 - exp(-h)) h / 2 for m_1; the two agree to the order of the method.
    The step to zero is the limit h = infinity of the first-order step: y' = D.

    With the ODE, an error of the network at large rho stays in y. The noise of eta > 0 makes y forget it.

    Evaluations: levels - 1, and one more for the step to zero.

    Raises:
        ValueError: if eta is not 0 and `noise` is missing.
    """
    if eta and noise is None:
        raise ValueError(f"eta is {eta}, but noise is None; pass the noise that eta > 0 needs")
    coefficients = multistep_coefficients(log_rhos, order, to_zero, eta)
    noise, levels = noise if eta else None, jnp.asarray(log_rhos, x.dtype)

    def advance(state: _MultistepState, first: int, last: int) -> _MultistepState:
        return _multistep(score_fn, sde, state, levels, coefficients, noise, data_range, first, last)

    y = _scale_down(sde, x, levels[0])
    state = y, (jnp.zeros_like(y),) * (order - 1)
    y, _ = in_parts(advance, state, len(coefficients.decay), progress)
    return y if to_zero else _scale_up(sde, y, levels[-1])


class Multistep(NamedTuple):
    """Coefficients of each step y' = decay y + sum_j weights[j] D_j + noise z. The newest D_j comes first."""

    decay: Float[np.ndarray, " steps"]
    weights: Float[np.ndarray, "steps order"]
    noise: Float[np.ndarray, " steps"]


def multistep_coefficients(log_rhos: LogNoiseLevels, order: int, to_zero: bool, eta: float = 0.0) -> Multistep:
    """Computes the coefficients of `dpm_solver`.

    The first steps have fewer past values and lower order. D hardly changes there, so the order of the whole method
    stays the same. The step to zero has order one, because a polynomial in lambda cannot be extrapolated to infinity.
    A step that is much longer than those before it has a lower order, too, because polynomials diverge: the sizes of
    the weights of order q must not add up to more than 2^q - 1, their largest sum if the last q steps have the same
    length. With the schedule "time", the sums of orders 2 and 3 would reach 13 and 160, and the samples would be worse
    than with order 1.
    """
    lambdas, c = -log_rhos, 1 + eta**2
    steps = len(lambdas) - 1
    decay, weights, noise = np.zeros(steps + to_zero), np.zeros((steps + to_zero, order)), np.zeros(steps + to_zero)
    for i in range(steps):
        h = lambdas[i + 1] - lambdas[i]
        decay[i] = np.exp(-c * h)
        nodes = c * (lambdas[max(i + 1 - order, 0) : i + 1][::-1] - lambdas[i])
        of_orders = (_adams_weights(c * h, nodes[:q]) for q in range(len(nodes), 0, -1))
        step = next(w for w in of_orders if np.abs(w).sum() <= 2 ** len(w) - 1 + 1e-9)  # always true for order 1
        weights[i, : len(step)] = step
        noise[i] = np.exp(-lambdas[i + 1]) * np.sqrt(-np.expm1(-2 * eta**2 * h))
    if to_zero:
        weights[-1, 0] = 1.0
    return Multistep(decay, weights, noise)


def _adams_weights(h: float, nodes: Float[np.ndarray, " q"]) -> Float[np.ndarray, " q"]:
    """w with sum_j w_j p(nodes_j) = the integral over s in [0, h] of exp(s - h) p(s), for polynomials of degree < q."""
    moments = [-np.expm1(-h)]
    for k in range(1, len(nodes)):
        moments.append(h**k - k * moments[-1])
    # In units of h, the linear system is better conditioned.
    powers = np.arange(len(nodes))
    return np.linalg.solve((nodes[None, :] / h) ** powers[:, None], np.array(moments) / h**powers)


_MultistepState = tuple[Batch, tuple[Batch, ...]]
"""y, and the earlier values of D, newest first."""


@functools.partial(jax.jit, static_argnames=("sde", "data_range"))
def _multistep(
    score_fn: ScoreFn,
    sde: SDE,
    state: _MultistepState,
    log_rhos: Float[Array, " levels"],
    coefficients: Multistep,
    noise: StepNoise | None,
    data_range: DataRange,
    first: Int[Array, ""] | int,
    last: Int[Array, ""] | int,
) -> _MultistepState:
    """Steps first, ..., last - 1. The bounds are traced, so one program can run any part of the steps."""
    decay, weights, noise_scale = (jnp.asarray(c, state[0].dtype) for c in coefficients)
    order = weights.shape[1]

    def step(i: Array, state: _MultistepState) -> _MultistepState:
        y, older = state
        values = (_denoise_scaled(score_fn, sde, data_range, y, log_rhos[i]), *older)
        y = decay[i] * y + sum(weights[i, j] * values[j] for j in range(order))
        if noise is not None:
            y = y + noise_scale[i] * noise(y.shape[1:], i)
        return y, values[: order - 1]

    return jax.lax.fori_loop(first, last, step, state)


def _alpha(sde: SDE, log_rho: Array) -> Array:
    return sde.alpha_sigma(sde.time_of_log_noise_level(log_rho))[0]


@functools.partial(jax.jit, static_argnames="sde")
def _scale_down(sde: SDE, x: Batch, log_rho: Array) -> Batch:
    return x / _alpha(sde, log_rho)


@functools.partial(jax.jit, static_argnames="sde")
def _scale_up(sde: SDE, y: Batch, log_rho: Array) -> Batch:
    return y * _alpha(sde, log_rho)


@functools.partial(jax.jit, static_argnames=("sde", "data_range"))
def _denoise_scaled(score_fn: ScoreFn, sde: SDE, data_range: DataRange, y: Batch, log_rho: Array) -> Batch:
    """Returns D(y, rho), clipped to the range of the data."""
    t = jnp.full(y.shape[0], sde.time_of_log_noise_level(log_rho))
    denoised = denoise(score_fn, sde, _scale_up(sde, y, log_rho), t)
    return denoised if data_range is None else jnp.clip(denoised, *data_range)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastSampler(Sampler):
    """The base class of the samplers in this file, with a budget of evaluations and a grid of noise levels.

    Attributes:
        schedule: of the grid, see `noise_levels`. "auto" is the choice of the source: "log_snr" for DPM-Solver++ and
            "power" for Heun.
        data_range: the range of pixel values, to which denoised images are clipped. None: no clipping.
    """

    best_schedule: ClassVar[str]

    max_nfe: int = 20
    schedule: str = "auto"
    schedule_exponent: float = 7.0
    data_range: DataRange = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("sampling.max_nfe", self.max_nfe, 3)
        check_choice("sampling.schedule", self.schedule, ("auto", *SCHEDULES))
        check_positive("sampling.schedule_exponent", self.schedule_exponent)

    def levels(self, num_levels: int) -> LogNoiseLevels:
        """Returns ln rho of the levels of the grid, from t_max to `smallest_time`."""
        schedule = self.best_schedule if self.schedule == "auto" else self.schedule
        return noise_levels(self.sde, self.smallest_time, num_levels, schedule, self.schedule_exponent)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeunSampler(FastSampler):
    """Heun's method, see `heun`."""

    best_schedule = "power"

    @property
    def follows_ode(self) -> bool:
        return True

    def solve(self, score_fn: ScoreFn, x: Batch, keys: ImageKeys, progress: ReportProgress | None = None) -> Samples:
        num_steps = (self.max_nfe - self.noise_removal) // 2
        log_rhos = jnp.asarray(self.levels(num_steps + 1), x.dtype)
        x = heun(score_fn, self.sde, x, log_rhos, self.noise_removal, self.data_range, progress)
        return Samples(x, 2 * num_steps + self.noise_removal)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolverSampler(FastSampler):
    """DPM-Solver++, see `dpm_solver`.

    Attributes:
        eta: 0 follows the probability-flow ODE, 1 the reverse-time SDE.
    """

    best_schedule = "log_snr"

    order: int = 2
    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("sampling.order", self.order, (1, 2, 3))
        if not self.eta >= 0:
            raise ValueError(f"sampling.eta must not be negative, got {self.eta}")

    @property
    def follows_ode(self) -> bool:
        return self.eta == 0

    def solve(self, score_fn: ScoreFn, x: Batch, keys: ImageKeys, progress: ReportProgress | None = None) -> Samples:
        log_rhos = self.levels(self.max_nfe + 1 - self.noise_removal)
        noise = jax.tree_util.Partial(first_noise, keys)
        order, to_zero = self.order, self.noise_removal
        settings = {"eta": self.eta, "noise": noise, "data_range": self.data_range, "progress": progress}
        x = dpm_solver(score_fn, self.sde, x, log_rhos, order, to_zero, **settings)
        return Samples(x, self.max_nfe)


def fast_fields(config: Config, sde: SDE, data_range: DataRange, best_schedule: str) -> dict[str, Any]:
    """The fields of every `FastSampler`. Reads only the fields of `sampling` that have an effect."""
    sampling = config.sampling
    fields = common_fields(config, sde) | {"max_nfe": sampling.max_nfe, "schedule": sampling.schedule}
    if "power" in (fields["schedule"], best_schedule if fields["schedule"] == "auto" else ""):
        fields["schedule_exponent"] = sampling.schedule_exponent
    if data_range is not None and sampling.clip_denoised:
        fields["data_range"] = data_range
    return fields


def dpm_solver_from_config(config: Config, sde: SDE, data_range: DataRange) -> Sampler:
    """Builds DPM-Solver++ with the fields of `sampling`."""
    fields = fast_fields(config, sde, data_range, DPMSolverSampler.best_schedule)
    return DPMSolverSampler(order=config.sampling.order, eta=config.sampling.eta, **fields)


def heun_from_config(config: Config, sde: SDE, data_range: DataRange) -> Sampler:
    """Builds Heun's method with the fields of `sampling`."""
    return HeunSampler(**fast_fields(config, sde, data_range, HeunSampler.best_schedule))
