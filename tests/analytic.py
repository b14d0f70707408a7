"""Densities for tests, known in closed form at every time of every SDE.

The mixture is asymmetric for a reason. The log-density of a Gaussian has a constant Hessian, so it hides errors of sign
and scale in third derivatives. A symmetric mixture hides errors of sign in derivatives of odd order.
"""

import numpy as np
from jaxtyping import Float

from sde_lib import SDES
from sources.densities import GaussianMixture

DISTINCT_SDES = [name for name in SDES if name != "lineargammavpsde"]
"""The SDEs for slow tests. VP with linear gamma is left out, because it is VP at other times."""


def gaussian(mean: Float[np.ndarray, " d"], covariance: Float[np.ndarray, "d d"]) -> GaussianMixture:
    """Returns a Gaussian as a mixture with a single component."""
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    return GaussianMixture(np.ones(1), mean[None], covariance[None])


def correlated_gaussian(d: int) -> GaussianMixture:
    """Returns a Gaussian off the origin with correlated entries, at about the scale of images in [-1, 1]."""
    rng = np.random.default_rng(1)
    return gaussian(rng.uniform(-0.5, 0.5, d), _covariances(rng, 1, d)[0])


def asymmetric_mixture(d: int) -> GaussianMixture:
    """Returns three overlapping components of unequal weights and shapes, at about the scale of images in [-1, 1]."""
    rng = np.random.default_rng(2)
    # The first axis separates the components for every d.
    means = rng.uniform(-0.4, 0.4, (3, d))
    means[:, 0] = (-0.7, 0.2, 0.9)
    return GaussianMixture(np.array([0.5, 0.2, 0.3]), means, _covariances(rng, 3, d))


def _covariances(rng: np.random.Generator, k: int, d: int) -> np.ndarray:
    """Draws covariances with standard deviations of 0.15 to 0.45 along random axes."""
    axes = np.linalg.qr(rng.normal(size=(k, d, d)))[0]
    return np.einsum("kij,kj,klj->kil", axes, rng.uniform(0.15, 0.45, (k, d)) ** 2, axes)
