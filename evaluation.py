"""Metrics of samples and likelihoods: means with standard errors, FID, Inception Score and KID.

Everything here is NumPy in float64, on arrays of features or of per-example values. evaluators/features.py has the
networks that compute features, and evaluators/statistics.py the statistics of real images.

Sources: FID, Heusel et al. 2017; Inception Score, Salimans et al. 2016; KID, Binkowski et al. 2018.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np
import scipy.special
from jaxtyping import Bool, Float


class MeanEstimate(NamedTuple):
    """A mean over n independent values and its standard error (nan for n = 1)."""

    mean: float
    se: float
    n: int

    @property
    def ci95(self) -> tuple[float, float]:
        """The 95 % confidence interval by Student's t."""
        half_width = float(scipy.special.stdtrit(self.n - 1, 0.975)) * self.se if self.n > 1 else float("nan")
        return self.mean - half_width, self.mean + half_width


def mean_estimate(values: Float[np.ndarray, "*repeats n"], mask: Bool[np.ndarray, " n"] | None = None) -> MeanEstimate:
    """Computes the mean over the examples whose mask is true, and its standard error.

    Repeats of an example (other probes, other noise) are averaged first. The standard error is that over examples,
    because repeats do not add independent examples.

    Raises:
        ValueError: if the mask is false for all examples.
    """
    per_example = np.asarray(values, np.float64)
    per_example = per_example.mean(axis=tuple(range(per_example.ndim - 1)))
    if mask is not None:
        per_example = per_example[np.asarray(mask, bool)]
    n = len(per_example)
    if n == 0:
        raise ValueError(f"There are no values to average: shape {np.shape(values)}, mask {mask}")
    se = per_example.std(ddof=1) / np.sqrt(n) if n > 1 else float("nan")
    return MeanEstimate(float(per_example.mean()), float(se), n)


def frechet_distance(
    mu1: Float[np.ndarray, " d1"],
    sigma1: Float[np.ndarray, "d1 d1"],
    mu2: Float[np.ndarray, " d2"],
    sigma2: Float[np.ndarray, "d2 d2"],
) -> float:
    """Computes the squared Frechet distance |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)).

    The trace of the root is the sum of the singular values of f1^T f2 for factors sigma = f f^T. This avoids the root
    of a product that is not symmetric, and singular covariances do not need an added diagonal.

    Raises:
        ValueError: if the dimensions differ or a value is not finite.
    """
    if not mu1.shape == mu2.shape == sigma1.shape[:1] == sigma2.shape[:1]:
        raise ValueError(f"The dimensions differ: {mu1.shape}, {sigma1.shape}, {mu2.shape}, {sigma2.shape}")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("A mean or covariance is not finite")
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    overlap = np.linalg.svd(_factor(sigma1).T @ _factor(sigma2), compute_uv=False).sum()
    difference = mu1 - mu2
    distance = difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap
    return max(float(distance), 0.0)  # Rounding can make it slightly negative.


def _factor(sigma: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d rank"]:
    """Returns f with f f^T = sigma and orthogonal columns. Eigenvalues within rounding error of 0 count as 0."""
    values, vectors = np.linalg.eigh(sigma)
    above = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, above] * np.sqrt(values[above])


class InceptionScore(NamedTuple):
    """The Inception Score: mean and standard deviation over splits."""

    mean: float
    std: float


def inception_score(logits: Float[np.ndarray, "n classes"], splits: int = 10) -> InceptionScore:
    """Computes exp(E_x KL(p(y|x) || p(y))) within each of `splits` consecutive parts of the samples.

    Raises:
        ValueError: if there are fewer samples than splits.
    """
    if not 1 <= splits <= len(logits):
        raise ValueError(f"splits is {splits}; it must lie between 1 and the number of samples, {len(logits)}")
    bounds = np.arange(splits + 1) * len(logits) // splits
    scores = [_split_score(logits[start:end]) for start, end in itertools.pairwise(bounds)]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def _split_score(logits: Float[np.ndarray, "n classes"]) -> float:
    log_p = scipy.special.log_softmax(np.asarray(logits, np.float64), axis=1)
    log_marginal = scipy.special.logsumexp(log_p, axis=0) - np.log(len(log_p))
    return float(np.exp(np.mean(np.sum(np.exp(log_p) * (log_p - log_marginal), axis=1))))


class KernelDistance(NamedTuple):
    """The squared maximum mean discrepancy, its standard error (nan below three vectors), and the number of subsets."""

    mean: float
    se: float
    subsets: int


def kernel_distance(
    x: Float[np.ndarray, "n d1"], y: Float[np.ndarray, "m d2"], *, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Computes KID: unbiased estimates of the squared MMD for the kernel (x.y / d + 1)^3, averaged over subsets.

    KID can be negative. As published, subsets have at most 1000 members of each set. The published code draws
    overlapping subsets, whose spread says little about the error. Here, the subsets are disjoint, and their number is
    the smallest that covers the smaller set. The standard error comes from a jackknife within each subset. Near a
    distance of 0 it is too large rather than too small.

    Raises:
        ValueError: if a set has fewer than two members, or the dimensions differ.
    """
    fewer = min(len(x), len(y))
    if fewer < 2 or x.shape[1:] != y.shape[1:]:
        raise ValueError(f"KID needs two sets of at least two vectors of equal length, got {x.shape} and {y.shape}")
    subsets = -(-fewer // subset_size)
    generator = np.random.default_rng(seed)
    parts_x, parts_y = (_subsets(a, subsets, subset_size, generator) for a in (x, y))
    estimates = [_squared_mmd(part_x, part_y) for part_x, part_y in zip(parts_x, parts_y, strict=True)]
    means, variances = np.array(estimates).T
    return KernelDistance(float(means.mean()), float(np.sqrt(variances.sum()) / subsets), subsets)


def _subsets(
    x: Float[np.ndarray, "n d"], count: int, largest: int, generator: np.random.Generator
) -> Float[np.ndarray, "count size d"]:
    """Draws disjoint random subsets of equal size."""
    size = min(len(x) // count, largest)
    return np.asarray(x[generator.permutation(len(x))[: count * size]], np.float64).reshape(count, size, -1)


def _squared_mmd(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"], groups: int = 20) -> tuple[float, float]:
    """Computes the unbiased estimate of the squared MMD, and its variance by leaving out one of `groups` parts."""
    groups = min(groups, len(x), len(y))
    in_x, in_y = (np.eye(groups)[np.arange(len(a)) % groups] for a in (x, y))
    # Sums of the kernel over pairs of parts. Estimates from any selection of parts need only these.
    within_x = in_x.T @ _off_diagonal(_kernel(x, x)) @ in_x
    within_y = in_y.T @ _off_diagonal(_kernel(y, y)) @ in_y
    between = in_x.T @ _kernel(x, y) @ in_y

    def estimate(sum_x: Any, sum_y: Any, sum_xy: Any, n: Any, m: Any) -> Any:
        return sum_x / (n * (n - 1)) + sum_y / (m * (m - 1)) - 2 * sum_xy / (n * m)

    value = estimate(within_x.sum(), within_y.sum(), between.sum(), len(x), len(y))
    left_n, left_m = len(x) - in_x.sum(axis=0), len(y) - in_y.sum(axis=0)
    if min(left_n.min(), left_m.min()) < 2:
        return float(value), float("nan")
    left_x, left_y, left_xy = (
        s.sum() - s.sum(axis=0) - s.sum(axis=1) + s.diagonal() for s in (within_x, within_y, between)
    )
    return float(value), float((groups - 1) * estimate(left_x, left_y, left_xy, left_n, left_m).var())


def _kernel(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _off_diagonal(kernel: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    return kernel - np.diag(kernel.diagonal())
