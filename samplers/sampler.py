"""The interface of samplers, which draw images by their numbers, from noise at t_max to smallest_time.

All random numbers of image k are derived from the key, k, and the number of the step. So an image does not depend on
the number of devices, on interruptions, or on the other images drawn with it. Round r of a run draws images r B, ...,
(r + 1) B - 1.
There are two exceptions: the Langevin corrector averages norms over the whole batch, as published, and the adaptive ODE
solver chooses its steps for the whole batch.

Source: [S21a] Song et al., ICLR 2021.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from arrays import Batch, PerExample, ReportProgress, ScoreFn, append_dims, as_pytree
from configs.default import Config
from sde_lib import SDE

ImageKeys = Key[Array, " batch"]
"""One random key for each image."""

DataRange = tuple[float, float] | None
"""The least and greatest value of a pixel; None if the data have no known range."""

StepNoise = Callable[[tuple[int, ...], Array], Batch]
"""Draws standard normal noise for images of this shape at this step. A pytree."""


class Samples(NamedTuple):
    """Samples, and the number of network evaluations."""

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
        # A time that is computed back from its noise level may be rounded to 0, where labels like ln t are infinite.
        not_earlier = jax.tree_util.Partial(_not_before, jnp.float32(self.smallest_time), as_pytree(score_fn))
        return self.solve(not_earlier, self._start(keys, image_shape), keys, progress)

    def _start(self, keys: ImageKeys, image_shape: tuple[int, ...]) -> Batch:
        """Draws x at t_max."""
        return self.temperature * prior_samples(self.sde, keys, image_shape)

    @property
    def follows_ode(self) -> bool:
        """Whether samples follow the probability-flow ODE, so that noise enters only at t_max."""
        return False

    def concerns(self, *, discrete: bool) -> list[str]:
        """Returns sentences about settings with which even a good model gives poor samples.

        Args:
            discrete: the model knows data only at the noise levels of a discrete chain.
        """
        del discrete
        if not (self.follows_ode and self.sde.variance_exploding):
            return []
        return [
            "Samples from the ODE of a VE model are often poor, because they keep every error of the score at large "
            "noise. --config.sampling.method=dpm_solver --config.sampling.eta=1 follows the SDE instead"
        ]

    @abc.abstractmethod
    def solve(self, score_fn: ScoreFn, x: Batch, keys: ImageKeys, progress: ReportProgress | None = None) -> Samples:
        """Computes images from x at t_max. The score function is a pytree."""


def _not_before(smallest_time: Float[Array, ""], score_fn: ScoreFn, x: Batch, t: PerExample) -> Batch:
    return score_fn(x, jnp.maximum(t, smallest_time))


def image_keys(key: Key[Array, ""], image_indices: Int[Array, " batch"]) -> ImageKeys:
    """Derives the keys of the images with these numbers."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, image_indices)


@functools.partial(jax.jit, static_argnames=("sde", "image_shape"))
def prior_samples(sde: SDE, keys: ImageKeys, image_shape: tuple[int, ...]) -> Batch:
    """Draws x at t_max from the prior."""
    # The prior uses fold_in(key, 0), and step i uses fold_in(key, i + 1); see step_noise.
    return jax.vmap(lambda key: sde.prior_sample(jax.random.fold_in(key, 0), image_shape))(keys)


def step_noise(keys: ImageKeys, image_shape: tuple[int, ...], step: Array, draw: Array | int) -> Batch:
    """Draws standard normal noise for each image. `draw` numbers the draws within a step."""

    def draw_one(key: Key[Array, ""]) -> Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, step + 1), draw), image_shape)

    return jax.vmap(draw_one)(keys)


def first_noise(keys: ImageKeys, image_shape: tuple[int, ...], step: Array) -> Batch:
    """Draws the first noise of a step for each image; see `step_noise`."""
    return step_noise(keys, image_shape, step, 0)


def denoise(score_fn: ScoreFn, sde: SDE, x: Batch, t: PerExample) -> Batch:
    """E[x_0 | x_t] = (x_t + sigma^2 score) / alpha (Tweedie's formula)."""
    alpha, sigma = (append_dims(a, x) for a in sde.alpha_sigma(t))
    return (x + sigma**2 * score_fn(x, t)) / alpha


@functools.partial(jax.jit, static_argnames="sde")
def denoise_at(score_fn: ScoreFn, sde: SDE, x: Batch, t: float | Float[Array, ""]) -> Batch:
    """`denoise` at the same time t for all images."""
    return denoise(score_fn, sde, x, jnp.full(x.shape[0], t))


def common_fields(config: Config, sde: SDE) -> dict[str, Any]:
    """The fields of every `Sampler`."""
    sampling = config.sampling
    names = ("smallest_time", "noise_removal", "temperature")
    return {"sde": sde, **{name: sampling[name] for name in names}}


def check_choice(field: str, value: object, allowed: Iterable) -> None:
    """Raises ValueError if the value is not among the allowed ones."""
    if value not in allowed:
        raise ValueError(f"{field} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def check_at_least(field: str, value: int, least: int) -> None:
    """Raises ValueError if the value is smaller than `least`."""
    if value < least:
        raise ValueError(f"{field} must be at least {least}, got {value}")


def check_positive(field: str, value: float) -> None:
    """Raises ValueError if the value is not positive, or is NaN."""
    if not value > 0:
        raise ValueError(f"{field} must be positive, got {value}")
