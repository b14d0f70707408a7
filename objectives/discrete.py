"""Denoising score matching at the discrete noise levels of a chain: SMLD, with NCSN, and DDPM.

Both have the same loss, |sigma_i s(x_i, t_i) + z|^2 with x_i = alpha_i x_0 + sigma_i z, and differ in the chain:

- SMLD ([SE19] Eqn. 6 with weights sigma^2, [S21a] Eqn. 1): alpha_i = 1, sigma_i on a geometric ladder.
- DDPM ([H20] Eqn. 14): alpha_i^2 is the product of 1 - beta_j over j <= i. The loss is the error of the predicted
  noise.

The score function is given the time t_i = i / (N - 1) of level i. models/conditioning.py turns it into the label of
the published network.
"""

import dataclasses
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from arrays import Batch, PerExample, ScoreFn, append_dims, mean_square, num_dims
from configs.default import Config
from objectives.objective import Residual, TrainingObjective
from sde_lib import SDE, chain_times


class DiscreteNoise(NamedTuple):
    """The randomness of one evaluation of the loss."""

    t: PerExample
    """Times of levels of the chain."""
    z: Batch
    """Standard normal, shaped as the data."""


@dataclasses.dataclass(frozen=True)
class DiscreteObjective(TrainingObjective):
    """The loss of SMLD for the VE SDE, and of DDPM for the VP SDE, with uniformly drawn levels.

    Attributes:
        levels: N, the number of noise levels.
        reduce_mean: average over dimensions; otherwise take half the sum.
    """

    levels: int
    reduce_mean: bool = True

    def draw_noise(
        self, key: Array, sde: SDE, shape: tuple[int, ...], density: Float[Array, " bins"] | None = None
    ) -> DiscreteNoise:
        """Draws levels and noise for a batch of this shape."""
        del sde, density
        level_key, z_key = jax.random.split(key)
        levels = jax.random.randint(level_key, shape[:1], 0, self.levels)
        return DiscreteNoise(chain_times(self.levels)[levels], jax.random.normal(z_key, shape))

    def losses(
        self, score_fn: ScoreFn, sde: SDE, x0: Batch, noise: DiscreteNoise, residual: Residual | None = None
    ) -> dict[str, PerExample]:
        """Computes the loss of each example.

        Raises:
            ValueError: if the SDE has no discrete chain with this number of levels.
        """
        del residual
        alpha, sigma = (append_dims(a, x0) for a in sde.chain_alpha_sigma(noise.t, self.levels))
        xt = alpha * x0 + sigma * noise.z
        error = mean_square(sigma * score_fn(xt, noise.t) + noise.z)
        if not self.reduce_mean:
            error = 0.5 * num_dims(x0) * error
        return {"total": error, "first": error}


def discrete_from_config(config: Config) -> DiscreteObjective:
    """Builds the objective for training.continuous=False, with model.num_scales noise levels.

    Raises:
        ValueError: if config.training has a setting that is not available in discrete time.
    """
    training = config.training
    if training.score_matching_order > 1:
        raise ValueError(
            f"training.score_matching_order is {training.score_matching_order}; orders 2 and 3 need "
            "training.continuous=True"
        )
    for field in ("likelihood_weighting", "importance_weighting", "stratified_times", "bits_per_dim", "noise_level"):
        if training[field]:
            raise ValueError(f"training.{field} is {training[field]}, which needs training.continuous=True")
    weighting = training.first_order_weighting
    if weighting != "constant":
        raise ValueError(f"training.first_order_weighting is {weighting!r}, which needs training.continuous=True")
    return DiscreteObjective(config.model.num_scales, training.reduce_mean)
