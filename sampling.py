"""Samplers: from noise at t_max to images at smallest_time, given a score function.

All randomness of image k comes from (key, k) and the number of the step. So an image does not depend on the number of
devices, on interruptions, or on the other images drawn with it. Round r of a run draws images r B, ..., (r + 1) B - 1.
There are two exceptions: the Langevin corrector averages norms over the whole batch, as published, and the adaptive ODE
solver chooses its steps for the whole batch.

Sources: [S21a] Song et al., ICLR 2021; others are given in samplers/few_step.py and samplers/predictor_corrector.py.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

import ode
from arrays import Batch, ReportProgress, ScoreFn, in_parts
from configs.default import Config
from samplers.controllable import ClassifierFreeScore as ClassifierFreeScore  # exported here with the other conditions
from samplers.controllable import GuidedScore as GuidedScore
from samplers.controllable import Observation, observe, observed_prior
from samplers.controllable import basis_of_matrix as basis_of_matrix
from samplers.controllable import colorization_basis as colorization_basis
from samplers.few_step import SCHEDULES, DataRange, LogNoiseLevels, denoise, dpm_solver, heun, noise_levels
from samplers.langevin import annealed_langevin_dynamics
from samplers.predictor_corrector import CORRECTORS, PREDICTORS, Update, check_ancestral
from sde_lib import SDE

ImageKeys = Key[Array, " batch"]
"""One random key for each image."""


class Samples(NamedTuple):
    """Samples, and their cost."""

    x: Batch
    nfe: int
    """Evaluations of the score function, each on the whole batch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler(abc.ABC):
    """Draws images by their numbers. Equal samplers share compiled programs.

    Attributes:
        smallest_time: sampling ends at this time.
        noise_removal: whether to return the mean of x_0 given the last x, instead of the last x itself. The
            predictor-corrector sampler returns the mean of its last update.
        temperature: factor of x at t_max. For samplers that follow the ODE, 1 samples the model, and less than 1 gives
            more typical images ([S21a] Sec. 4.3). Noise that is added later does not have this factor.

    Raises:
        ValueError: from the constructors, for a name or number that is not allowed.
    """

    sde: SDE
    smallest_time: float = 1e-5
    noise_removal: bool = True
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"sampling.temperature must not be negative, got {self.temperature}")
        if not 0 < self.smallest_time < self.sde.t_max:
            raise ValueError(
                f"sampling.smallest_time must lie between 0 and {self.sde.t_max}, got {self.smallest_time}"
            )

    def __call__(
        self,
        score_fn: ScoreFn,
        key: Key[Array, ""],
        image_indices: Int[Array, " batch"],
        image_shape: tuple[int, ...],
        progress: ReportProgress | None = None,
    ) -> Samples:
        """Draws the images with these numbers, sharded over devices as the numbers are.

        Calls `progress` between the parts of the computation, so that it can be watched and stopped.
        """
        keys = image_keys(key, image_indices)
        return self.solve(ode.as_pytree(score_fn), self._start(keys, image_shape), keys, progress)

    def _start(self, keys: ImageKeys, image_shape: tuple[int, ...]) -> Batch:
        """Draws x at t_max."""
        return self.temperature * prior_samples(self.sde, keys, image_shape)

    @property
    def follows_ode(self) -> bool:
        """Whether samples follow the probability-flow ODE, without noise after the first."""
        return False

    @abc.abstractmethod
    def solve(self, score_fn: ScoreFn, x: Batch, keys: ImageKeys, progress: ReportProgress | None = None) -> Samples:
        """Computes images from x at t_max. The score function is a pytree."""


def image_keys(key: Key[Array, ""], image_indices: Int[Array, " batch"]) -> ImageKeys:
    """Derives the keys of the images with these numbers."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, image_indices)


@functools.partial(jax.jit, static_argnames=("sde", "image_shape"))
def prior_samples(sde: SDE, keys: ImageKeys, image_shape: tuple[int, ...]) -> Batch:
    """Draws x at t_max from the prior."""
    # The prior uses fold_in(key, 0), and step i uses fold_in(key, i + 1); see _noise.
    return jax.vmap(lambda key: sde.prior_sample(jax.random.fold_in(key, 0), image_shape))(keys)


def _noise(keys: ImageKeys, image_shape: tuple[int, ...], step: Array, draw: Array | int) -> Batch:
    """Draws standard normal noise for each image. `draw` numbers the draws within a step."""

    def draw_one(key: Key[Array, ""]) -> Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, step + 1), draw), image_shape)

    return jax.vmap(draw_one)(keys)


def _first_noise(keys: ImageKeys, image_shape: tuple[int, ...], step: Array) -> Batch:
    return _noise(keys, image_shape, step, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictorCorrector(Sampler):
    """Applies the corrector, then the predictor, at each of `num_steps` equidistant times ([S21a] Alg. 1).

    If the predictor is none, the published code does not remove the noise of the last corrector. This code does.

    Attributes:
        predictor, corrector: names in PREDICTORS and CORRECTORS.
        corrector_steps: steps of the corrector at each time.
        snr: signal-to-noise ratio, which sets the step size of the corrector.
        probability_flow: the predictor follows the ODE, not the SDE.
    """

    predictor: str = "reverse_diffusion"
    corrector: str = "langevin"
    num_steps: int = 1000
    corrector_steps: int = 1
    snr: float = 0.16
    probability_flow: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("sampling.predictor", self.predictor, PREDICTORS)
        _check_choice("sampling.corrector", self.corrector, CORRECTORS)
        if self.predictor == self.corrector == "none":
            raise ValueError("sampling.predictor and sampling.corrector are both none: set one of them")
        if self.predictor == "ancestral_sampling":
            check_ancestral(self.sde, self.probability_flow)
        _check_at_least("sampling.num_steps", self.num_steps, 1)
        if self.predictor in ("reverse_diffusion", "ancestral_sampling"):
            _check_chain(self.sde, self.num_steps)
        _check_at_least("sampling.n_steps_each", self.corrector_steps, 1)
        _check_positive("sampling.snr", self.snr)

    @property
    def follows_ode(self) -> bool:
        return self.probability_flow and self.corrector == "none"

    def solve(self, score_fn: ScoreFn, x: Batch, keys: ImageKeys, progress: ReportProgress | None = None) -> Samples:
        return self._run(score_fn, x, keys, progress)

    def conditional(
        self,
        score_fn: ScoreFn,
        key: Key[Array, ""],
        image_indices: Int[Array, " batch"],
        observation: Observation,
        progress: ReportProgress | None = None,
    ) -> Samples:
        """Draws the images with these numbers, with the known components of the observation; see `controllable`."""
        keys = image_keys(key, image_indices)
        x = observed_prior(observation, self.sde, self._start(keys, observation.known.shape[1:]))
        return self._run(ode.as_pytree(score_fn), x, keys, progress, observation)

    def _run(
        self,
        score_fn: ScoreFn,
        x: Batch,
        keys: ImageKeys,
        progress: ReportProgress | None,
        observation: Observation | None = None,
    ) -> Samples:
        """Compiles one program for any part of the steps."""

        def advance(state: Update, first: int, last: int) -> Update:
            return _pc_steps(self, score_fn, keys, state, first, last, observation)

        state = in_parts(advance, (x, x), self.num_steps, progress)
        x, x_mean = state
        each = (self.predictor != "none") + self.corrector_steps * (self.corrector != "none")
        return Samples(x_mean if self.noise_removal else x, self.num_steps * each)

    def step(
        self,
        score_fn: ScoreFn,
        state: Update,
        i: Array,
        draw: Callable[[Array | int], Batch],
        observation: Observation | None = None,
    ) -> Update:
        """Runs step i: the corrector, then the predictor.

        Args:
            draw: standard normal noise by number: 0 for the predictor, j for the j-th step of the corrector, and after
                these in the same order for the known components of an observation.
        """

        def observed(update: Update, number: Array | int) -> Update:
            if observation is None:
                return update
            return observe(observation, self.sde, update, t, draw(self.corrector_steps + 1 + number))

        t = jnp.full(len(state[0]), jnp.linspace(self.sde.t_max, self.smallest_time, self.num_steps)[i])
        predict, correct = PREDICTORS[self.predictor], CORRECTORS[self.corrector]
        if correct is not None:
            # A loop keeps the program small: NCSN has 100 steps of the corrector.
            state = jax.lax.fori_loop(
                1,
                self.corrector_steps + 1,
                lambda j, state: observed(
                    correct(score_fn, self.sde, state[0], t, draw(j), self.num_steps, self.snr), j
                ),
                state,
            )
        if predict is not None:
            update = predict(score_fn, self.sde, state[0], t, draw(0), self.num_steps, self.probability_flow)
            state = observed(update, 0)
        return state


@functools.partial(jax.jit, static_argnames="sampler")
def _pc_steps(
    sampler: PredictorCorrector,
    score_fn: ScoreFn,
    keys: ImageKeys,
    state: Update,
    first: Int[Array, ""] | int,
    last: Int[Array, ""] | int,
    observation: Observation | None = None,
) -> Update:
    """Runs steps first, ..., last - 1. The bounds are traced, so one program can run any part of the steps."""
    image_shape = state[0].shape[1:]

    def step(i: Array, state: Update) -> Update:
        return sampler.step(score_fn, state, i, functools.partial(_noise, keys, image_shape, i), observation)

    return jax.lax.fori_loop(first, last, step, state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ODESampler(Sampler):
    """Solves the probability-flow ODE by an adaptive solver, see `ode.integrate` ([S21a] Sec. 4.3 and App. D.4).

    The tolerances bound an error averaged over the batch, so images depend on the batch within the tolerances.

    Raises:
        RuntimeError: if a solve fails.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("sampling.ode_solver", self.method, ("dopri5", "scipy"))
        ode.check_processes(self.method, "sampling.ode_solver")
        _check_positive("sampling.rtol", self.rtol)
        _check_positive("sampling.atol", self.atol)

    @property
    def follows_ode(self) -> bool:
        return True

    def solve(self, score_fn: ScoreFn, x: Batch, keys: ImageKeys, progress: ReportProgress | None = None) -> Samples:
        x, nfe = self._integrate(score_fn, x, self.sde.t_max, self.smallest_time, progress)
        if self.noise_removal:
            x = _denoise(score_fn, self.sde, x, self.smallest_time)
        return Samples(x, nfe + self.noise_removal)

    def encode(self, score_fn: ScoreFn, x: Batch, progress: ReportProgress | None = None) -> Samples:
        """Computes the latents of images: x at t_max from x at smallest_time."""
        return Samples(*self._integrate(ode.as_pytree(score_fn), x, self.smallest_time, self.sde.t_max, progress))

    def decode(self, score_fn: ScoreFn, latents: Batch, progress: ReportProgress | None = None) -> Samples:
        """Inverts `encode`, to the tolerances of the solver. It removes no noise."""
        return Samples(*self._integrate(ode.as_pytree(score_fn), latents, self.sde.t_max, self.smallest_time, progress))

    def _integrate(
        self, score_fn: ScoreFn, x: Batch, start: float, end: float, progress: ReportProgress | None
    ) -> tuple[Batch, int]:
        settings = {"method": self.method, "rtol": self.rtol, "atol": self.atol}
        x, info = ode.integrate(_ProbabilityFlow(self.sde, score_fn), x, start, end, **settings, progress=progress)
        ode.require_success(info)
        return x, int(info.nfe)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("score_fn",), meta_fields=("sde",))
@dataclasses.dataclass(frozen=True)
class _ProbabilityFlow:
    sde: SDE
    score_fn: ScoreFn

    def __call__(self, t: Float[Array, ""], x: Batch) -> Batch:
        return self.sde.probability_flow(self.score_fn, x, jnp.full(x.shape[0], t))


@functools.partial(jax.jit, static_argnames="sde")
def _denoise(score_fn: ScoreFn, sde: SDE, x: Batch, t: float | Float[Array, ""]) -> Batch:
    return denoise(score_fn, sde, x, jnp.full(x.shape[0], t))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastSampler(Sampler):
    """The common part of the samplers of samplers/few_step.py: a budget of evaluations and a grid of noise levels.

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
        _check_at_least("sampling.max_nfe", self.max_nfe, 3)
        _check_choice("sampling.schedule", self.schedule, ("auto", *SCHEDULES))
        _check_positive("sampling.schedule_exponent", self.schedule_exponent)

    def levels(self, num_levels: int) -> LogNoiseLevels:
        schedule = self.best_schedule if self.schedule == "auto" else self.schedule
        return noise_levels(self.sde, self.smallest_time, num_levels, schedule, self.schedule_exponent)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeunSampler(FastSampler):
    """See `few_step.heun`."""

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
    """See `few_step.dpm_solver`.

    Attributes:
        eta: 0 follows the probability-flow ODE, 1 the reverse-time SDE.
    """

    best_schedule = "log_snr"

    order: int = 2
    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("sampling.order", self.order, (1, 2, 3))
        if not self.eta >= 0:
            raise ValueError(f"sampling.eta must not be negative, got {self.eta}")

    @property
    def follows_ode(self) -> bool:
        return self.eta == 0

    def solve(self, score_fn: ScoreFn, x: Batch, keys: ImageKeys, progress: ReportProgress | None = None) -> Samples:
        log_rhos = self.levels(self.max_nfe + 1 - self.noise_removal)
        noise = jax.tree_util.Partial(_first_noise, keys)
        order, to_zero = self.order, self.noise_removal
        settings = {"eta": self.eta, "noise": noise, "data_range": self.data_range, "progress": progress}
        x = dpm_solver(score_fn, self.sde, x, log_rhos, order, to_zero, **settings)
        return Samples(x, self.max_nfe)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LangevinSampler(Sampler):
    """Langevin dynamics, see `langevin.annealed_langevin_dynamics`. The defaults are from [SE19] Sec. 5.

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
        _check_at_least("sampling.num_levels", self.num_levels, 1)
        _check_at_least("sampling.steps_per_level", self.steps_per_level, 1)
        _check_positive("sampling.step_size", self.step_size)

    @property
    def log_rhos(self) -> LogNoiseLevels:
        """Returns ln rho of the levels."""
        # The smallest level comes last, so that it is also the only one.
        return noise_levels(self.sde, self.smallest_time, max(self.num_levels, 2), "log_snr", 1.0)[-self.num_levels :]

    def solve(self, score_fn: ScoreFn, x: Batch, keys: ImageKeys, progress: ReportProgress | None = None) -> Samples:
        noise = jax.tree_util.Partial(_first_noise, keys)
        settings = self.log_rhos, self.steps_per_level, self.step_size, noise, progress
        x = annealed_langevin_dynamics(score_fn, self.sde, x, *settings)
        if self.noise_removal:
            x = _denoise(score_fn, self.sde, x, self.smallest_time)
        return Samples(x, self.num_levels * self.steps_per_level + self.noise_removal)


def sampler_from_config(config: Config, sde: SDE, data_range: DataRange) -> Sampler:
    """Builds the sampler that `config.sampling` describes.

    Args:
        data_range: the range of the data that the score network sees.

    Raises:
        ValueError: for a field whose value is not allowed.
    """
    _check_choice("sampling.method", config.sampling.method, SAMPLERS)
    return SAMPLERS[config.sampling.method](config, sde, data_range)


def pc_from_config(config: Config, sde: SDE, data_range: DataRange = None) -> PredictorCorrector:
    """Builds the predictor-corrector sampler with the fields of `sampling`, whatever sampling.method says."""
    del data_range
    sampling = config.sampling
    return PredictorCorrector(
        predictor=sampling.predictor,
        corrector=sampling.corrector,
        num_steps=sampling.num_steps or config.model.num_scales,
        corrector_steps=sampling.n_steps_each,
        snr=sampling.snr,
        probability_flow=sampling.probability_flow,
        **_common_fields(config, sde),
    )


def ode_from_config(config: Config, sde: SDE, data_range: DataRange = None) -> ODESampler:
    """Builds the sampler by the ODE with the fields of `sampling`, whatever sampling.method says."""
    del data_range
    sampling = config.sampling
    fields = _common_fields(config, sde)
    return ODESampler(method=sampling.ode_solver, rtol=sampling.rtol, atol=sampling.atol, **fields)


def _dpm_solver_from_config(config: Config, sde: SDE, data_range: DataRange) -> Sampler:
    fields = _fast_fields(config, sde, data_range)
    return DPMSolverSampler(order=config.sampling.order, eta=config.sampling.eta, **fields)


def _heun_from_config(config: Config, sde: SDE, data_range: DataRange) -> Sampler:
    return HeunSampler(**_fast_fields(config, sde, data_range))


def _langevin_from_config(config: Config, sde: SDE, data_range: DataRange) -> Sampler:
    del data_range
    sampling = config.sampling
    return LangevinSampler(
        num_levels=sampling.num_levels if sampling.method == "annealed_langevin" else 1,
        steps_per_level=sampling.steps_per_level,
        step_size=sampling.step_size,
        **_common_fields(config, sde),
    )


def _common_fields(config: Config, sde: SDE) -> dict[str, Any]:
    """The fields of every `Sampler`."""
    sampling = config.sampling
    names = ("smallest_time", "noise_removal", "temperature")
    return {"sde": sde, **{name: sampling[name] for name in names}}


def _fast_fields(config: Config, sde: SDE, data_range: DataRange) -> dict[str, Any]:
    """The fields of every `FastSampler`."""
    sampling = config.sampling
    return _common_fields(config, sde) | {
        "max_nfe": sampling.max_nfe,
        "schedule": sampling.schedule,
        "schedule_exponent": sampling.schedule_exponent,
        "data_range": data_range if sampling.clip_denoised else None,
    }


SAMPLERS: dict[str, Callable[[Config, SDE, DataRange], Sampler]] = {
    "pc": pc_from_config,
    "ode": ode_from_config,
    "dpm_solver": _dpm_solver_from_config,
    "heun": _heun_from_config,
    "langevin": _langevin_from_config,
    "annealed_langevin": _langevin_from_config,
}
"""The builders of samplers, by config.sampling.method."""


def _check_choice(field: str, value: object, allowed: Iterable) -> None:
    if value not in allowed:
        raise ValueError(f"{field} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def _check_chain(sde: SDE, num_steps: int) -> None:
    """Raises ValueError if the SDE has no discrete chain of `num_steps` steps."""
    try:
        jax.eval_shape(lambda t: sde.discretize(t, t, num_steps), jnp.ones(1))
    except ValueError as error:
        raise ValueError(f"sampling.num_steps is too small: {error}") from error


def _check_at_least(field: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{field} must be at least {least}, got {value}")


def _check_positive(field: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{field} must be positive, got {value}")
