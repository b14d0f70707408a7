"""Score matching without the noise as a target: implicit (Hyvarinen's) and sliced score matching.

Integration by parts turns E|s - grad ln q|^2 into E[|s|^2 + 2 tr J] plus a constant, where J is the Jacobian of the
score ([HY05] Theorem 1). This needs samples of q, but not its score. Sliced score matching replaces the trace by its
Hutchinson estimate v.J v, averaged over M projections v ([SGSE19] Sec. 3). Its first form also has (v.s)^2 in place of
|s|^2; the form with |s|^2 has less variance.

Here q is the density of x_t = alpha x_0 + sigma z at one noise level or at several. The terms are scaled as in
denoising score matching, and include the constant that makes the expectations equal:
E|sigma s + z|^2 = E[|sigma s|^2 + 2 sigma^2 tr J] + d.

Sources: [HY05] Hyvarinen, JMLR 2005; [SGSE19] Song et al., UAI 2019.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from arrays import Batch, PerExample, ScoreFn, append_dims, inner, num_dims
from configs.default import Config
from derivatives import PROBES, divergence_estimates
from objectives.objective import Residual, TrainingObjective, require_first_order
from objectives.times import TimeDistribution, times_from_config
from sde_lib import SDE

Projections = Float[Array, "batch k *dims"]
"""k random vectors for each example, with independent entries of mean 0 and variance 1."""


def implicit_score_matching(score_fn: ScoreFn, sde: SDE, xt: Batch, t: PerExample) -> PerExample:
    """(|sigma s|^2 + 2 sigma^2 tr J) / d + 1 ([HY05] Theorem 1), at the cost of d forward derivatives."""
    score, divergence = _score_and_divergences(score_fn, sde, xt, t, None)
    return (inner(score, score) + 2 * divergence[:, 0]) / num_dims(xt) + 1


def sliced_score_matching(
    score_fn: ScoreFn, sde: SDE, xt: Batch, t: PerExample, projections: Projections, *, variance_reduced: bool
) -> PerExample:
    """The mean over projections v of ((sigma v.s)^2 + 2 sigma^2 v.J v) / d + 1 ([SGSE19] Sec. 3).

    Args:
        variance_reduced: |sigma s|^2 in place of (sigma v.s)^2, which has the same expectation. In one dimension, where
            projections are 1 or -1, the two forms are equal.
    """
    score, divergences = _score_and_divergences(score_fn, sde, xt, t, projections)
    if variance_reduced:
        squares = inner(score, score)
    else:
        squares = jnp.mean(jax.vmap(inner, in_axes=(1, None), out_axes=1)(projections, score) ** 2, axis=1)
    return (squares + 2 * jnp.mean(divergences, axis=1)) / num_dims(xt) + 1


def _score_and_divergences(
    score_fn: ScoreFn, sde: SDE, xt: Batch, t: PerExample, projections: Projections | None
) -> tuple[Batch, Float[Array, "batch k"]]:
    """Returns sigma times the score, and sigma^2 v.J v for each projection; without them, sigma^2 tr J with k = 1."""
    sigma = sde.alpha_sigma(t)[1]
    probes = None if projections is None else jnp.moveaxis(projections, 1, 0)
    score, divergences = divergence_estimates(lambda x: append_dims(sigma, x) * score_fn(x, t), xt, probes)
    return score, sigma[:, None] * divergences


class SlicedNoise(NamedTuple):
    """The randomness of one evaluation of implicit or sliced score matching."""

    t: PerExample
    z: Batch
    projections: Projections | None
    """None: the exact trace."""


@dataclasses.dataclass(frozen=True)
class SlicedObjective(TrainingObjective):
    """Implicit or sliced score matching at the times that `times` draws."""

    times: TimeDistribution
    num_projections: int = 1
    """The number M of projections. With 0, this is implicit score matching, which needs the exact trace."""
    variance_reduced: bool = True
    likelihood_weighting: bool = False
    reduce_mean: bool = True

    @property
    def needs_jacobian(self) -> bool:
        return not self.num_projections

    def draw_noise(
        self, key: Array, sde: SDE, shape: tuple[int, ...], density: Float[Array, " bins"] | None = None
    ) -> SlicedNoise:
        del density  # All examples draw their times from the same density.
        t_key, z_key, projection_key = jax.random.split(key, 3)
        projections = None
        if self.num_projections:
            projections = PROBES["rademacher"](projection_key, (shape[0], self.num_projections, *shape[1:]))
        return SlicedNoise(self.times.draw(t_key, sde, shape[0]), jax.random.normal(z_key, shape), projections)

    def losses(
        self, score_fn: ScoreFn, sde: SDE, x0: Batch, noise: SlicedNoise, residual: Residual | None = None
    ) -> dict[str, PerExample]:
        """Returns the loss as `total`, and also as `first`, because it estimates first-order score matching.

        With M projections, it costs one network evaluation with M derivatives.
        """
        del residual  # The weights do not depend on it.
        mean, sigma = sde.marginal(x0, noise.t)
        xt = mean + append_dims(sigma, x0) * noise.z
        if noise.projections is None:
            loss = implicit_score_matching(score_fn, sde, xt, noise.t)
        else:
            reduced = self.variance_reduced
            loss = sliced_score_matching(score_fn, sde, xt, noise.t, noise.projections, variance_reduced=reduced)
        if self.likelihood_weighting:
            loss = loss * self.times.likelihood_weight(sde, noise.t)
        if not self.reduce_mean:
            loss = 0.5 * num_dims(x0) * loss
        return {"total": loss, "first": loss}


def sliced_from_config(config: Config) -> SlicedObjective:
    """Builds implicit or sliced score matching as config.training describes it.

    Raises:
        ValueError: for a field whose value is not allowed.
    """
    training, levels = config.training, 0
    name = training.objective
    require_first_order(training)
    if not training.continuous:
        if training.sde != "vesde" or training.likelihood_weighting or training.noise_level:
            raise ValueError(
                f"training.continuous is False, which with training.objective={name} needs training.sde=vesde, "
                "training.likelihood_weighting=False and training.noise_level=0"
            )
        levels = config.model.num_scales
    return SlicedObjective(
        times_from_config(training, levels=levels),
        num_projections=0 if name == "implicit" else training.num_projections,
        variance_reduced=name == "sliced_vr",
        likelihood_weighting=training.likelihood_weighting,
        reduce_mean=training.reduce_mean,
    )


SLICED = ("implicit", "sliced", "sliced_vr")
"""The values of training.objective for the objectives in this file."""
