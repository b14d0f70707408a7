"""Samplers by name, and the published predictor-corrector sampler.

samplers/ has the other samplers, and the updates of this one.

Source: [S21a] Song et al., ICLR 2021.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from arrays import Batch, ReportProgress, ScoreFn, as_pytree, in_parts
from configs.default import Config
from samplers.controllable import Observation, observe, observed_prior
from samplers.few_step import dpm_solver_from_config, heun_from_config
from samplers.langevin import langevin_from_config
from samplers.predictor_corrector import CORRECTORS, PREDICTORS, Update, check_ancestral
from samplers.probability_flow import ode_from_config
from samplers.sampler import (
    DataRange,
    ImageKeys,
    Sampler,
    Samples,
    check_at_least,
    check_choice,
    check_positive,
    common_fields,
    image_keys,
    step_noise,
)
from sde_lib import SDE

MOST_SMALLEST_TIME = 0.01
"""The latest end of predictor-corrector sampling. It is the published one of sub-VP."""

MOST_REMOVED = 3.0
"""The noise that the last predictor step may remove, by `removed_noise`. Published settings reach 2.2."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictorCorrector(Sampler):
    """Applies the corrector, then the predictor, at each of `num_steps` equidistant times ([S21a] Alg. 1).

    The last of these times is `smallest_time`, but as published, each step is t_max / num_steps long. So the last step
    leads to about time 0.

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
        if self.smallest_time > MOST_SMALLEST_TIME:
            raise ValueError(
                f"sampling.smallest_time is {self.smallest_time}, but predictor-corrector steps lead to time 0; it "
                f"must be at most {MOST_SMALLEST_TIME}"
            )
        check_choice("sampling.predictor", self.predictor, PREDICTORS)
        check_choice("sampling.corrector", self.corrector, CORRECTORS)
        if self.predictor == self.corrector == "none":
            raise ValueError("sampling.predictor and sampling.corrector are both none: set one of them")
        if self.predictor == "ancestral_sampling":
            check_ancestral(self.sde, self.probability_flow)
        check_at_least("sampling.num_steps", self.num_steps, 1)
        if self.predictor in ("reverse_diffusion", "ancestral_sampling"):
            _check_chain(self.sde, self.num_steps)
        check_at_least("sampling.n_steps_each", self.corrector_steps, 1)
        check_positive("sampling.snr", self.snr)

    @property
    def follows_ode(self) -> bool:
        return self.probability_flow and self.corrector == "none"

    def removed_noise(self) -> float:
        """The noise that the last step of the predictor removes, as a multiple of the noise variance at its time.

        With an exact score, the step multiplies the distance from the data by this number minus 1. So beyond 2, it adds
        noise. Models that know only the levels of a discrete chain have other noise variances.
        """
        if self.predictor == "none":
            return 0.0
        t = jnp.full(1, self.smallest_time)
        if self.predictor == "euler_maruyama":
            g = self.sde.diffusion(t) * math.sqrt(self.sde.t_max / self.num_steps)
        else:
            g = self.sde.discretize(jnp.zeros((1, 1)), t, self.num_steps)[1]
        return float((g / self.sde.alpha_sigma(t)[1])[0] ** 2) * (0.5 if self.probability_flow else 1.0)

    def concerns(self, *, discrete: bool) -> list[str]:
        concerns, removed = super().concerns(discrete=discrete), self.removed_noise()
        if not discrete and removed > MOST_REMOVED:
            enough = min(removed * self.smallest_time, MOST_SMALLEST_TIME)
            concerns.append(
                f"The last predictor step removes {removed:.3g} times the noise that is left, so it adds noise to the "
                f"samples: raise sampling.smallest_time (to about {enough:.1g}) or sampling.num_steps"
            )
        return concerns

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
        return self._run(as_pytree(score_fn), x, keys, progress, observation)

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
        return sampler.step(score_fn, state, i, functools.partial(step_noise, keys, image_shape, i), observation)

    return jax.lax.fori_loop(first, last, step, state)


def pc_from_config(config: Config, sde: SDE, data_range: DataRange = None) -> PredictorCorrector:
    """Builds the predictor-corrector sampler with the fields of `sampling`, for every sampling.method.

    Reads only the fields that have an effect.
    """
    del data_range
    sampling = config.sampling
    predictor, corrector, fields = sampling.predictor, sampling.corrector, common_fields(config, sde)
    if predictor != "none":
        fields["probability_flow"] = sampling.probability_flow
    if corrector != "none":
        fields |= {"corrector_steps": sampling.n_steps_each, "snr": sampling.snr}
    num_steps = sampling.num_steps or config.model.num_scales
    return PredictorCorrector(predictor=predictor, corrector=corrector, num_steps=num_steps, **fields)


def _check_chain(sde: SDE, num_steps: int) -> None:
    """Raises ValueError if the SDE has no discrete chain of `num_steps` steps."""
    try:
        jax.eval_shape(lambda t: sde.discretize(t, t, num_steps), jnp.ones(1))
    except ValueError as error:
        raise ValueError(f"sampling.num_steps is too small: {error}") from error


SAMPLERS: dict[str, Callable[[Config, SDE, DataRange], Sampler]] = {
    "pc": pc_from_config,
    "ode": ode_from_config,
    "dpm_solver": dpm_solver_from_config,
    "heun": heun_from_config,
    "langevin": langevin_from_config,
    "annealed_langevin": langevin_from_config,
}
"""The builders of samplers, by config.sampling.method."""


def sampler_from_config(config: Config, sde: SDE, data_range: DataRange) -> Sampler:
    """Builds the sampler that `config.sampling` describes.

    Args:
        data_range: the range of the data that the score network sees.

    Raises:
        ValueError: for a field whose value is not allowed.
    """
    check_choice("sampling.method", config.sampling.method, SAMPLERS)
    return SAMPLERS[config.sampling.method](config, sde, data_range)
