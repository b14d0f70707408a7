"""Statistics of the features of real images, with which samples are compared, and their files."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jaxtyping import Float

from evaluators.extractor import FeatureExtractor, ImageBatches, array_hash
from infra import parallel
from infra.files import read_npz, write_npz

MAX_STORED_FEATURES = 10_000
"""The largest number of feature vectors that are stored with their statistics, for KID."""

_BLOCK = 4096  # vectors converted to float64 at a time


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean and covariance of the features of n images, and the features of some images.

    `pool` is for KID and may be missing. `features` and `features_hash` are the name and hash of the extractor.
    Published files contain neither, and have the hash "". `data` describes the images.
    """

    mu: Float[np.ndarray, " d"]
    sigma: Float[np.ndarray, "d d"]
    n: int | None
    features: str
    features_hash: str
    data: str
    pool: Float[np.ndarray, "stored d"] | None = None

    @property
    def hash(self) -> str:
        return array_hash(self.mu, self.sigma)


class Moments:
    """Accumulates mean and covariance of vectors in float64, part by part, and stores only sums.

    The mean of the first part is subtracted from all vectors, to avoid cancellation.
    """

    def __init__(self) -> None:
        self.n = 0

    def add(self, pool: Float[np.ndarray, "n d"]) -> None:
        """Adds the next part of the vectors."""
        if self.n == 0:
            self.shift = pool.mean(axis=0, dtype=np.float64)
            self.sum, self.products = np.zeros_like(self.shift), np.zeros((len(self.shift),) * 2)
        for start in range(0, len(pool), _BLOCK):
            centered = pool[start : start + _BLOCK].astype(np.float64) - self.shift
            self.n += len(centered)
            self.sum += centered.sum(axis=0)
            self.products += centered.T @ centered

    def mean_and_covariance(self) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
        """Returns the mean and the covariance, which divides by n - 1. There must be at least two vectors."""
        mean = self.sum / self.n
        return self.shift + mean, (self.products - self.n * np.outer(mean, mean)) / (self.n - 1)


class _RandomSubset:
    """A uniformly random subset of at most `size` vectors that arrive in parts, in their order."""

    def __init__(self, size: int) -> None:
        self.size, self.generator, self.parts = size, np.random.default_rng(0), []
        self.priorities = np.empty(0)

    def add(self, pool: Float[np.ndarray, "n d"]) -> None:
        """Adds the next part of the vectors, each with a random priority."""
        self.parts.append(pool)
        self.priorities = np.concatenate([self.priorities, self.generator.random(len(pool))])
        if len(self.priorities) > 2 * self.size:
            self._reduce()

    def vectors(self) -> Float[np.ndarray, "stored d"]:
        """Returns the vectors with the lowest priorities, in the order of their arrival."""
        self._reduce()
        return self.parts[0]

    def _reduce(self) -> None:
        """Selects the vectors of the lowest priorities."""
        chosen = np.sort(np.argsort(self.priorities)[: self.size])
        self.parts, self.priorities = [np.concatenate(self.parts)[chosen]], self.priorities[chosen]


def statistics_of(
    pools: Iterable[Float[np.ndarray, "_ d"]],
    *,
    features: str,
    features_hash: str,
    data: str,
    max_stored: int = MAX_STORED_FEATURES,
) -> Statistics:
    """Computes the statistics of feature vectors that arrive in parts, and stores at most `max_stored` of them.

    Raises:
        ValueError: for fewer than two vectors.
    """
    moments, subset = Moments(), _RandomSubset(max_stored)
    for pool in pools:
        moments.add(pool)
        subset.add(pool)
    if moments.n < 2:
        raise ValueError(f"{data} has {moments.n} feature vectors, but a covariance needs at least 2")
    return Statistics(*moments.mean_and_covariance(), moments.n, features, features_hash, data, subset.vectors())


def measured_statistics(extractor: FeatureExtractor, data: str, batches: ImageBatches) -> Statistics:
    """Computes the statistics of images that arrive in batches, without holding the features of all of them."""
    pools = (extractor(images).pool for images in batches)
    return statistics_of(pools, features=extractor.name, features_hash=extractor.hash, data=data)


def dataset_statistics(path: Path, extractor: FeatureExtractor, data: str, batches: ImageBatches) -> Statistics:
    """Reads the statistics of a data set from `path`, or measures and saves them if the file has other ones.

    `data` must identify the images. `batches` is only read if the images have to be measured. If the statistics cannot
    be saved, a warning is logged, because the measured ones are still valid.

    Raises:
        OSError: if the hosts do not share the folder.
    """
    stored = stored_statistics(path, extractor, data)
    if parallel.agree(stored is not None):
        if stored is None:
            raise OSError(f"The first host has {path}, but this host has not; use a folder that all hosts share")
        return stored
    statistics = measured_statistics(extractor, data, batches)
    try:
        save_statistics(path, statistics)
    except OSError as error:
        logging.warning("Cannot save the statistics of %s, so every evaluation measures them again: %s", data, error)
    return statistics


def stored_statistics(path: Path, extractor: FeatureExtractor, data: str) -> Statistics | None:
    """Reads the statistics at `path`; None if they are missing, damaged, or of another extractor or other data."""
    if not path.exists():
        return None
    try:
        stored = load_statistics(path)
    except ValueError as error:
        logging.warning("%s; measuring the images again", error)
        return None
    same = (stored.features, stored.features_hash, stored.data) == (extractor.name, extractor.hash, data)
    return stored if same else None


def save_statistics(path: Path, statistics: Statistics) -> None:
    """Writes an .npz file on the first host. Other implementations of FID can read its `mu` and `sigma`."""
    fields = {f.name: getattr(statistics, f.name) for f in dataclasses.fields(statistics)}
    if jax.process_index() == 0:
        write_npz(path, **{name: value for name, value in fields.items() if value is not None})


def load_statistics(path: Path, *, features: str = "inception") -> Statistics:
    """Reads our own files, and published ones, which contain `pool_3` (all features) or `mu` and `sigma`.

    Args:
        features: the name of the extractor, for files without it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, contains neither, or has arrays of wrong shapes or values that are not
            finite.
    """
    try:
        return _statistics_in(path, read_npz(path), features)
    except TypeError as error:
        raise ValueError(f"{path} has arrays of a wrong type or shape: {error}") from error


def _statistics_in(path: Path, arrays: Mapping[str, np.ndarray], features: str) -> Statistics:
    name, digest = str(arrays.get("features", features)), str(arrays.get("features_hash", ""))
    data = str(arrays.get("data", path.name))
    if "pool_3" in arrays:
        pool = arrays["pool_3"].reshape(len(arrays["pool_3"]), -1)  # Some files contain the 1 x 1 spatial axes.
        statistics = statistics_of([pool], features=name, features_hash=digest, data=data)
        _check_moments(path, statistics.mu, statistics.sigma)
    elif {"mu", "sigma"} <= arrays.keys():
        n = int(arrays["n"]) if "n" in arrays else None
        _check_moments(path, arrays["mu"], arrays["sigma"])
        statistics = Statistics(arrays["mu"], arrays["sigma"], n, name, digest, data, arrays.get("pool"))
    else:
        raise ValueError(f"{path} contains {', '.join(arrays) or 'nothing'}, but needs pool_3, or mu and sigma")
    return statistics


def _check_moments(path: Path, mu: np.ndarray, sigma: np.ndarray) -> None:
    if sigma.shape != mu.shape * 2 or mu.ndim != 1 or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(
            f"{path} has mu of shape {mu.shape} and sigma of {sigma.shape}; they must be [d] and [d, d], and finite"
        )


def check_statistics(statistics: Statistics, extractor: FeatureExtractor) -> None:
    """Raises ValueError for statistics of another extractor. For published files only the size can be checked."""
    unknown = statistics.features_hash == ""
    if statistics.features != extractor.name or not (unknown or statistics.features_hash == extractor.hash):
        raise ValueError(
            f"The statistics of {statistics.data} were measured by {statistics.features} {statistics.features_hash}, "
            f"but the samples are measured by {extractor.name} {extractor.hash}; use statistics of the same features"
        )
    if len(statistics.mu) != extractor.num_features:
        raise ValueError(
            f"The statistics of {statistics.data} have {len(statistics.mu)} features, but {extractor.name} has "
            f"{extractor.num_features}; use statistics of the same features"
        )
