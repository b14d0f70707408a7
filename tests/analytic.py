"""Densities known in closed form at every time of every SDE: what the tests compare with.

The mixture of the tests is asymmetric on purpose: a Gaussian has a constant Hessian of its log-density, so errors of
sign and scale in third derivatives do not show there, and a symmetric mixture hides errors of sign in odd ones.
"""

import numpy as np
from jaxtyping import Float

from sources.densities import GaussianMixture


def gaussian(mean: Float[np.ndarray, " d"], covariance: Float[np.ndarray, "d d"]) -> GaussianMixture:
    """One Gaussian, as a mixture of a single component."""
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    return GaussianMixture(np.ones(1), mean[None], covariance[None])


def correlated_gaussian(d: int) -> GaussianMixture:
    """A Gaussian off the origin with correlated entries, of about the scale of images in [-1, 1]."""
    rng = np.random.default_rng(1)
    return gaussian(rng.uniform(-0.5, 0.5, d), _covariances(rng, 1, d)[0])


def asymmetric_mixture(d: int) -> GaussianMixture:
    """Three overlapping components of unequal weights and shapes, of about the scale of images in [-1, 1]."""
    rng = np.random.default_rng(2)
    # the first axis separates the components whatever d is
    means = rng.uniform(-0.4, 0.4, (3, d))
    means[:, 0] = (-0.7, 0.2, 0.9)
    return GaussianMixture(np.array([0.5, 0.2, 0.3]), means, _covariances(rng, 3, d))


def _covariances(rng: np.random.Generator, k: int, d: int) -> np.ndarray:
    """Random covariances with standard deviations of 0.15 to 0.45 along random axes."""
    axes = np.linalg.qr(rng.normal(size=(k, d, d)))[0]
    return np.einsum("kij,kj,klj->kil", axes, rng.uniform(0.15, 0.45, (k, d)) ** 2, axes)
