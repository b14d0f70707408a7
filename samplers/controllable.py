"""Conditional samples from an unconditional score function ([S21a] Sec. 5 and App. I).

There are three ways to condition:

- `Observation`: some components of the image in an orthogonal basis are known. In every update of a predictor-corrector
  sampler, they are replaced by their known values plus the noise of that time. Inpainting, colorization and all
  linear inverse problems without noise have this form. The replacement is an approximation: the other components follow
  p_t(unknown | known with noise), not p_t(unknown | known). The two agree as the noise vanishes, so corrector steps
  make the samples better.
- `GuidedScore`: the score of p_t(x | class) from a classifier of noisy images, by Bayes' rule.
- `ClassifierFreeScore`: guidance by a score function that takes the class (Ho & Salimans, 2022).

Source: [S21a] Song et al., ICLR 2021.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from arrays import Batch, PerExample, ScoreFn, append_dims
from samplers.predictor_corrector import Update
from sde_lib import SDE

Basis: TypeAlias = Float[Array, "size size"]
"""An orthogonal matrix whose columns are the basis vectors."""

ClassifierFn: TypeAlias = Callable[[Batch, PerExample], Float[Array, "batch classes"]]
"""logits(x, t) of ln p_t(class | x) up to a constant. Preferably a pytree."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=("known", "mask", "basis"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Observation:
    """Components of images that are known, without noise.

    Attributes:
        known: the components of each image in the basis, shaped as the images. Values where the mask is 0 are ignored.
        mask: 1 where a component is known, otherwise 0; shaped as the images.
        basis: of size [c, c] for a basis of the c channels of a pixel, or [d, d] for one of all d dimensions of an
            image; None: the pixels themselves.
    """

    known: Batch
    mask: Batch
    basis: Basis | None = None

    def components(self, x: Batch) -> Batch:
        """Returns the components of x in the basis."""
        return x if self.basis is None else _multiply(x, self.basis)

    def image(self, components: Batch) -> Batch:
        """Inverts `components`."""
        return components if self.basis is None else _multiply(components, self.basis.T)

    def replace(self, x: Batch, values: Batch) -> Batch:
        """Returns x with these values of the known components."""
        return self.image(self.components(x) * (1 - self.mask) + values * self.mask)


def _multiply(x: Batch, matrix: Basis) -> Batch:
    product = jnp.matmul(x.reshape(len(x), -1, len(matrix)), matrix, precision=jax.lax.Precision.HIGHEST)
    return product.reshape(x.shape)


def observe(observation: Observation, sde: SDE, update: Update, t: PerExample, noise: Batch) -> Update:
    """Replaces the known components after an update from time t ([S21a] App. I.2 and I.3).

    In x, they become alpha_t known + sigma_t noise; in its mean, alpha_t known. The published code passes x in place of
    its mean. At the end of sampling, it therefore removes only the noise of the known components.
    """
    x, x_mean = update
    mean, sigma = sde.marginal(observation.known, t)
    return observation.replace(x, mean + append_dims(sigma, x) * noise), observation.replace(x_mean, mean)


def observed_prior(observation: Observation, sde: SDE, x: Batch) -> Batch:
    """Returns x at t_max, given a sample of the prior, which also supplies the noise of the known components."""
    alpha = sde.alpha_sigma(jnp.full(len(x), sde.t_max, x.dtype))[0]
    return x + append_dims(alpha, x) * observation.image(observation.known * observation.mask)


def colorization_basis() -> Float[np.ndarray, "3 3"]:
    """Returns an orthogonal basis of the colours of a pixel, whose first vector is grey ([S21a] App. I.3).

    The other two vectors are from the published code.
    """
    grey, first, second = [1, 1, 1], [-2, 1, 1], [0, 1, -1]
    return np.array([np.array(v) / np.linalg.norm(v) for v in (grey, first, second)]).T


def basis_of_matrix(
    matrix: Float[np.ndarray, "m d"],
) -> tuple[Float[np.ndarray, "d d"], Float[np.ndarray, "m rank"], int]:
    """Returns an orthogonal basis whose first vectors span the rows of a matrix, by its singular value decomposition.

    Returns:
        The basis; a matrix that turns observations `matrix @ x` into the first components of x; and their number, the
        rank of the matrix.
    """
    left, values, right = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=True)
    rank = int(np.sum(values > max(matrix.shape) * np.finfo(np.float32).eps * values.max(initial=0)))
    return right.T, left[:, :rank] / values[:rank], rank


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("score_fn", "classifier", "labels", "scale"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class GuidedScore:
    """A `ScoreFn` of p_t(x | class): score + scale grad_x ln p_t(class | x) ([S21a] Eqn. 14 and App. I.1).

    A scale above 1 samples more typical images of the class, with less variety (Dhariwal & Nichol, 2021).
    """

    score_fn: ScoreFn
    classifier: ClassifierFn
    labels: Int[Array, " batch"]
    scale: float | Float[Array, ""] = 1.0

    def __call__(self, x: Batch, t: PerExample) -> Batch:
        return self.score_fn(x, t) + self.scale * self.classifier_score(x, t)

    def classifier_score(self, x: Batch, t: PerExample) -> Batch:
        """Returns grad_x ln p_t(class | x) of each example."""

        def total_log_probability(x: Batch) -> Array:
            log_p = jax.nn.log_softmax(self.classifier(x, t))
            return jnp.sum(jnp.take_along_axis(log_p, self.labels[:, None], axis=1))

        return jax.grad(total_log_probability)(x)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("unconditional", "conditional", "weight"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class ClassifierFreeScore:
    """A `ScoreFn`: (1 - weight) unconditional + weight conditional (Ho & Salimans, 2022).

    Weight 0 ignores the class, 1 is the score of p_t(x | class), and more is guidance by the implicit classifier
    p_t(x | class) / p_t(x), as in `GuidedScore`.
    """

    unconditional: ScoreFn
    conditional: ScoreFn
    weight: float | Float[Array, ""]

    def __call__(self, x: Batch, t: PerExample) -> Batch:
        return (1 - self.weight) * self.unconditional(x, t) + self.weight * self.conditional(x, t)
