"""What samples are compared by, and with: the feature extractor and the statistics that a configuration names."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

import datasets
from configs.default import Config
from datasets import MemorySource, Source
from evaluation import frechet_distance, inception_score, kernel_distance
from evaluators.features import (
    FeatureExtractor,
    Features,
    Images,
    LabelledImages,
    extract_features,
    inception_features,
    trained_classifier,
)
from evaluators.statistics import Moments, Statistics, check_statistics, dataset_statistics, load_statistics
from infra.console import progress
from sources.densities import DENSITIES

PUBLISHED_SAMPLES = 50_000
"""Samples behind published FIDs. FID falls with n, so numbers of fewer samples compare only with each other."""


_BATCH = 1024  # images read at a time


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How samples are compared with real images: the network that measures both, and the real ones' statistics."""

    extractor: FeatureExtractor
    find_statistics: Callable[[], Statistics]

    @functools.cached_property
    def statistics(self) -> Statistics:
        return self.find_statistics()

    def prepare(self) -> None:
        """Measures the real images now, unless that is done; so what can fail with them fails before the work."""
        _ = self.statistics

    def __call__(self, images: Images) -> dict[str, Any]:
        """FID, IS and KID of samples, integer levels of `data.levels`, and what the numbers rest on."""
        batches = all_images(MemorySource(images, "samples"), self.extractor)
        return evaluate_samples(extract_features(self.extractor, batches), self.extractor, self.statistics)


def comparison_from_config(config: Config) -> Comparison:
    """The comparison that `eval` asks for, with everything checked; images are measured when they are needed.

    Raises:
        FileNotFoundError: if the weights of Inception, the images, or the statistics are not there.
        ValueError: for fields that are not allowed, a classifier where the data have no labels, or statistics of
            another network.
    """
    if config.eval.num_samples < 2:
        raise ValueError(f"eval.num_samples is {config.eval.num_samples}; FID needs at least 2")
    split, extractor = compared_split(config), extractor_from_config(config)
    published = published_statistics(config, extractor)
    if published is not None:
        return Comparison(extractor, lambda: published)
    source = datasets.source_from_config(config, split)
    path = statistics_path(config, extractor)
    return Comparison(
        extractor, lambda: dataset_statistics(path, extractor, source.description, all_images(source, extractor))
    )


def compared_split(config: Config) -> str:
    """The split that samples are compared with."""
    split = config.eval.statistics_split
    if split not in datasets.SPLITS:
        raise ValueError(f"eval.statistics_split is {split!r}; it must be {' or '.join(datasets.SPLITS)}")
    return split


def published_statistics(config: Config, extractor: FeatureExtractor) -> Statistics | None:
    """Those in the file `eval.statistics`, if it names one."""
    if not config.eval.statistics:
        return None
    path = Path(config.eval.statistics)
    if not path.is_file():
        raise FileNotFoundError(f"eval.statistics is {str(path)!r}, which is no file; empty: statistics of the data")
    statistics = load_statistics(path)
    check_statistics(statistics, extractor)
    if not statistics.features_hash:
        logging.warning("%s does not say what it was measured by, taken to be %s", path, extractor.name)
    return statistics


def statistics_path(config: Config, extractor: FeatureExtractor) -> Path:
    """Where statistics of the data are kept."""
    data = f"{config.data.dataset}{config.data.image_size}_{compared_split(config)}"
    return Path(config.eval.statistics_dir) / f"{data}_{extractor.name}_{extractor.hash}.npz"


def all_images(source: Source, extractor: FeatureExtractor) -> Iterator[Images]:
    """The images of a source in batches, as `extractor` takes them, with a progress bar."""
    with progress(len(source), f"{extractor.name} of {source.description}", "image") as bar:
        for start in range(0, len(source), _BATCH):
            images = source.images(np.arange(start, min(start + _BATCH, len(source))))
            yield images
            bar.update(len(images))


def extractor_from_config(config: Config) -> FeatureExtractor:
    """The network that `eval.features` names.

    Raises:
        FileNotFoundError: if the weights of Inception are not there, saying how to get them.
        ValueError: for points, an unknown name, damaged weights, or a classifier where the data have no labels.
    """
    if config.data.dataset in DENSITIES:
        raise ValueError(f"data.dataset is {config.data.dataset!r}, which has points; FID, IS and KID are of images")
    if config.eval.features not in EXTRACTORS:
        raise ValueError(f"eval.features is {config.eval.features!r}; known are {', '.join(EXTRACTORS)}")
    return EXTRACTORS[config.eval.features](config)


def _inception(config: Config) -> FeatureExtractor:
    path, centre = Path(config.eval.inception), config.eval.inception_centre
    if not path.is_file():
        raise FileNotFoundError(
            f"eval.inception is {str(path)!r}, which is no file: FID needs the weights of Inception, converted once by "
            "python -m tools.convert_inception PATH from weights-inception-2015-12-05-6726825d.pth; without them set "
            "eval.enable_sampling=False for bits/dim alone, or eval.features=classifier where the data have labels"
        )
    if config.data.num_channels not in (1, 3):
        raise ValueError(f"data.num_channels is {config.data.num_channels}; Inception measures images of 1 or 3")
    if centre not in (128.0, 127.5):
        raise ValueError(f"eval.inception_centre is {centre:g}; it must be 128 or 127.5")
    return inception_features(path, levels=config.data.levels, centre=centre)


def _classifier(config: Config) -> FeatureExtractor:
    train, test = (_labelled(datasets.source_from_config(config, split)) for split in datasets.SPLITS)
    return trained_classifier(train, test, levels=config.data.levels, cache_dir=Path(config.eval.statistics_dir))


def _labelled(source: Source) -> LabelledImages:
    labels = getattr(source, "labels", None)
    if labels is None:
        raise ValueError(f"eval.features is 'classifier', but {source.description} has no class labels")
    return LabelledImages(source.images(np.arange(len(source))), labels)


EXTRACTORS: dict[str, Callable[[Config], FeatureExtractor]] = {"inception": _inception, "classifier": _classifier}
"""Builds a feature extractor, from a configuration."""


def evaluate_samples(features: Features, extractor: FeatureExtractor, statistics: Statistics) -> dict[str, Any]:
    """FID, IS and KID of samples whose features `extractor` measured, with all that is needed to compare them.

    KID is left out where the statistics keep no features. Under 50,000 samples the result has a `warning`.

    Raises:
        ValueError: if the statistics are of another extractor, or there are fewer than two samples.
    """
    check_statistics(statistics, extractor)
    n = len(features.pool)
    if n < 2:
        raise ValueError(f"{n} samples, but FID needs at least 2")
    moments = Moments()
    moments.add(features.pool)
    splits = min(10, n)
    score = inception_score(features.logits, splits)
    result: dict[str, Any] = {
        "fid": frechet_distance(*moments.mean_and_covariance(), statistics.mu, statistics.sigma),
        "fid_features": extractor.name,
        "features_hash": extractor.hash,
        "is_mean": score.mean,
        "is_std": score.std,
        "is_splits": splits,
        "n": n,
        "statistics_data": statistics.data,
        "statistics_n": statistics.n,
        "statistics_hash": statistics.hash,
    }
    if statistics.pool is not None:
        kid = kernel_distance(features.pool, statistics.pool)
        result |= {"kid_mean": kid.mean, "kid_se": kid.se, "kid_subsets": kid.subsets}
    if n < PUBLISHED_SAMPLES:
        result["warning"] = f"FID and IS of {n} samples do not compare with those of {PUBLISHED_SAMPLES}, as published"
        logging.warning("%s", result["warning"])
    return result


def self_test(
    extractor: FeatureExtractor, statistics: Statistics, same: Statistics, other: Features
) -> dict[str, dict[str, Any]]:
    """Real images against the statistics of real images, to see what FIDs are worth.

    Args:
        same: measured now, of the images that `statistics` are of. Its FID must be near 0; is it not, then the
            statistics are of other images or another network, or were measured otherwise.
        other: features of images not among them. Its FID is the floor for samples: what as many images from the data's
            own distribution give. It falls with their number.

    Raises:
        ValueError: if the statistics are of another extractor.
    """
    check_statistics(statistics, extractor)
    fid = frechet_distance(same.mu, same.sigma, statistics.mu, statistics.sigma)
    return {"same": {"fid": fid, "n": same.n}, "other": evaluate_samples(other, extractor, statistics)}
