"""FID, IS and KID of samples, and the statistics of real images that they are compared with."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

import datasets
from configs.checks import check_config
from configs.default import Config
from datasets import MemorySource, Source
from evaluation import frechet_distance, inception_score, kernel_distance
from evaluators.extractor import FeatureExtractor, Features, Images, extract_features
from evaluators.features import extractor_from_config
from evaluators.statistics import (
    Moments,
    Statistics,
    check_statistics,
    dataset_statistics,
    load_statistics,
    measured_statistics,
    save_statistics,
    stored_statistics,
)
from infra.console import progress
from infra.files import write_atomic

PUBLISHED_SAMPLES = 50_000
"""The number of samples of published FIDs.

FID falls with the number of samples, so FIDs of fewer samples are not comparable with published ones."""

_BATCH = 1024  # images read at a time


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Compares samples with real images, by a network that measures both and the statistics of the real images."""

    find_extractor: Callable[[], FeatureExtractor]
    find_statistics: Callable[[FeatureExtractor], Statistics]
    inception_splits: int = 1

    @functools.cached_property
    def extractor(self) -> FeatureExtractor:
        """The network that measures images. It is built, or trained, on first use."""
        return self.find_extractor()

    @functools.cached_property
    def statistics(self) -> Statistics:
        """The statistics of the real images. They are loaded, or measured, on first use."""
        return self.find_statistics(self.extractor)

    def prepare(self) -> None:
        """Builds the extractor, and measures the real images if necessary, before any sample is drawn."""
        _ = self.statistics

    def __call__(self, images: Images) -> dict[str, Any]:
        """Computes FID, IS and KID of samples, which are integer levels, with the settings they depend on."""
        batches = all_images(MemorySource(images, "samples"), self.extractor)
        features = extract_features(self.extractor, batches)
        return evaluate_samples(features, self.extractor, self.statistics, self.inception_splits)


def comparison_from_config(config: Config) -> Comparison:
    """Builds the comparison that `eval` describes, and checks all settings.

    It does not train a classifier or measure images yet. This happens on first use.

    Raises:
        FileNotFoundError: if the weights of Inception, the images, or the statistics are missing.
        ValueError: for fields that are not allowed, a classifier for data without labels, or statistics of another
            network.
    """
    if config.eval.num_samples < 2:
        raise ValueError(f"eval.num_samples is {config.eval.num_samples}; FID needs at least 2")
    if (splits := config.eval.inception_splits) < 1:
        raise ValueError(f"eval.inception_splits is {splits}; it must be at least 1")
    split, published = compared_split(config), published_statistics(config)
    find_extractor = extractor_from_config(config)
    if published is not None:
        comparison = Comparison(find_extractor, lambda extractor: _checked(published, extractor, config), splits)
        if config.eval.features == "inception":  # A classifier may need training first.
            comparison.prepare()
        return comparison
    source = datasets.source_from_config(config, split)

    def find_statistics(extractor: FeatureExtractor) -> Statistics:
        path = statistics_path(config, extractor)
        return dataset_statistics(path, extractor, source.description, all_images(source, extractor))

    return Comparison(find_extractor, find_statistics, splits)


def compared_split(config: Config) -> str:
    """The split that samples are compared with."""
    split = config.eval.statistics_split
    if split not in datasets.SPLITS:
        raise ValueError(f"eval.statistics_split is {split!r}; it must be {' or '.join(datasets.SPLITS)}")
    return split


def published_statistics(config: Config) -> Statistics | None:
    """Loads the statistics in the file `eval.statistics`. Returns None if the field is empty.

    Raises FileNotFoundError or ValueError if the file is missing or damaged.
    """
    if not config.eval.statistics:
        return None
    path = Path(config.eval.statistics)
    if not path.is_file():
        raise FileNotFoundError(
            f"eval.statistics is {str(path)!r}, but there is no such file; leave it empty to measure the data"
        )
    return load_statistics(path)


def _checked(statistics: Statistics, extractor: FeatureExtractor, config: Config) -> Statistics:
    """Returns the published statistics. Raises ValueError if another network measured them."""
    check_statistics(statistics, extractor)
    if not statistics.features_hash:
        name = extractor.name
        logging.warning("%s does not say which network measured it; assuming %s", config.eval.statistics, name)
    return statistics


def statistics_path(config: Config, extractor: FeatureExtractor) -> Path:
    """The file of the statistics of the data."""
    data = f"{config.data.dataset}{config.data.image_size}_{compared_split(config)}"
    return Path(config.eval.statistics_dir) / f"{data}_{extractor.name}_{extractor.hash}.npz"


def all_images(source: Source, extractor: FeatureExtractor) -> Iterator[Images]:
    """Yields the images of a source in batches, with a progress bar for their measurement by `extractor`."""
    with progress(len(source), f"{extractor.name} of {source.description}", "image") as bar:
        for start in range(0, len(source), _BATCH):
            images = source.images(np.arange(start, min(start + _BATCH, len(source))))
            yield images
            bar.update(len(images))


def evaluate_samples(
    features: Features, extractor: FeatureExtractor, statistics: Statistics, splits: int = 1
) -> dict[str, Any]:
    """Computes FID, IS and KID of samples from their features, with the settings needed to compare results.

    KID is left out if the statistics contain no features. Below 50,000 samples the result has a `warning`.

    Args:
        splits: parts of the samples that the Inception Score is averaged over; published: 1, all samples at once.

    Raises:
        ValueError: if the statistics are of another extractor, or there are fewer than two samples.
    """
    check_statistics(statistics, extractor)
    n = len(features.pool)
    if n < 2:
        raise ValueError(f"There are {n} samples, but FID needs at least 2")
    moments = Moments()
    moments.add(features.pool)
    splits = min(splits, n)
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
        result["warning"] = f"FID and IS of {n} samples are not comparable with published ones, of {PUBLISHED_SAMPLES}"
        logging.warning("%s", result["warning"])
    return result


def self_test(
    extractor: FeatureExtractor, statistics: Statistics, same: Statistics, other: Features
) -> dict[str, dict[str, Any]]:
    """Compares real images with the statistics of real images, to see how reliable FIDs are.

    Args:
        same: new statistics of the images that `statistics` describe. Their FID must be near 0. Otherwise `statistics`
            describe other images, or were measured by another network or in another way.
        other: features of other real images. Their FID is a floor for samples: the FID of as many images from the
            distribution of the data. It falls with their number.

    Raises:
        ValueError: if the statistics are of another extractor.
    """
    check_statistics(statistics, extractor)
    fid = frechet_distance(same.mu, same.sigma, statistics.mu, statistics.sigma)
    return {"same": {"fid": fid, "n": same.n}, "other": evaluate_samples(other, extractor, statistics)}


def stats(config: Config) -> None:
    """Measures the real images that samples are compared with, and prints the FIDs of real images for reference.

    Raises:
        FileNotFoundError, ValueError: if the data, the network or the statistics are missing, before any work.
    """
    check_config(config)
    print(json.dumps(prepare_statistics(config), indent=1))


def prepare_statistics(config: Config) -> dict[str, Any]:
    """Measures and tests the statistics that evaluation compares samples with, and writes them and the test.

    If `eval.statistics` names a file, its statistics are tested. Otherwise, the statistics of `eval.statistics_split`
    are tested, and first written if they are missing. The images of both splits are measured for the test.

    Returns:
        The file, its contents, and for each split the FID of its real images. The FID of the split that the statistics
        describe must be near 0. The other is the floor for as many samples.

    Raises:
        FileNotFoundError, ValueError: as `comparison_from_config`, before any image is measured.
    """
    split, published = compared_split(config), published_statistics(config)
    (other_split,) = set(datasets.SPLITS) - {split}
    find_extractor = extractor_from_config(config)
    source, other_source = (datasets.source_from_config(config, each) for each in (split, other_split))
    extractor = find_extractor()
    published = published and _checked(published, extractor, config)
    path = statistics_path(config, extractor)
    same = measured_statistics(extractor, source.description, all_images(source, extractor))
    statistics = published if published is not None else _stored_or_written(path, extractor, same)
    other = extract_features(extractor, all_images(other_source, extractor))
    test = self_test(extractor, statistics, same, other)
    result = {
        "statistics": config.eval.statistics or str(path),
        "data": statistics.data,
        "n": statistics.n,
        "hash": statistics.hash,
        "features": extractor.name,
        "features_hash": extractor.hash,
        "self_test": {
            split: test["same"] | {"data": same.data},
            other_split: test["other"] | {"data": other_source.description},
        },
    }
    if jax.process_index() == 0:
        write_atomic(_report_path(config, path), json.dumps(result, indent=1))
    return result


def _stored_or_written(path: Path, extractor: FeatureExtractor, measured: Statistics) -> Statistics:
    """The statistics of these images in the file at `path`, written if it is missing or differs."""
    stored = stored_statistics(path, extractor, measured.data)
    if stored is not None:
        return stored
    save_statistics(path, measured)
    return load_statistics(path) if jax.process_index() == 0 else measured


def _report_path(config: Config, path: Path) -> Path:
    """Returns the file of the test: next to our own statistics; for published ones, in the folder of our statistics."""
    if not config.eval.statistics:
        return path.with_suffix(".json")
    return path.with_name(f"{Path(config.eval.statistics).stem}_{path.stem}.json")
