"""Statistics of the features of real images, which samples are compared with, and their files."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jaxtyping import Float

from evaluators.features import FeatureExtractor, Images, array_hash
from infra import parallel
from infra.files import read_npz, write_npz

KEPT = 10_000
"""Feature vectors that stay with their statistics, for KID."""

_BLOCK = 4096  # vectors turned to float64 at a time


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What samples are compared with: mean and covariance of the features of n images, and some of the features.

    `pool` serves KID and may be missing. `features` and `features_hash` are the extractor's; published files, which do
    not say, have the hash "". `data` describes the images.
    """

    mu: Float[np.ndarray, " d"]
    sigma: Float[np.ndarray, "d d"]
    n: int | None
    features: str
    features_hash: str
    data: str
    pool: Float[np.ndarray, "kept d"] | None = None

    @property
    def hash(self) -> str:
        return array_hash(self.mu, self.sigma)


class Moments:
    """Mean and covariance of vectors that come in parts, in float64; nothing but sums is kept.

    The sums are about the mean of the first part, so that nothing cancels.
    """

    def __init__(self) -> None:
        self.n = 0

    def add(self, pool: Float[np.ndarray, "n d"]) -> None:
        if self.n == 0:
            self.shift = pool.mean(axis=0, dtype=np.float64)
            self.sum, self.products = np.zeros_like(self.shift), np.zeros((len(self.shift),) * 2)
        for start in range(0, len(pool), _BLOCK):
            centered = pool[start : start + _BLOCK].astype(np.float64) - self.shift
            self.n += len(centered)
            self.sum += centered.sum(axis=0)
            self.products += centered.T @ centered

    def mean_and_covariance(self) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
        """The covariance divides by n - 1; n must be at least 2."""
        mean = self.sum / self.n
        return self.shift + mean, (self.products - self.n * np.outer(mean, mean)) / (self.n - 1)


class _RandomPart:
    """At most so many of the vectors that come in parts, each as likely as any other, in their order."""

    def __init__(self, most: int) -> None:
        self.most, self.generator, self.parts = most, np.random.default_rng(0), []
        self.priorities = np.empty(0)

    def add(self, pool: Float[np.ndarray, "n d"]) -> None:
        self.parts.append(pool)
        self.priorities = np.concatenate([self.priorities, self.generator.random(len(pool))])
        if len(self.priorities) > 2 * self.most:
            self._reduce()

    def vectors(self) -> Float[np.ndarray, "kept d"]:
        self._reduce()
        return self.parts[0]

    def _reduce(self) -> None:
        """Keeps those of the lowest priorities."""
        chosen = np.sort(np.argsort(self.priorities)[: self.most])
        self.parts, self.priorities = [np.concatenate(self.parts)[chosen]], self.priorities[chosen]


def statistics_of(
    pools: Iterable[Float[np.ndarray, "n d"]], *, features: str, features_hash: str, data: str, keep: int = KEPT
) -> Statistics:
    """The statistics of feature vectors that come in parts; at most `keep` of the vectors stay with them.

    Raises:
        ValueError: for fewer than two vectors.
    """
    moments, kept = Moments(), _RandomPart(keep)
    for pool in pools:
        moments.add(pool)
        kept.add(pool)
    if moments.n < 2:
        raise ValueError(f"{data}: {moments.n} feature vectors, but a covariance needs at least 2")
    return Statistics(*moments.mean_and_covariance(), moments.n, features, features_hash, data, kept.vectors())


def measured_statistics(extractor: FeatureExtractor, data: str, batches: Iterable[Images]) -> Statistics:
    """The statistics of images that come in batches; of their features only `KEPT` are held at a time."""
    pools = (extractor(images).pool for images in batches)
    return statistics_of(pools, features=extractor.name, features_hash=extractor.hash, data=data)


def dataset_statistics(path: Path, extractor: FeatureExtractor, data: str, batches: Iterable[Images]) -> Statistics:
    """The statistics of a data set: read from `path` if they are of this extractor and `data`, else measured and saved.

    `data` must identify the images; `batches` is only read when they have to be measured. Where they cannot be saved
    that is warned of: what was measured is right all the same.

    Raises:
        OSError: if the hosts do not share the folder.
    """
    stored = stored_statistics(path, extractor, data)
    if parallel.agree(stored is not None):
        if stored is None:
            raise OSError(f"{path} is there on the first host but not on this one; all need the same folder")
        return stored
    statistics = measured_statistics(extractor, data, batches)
    try:
        save_statistics(path, statistics)
    except OSError as error:
        logging.warning("the statistics of %s are not kept, but measured again every time: %s", data, error)
    return statistics


def stored_statistics(path: Path, extractor: FeatureExtractor, data: str) -> Statistics | None:
    """What is at `path`, if it can be read and is of this extractor and `data`."""
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
    """Writes an .npz file, on the first host, whose `mu` and `sigma` other implementations of FID read, too."""
    fields = {f.name: getattr(statistics, f.name) for f in dataclasses.fields(statistics)}
    if jax.process_index() == 0:
        write_npz(path, **{name: value for name, value in fields.items() if value is not None})


def load_statistics(path: Path, *, features: str = "inception") -> Statistics:
    """Reads our own files and the published ones, which hold `pool_3` (all features) or `mu` and `sigma`.

    Args:
        features: the extractor's name, for files that do not say.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, holds neither, or what it holds is of impossible shapes or not finite.
    """
    arrays = read_npz(path)
    name, digest = str(arrays.get("features", features)), str(arrays.get("features_hash", ""))
    data = str(arrays.get("data", path.name))
    if "pool_3" in arrays:
        pool = arrays["pool_3"].reshape(len(arrays["pool_3"]), -1)  # some files keep the 1 x 1 spatial axes
        statistics = statistics_of([pool], features=name, features_hash=digest, data=data)
    elif {"mu", "sigma"} <= arrays.keys():
        n = int(arrays["n"]) if "n" in arrays else None
        statistics = Statistics(arrays["mu"], arrays["sigma"], n, name, digest, data, arrays.get("pool"))
    else:
        raise ValueError(f"{path} holds {', '.join(arrays) or 'nothing'}, but neither pool_3 nor mu and sigma")
    mu, sigma = statistics.mu, statistics.sigma
    if sigma.shape != mu.shape * 2 or mu.ndim != 1 or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(
            f"{path}: mu of shape {mu.shape} and sigma of {sigma.shape} must be [d] and [d, d], and finite"
        )
    return statistics


def check_statistics(statistics: Statistics, extractor: FeatureExtractor) -> None:
    """Raises ValueError if the statistics are of another extractor; of published files only the size can tell."""
    unknown = statistics.features_hash == ""
    if statistics.features != extractor.name or not (unknown or statistics.features_hash == extractor.hash):
        raise ValueError(
            f"statistics of {statistics.data} are those of features {statistics.features} {statistics.features_hash}, "
            f"but the samples are measured by {extractor.name} {extractor.hash}"
        )
    if len(statistics.mu) != extractor.num_features:
        raise ValueError(
            f"statistics of {statistics.data} are those of {len(statistics.mu)} features, but {extractor.name} has "
            f"{extractor.num_features}"
        )
