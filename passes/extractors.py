"""What samples are compared by, and with: the feature extractor and the statistics that a configuration names."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import datasets
from configs.default import Config
from datasets import Source
from evaluation import Statistics, dataset_statistics, evaluate_samples
from features import FeatureExtractor, Images, LabelledImages, extract_features, trained_classifier


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
        return evaluate_samples(extract_features(self.extractor, [images]), self.extractor, self.statistics)


def comparison_from_config(config: Config) -> Comparison:
    """The comparison that `eval` asks for.

    Raises:
        ValueError: for an unknown network, or a classifier where the data have no labels.
    """
    extractor = extractor_from_config(config)
    return Comparison(extractor, functools.partial(training_statistics, config, extractor))


def training_statistics(config: Config, extractor: FeatureExtractor) -> Statistics:
    """Those of the training images, kept at `eval.statistics_dir`."""
    source = datasets.source_from_config(config, "train")
    path = Path(config.eval.statistics_dir) / f"{config.data.dataset}_{extractor.name}_{extractor.hash}.npz"
    return dataset_statistics(path, extractor, source.description, [source.images(np.arange(len(source)))])


def extractor_from_config(config: Config) -> FeatureExtractor:
    """The network that `eval.features` names.

    Raises:
        ValueError: for an unknown name, or a classifier where the data have no labels.
    """
    if config.eval.features not in EXTRACTORS:
        raise ValueError(f"eval.features is {config.eval.features!r}; known are {', '.join(EXTRACTORS)}")
    return EXTRACTORS[config.eval.features](config)


def _classifier(config: Config) -> FeatureExtractor:
    train, test = (_labelled(datasets.source_from_config(config, split)) for split in datasets.SPLITS)
    return trained_classifier(train, test, levels=config.data.levels, cache_dir=Path(config.eval.statistics_dir))


def _labelled(source: Source) -> LabelledImages:
    labels = getattr(source, "labels", None)
    if labels is None:
        raise ValueError(f"eval.features is 'classifier', but {source.description} has no class labels")
    return LabelledImages(source.images(np.arange(len(source))), labels)


EXTRACTORS: dict[str, Callable[[Config], FeatureExtractor]] = {"classifier": _classifier}
"""Builds a feature extractor, from a configuration."""
