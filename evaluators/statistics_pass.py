"""Statistics of real images, and the test of what FIDs against them are worth."""

import json
from pathlib import Path
from typing import Any

import jax

import datasets
from configs.default import Config
from evaluators.features import FeatureExtractor, extract_features
from evaluators.fid import (
    all_images,
    compared_split,
    extractor_from_config,
    published_statistics,
    self_test,
    statistics_path,
)
from evaluators.statistics import Statistics, load_statistics, measured_statistics, save_statistics, stored_statistics
from infra.files import write_atomic


def statistics_pass(config: Config) -> dict[str, Any]:
    """Measures the images of both splits, keeps the statistics of one, and tests them; the test is kept beside them.

    The statistics are those that evaluation compares samples with: of `eval.statistics_split`, written unless they are
    there, or in the file `eval.statistics`.

    Returns:
        The file, what it holds, and by split the FID of real images against it: of those it is of, which must be near 0
        (where the file was there before, they are measured anew), and of the others, the floor for as many samples.

    Raises:
        FileNotFoundError, ValueError: as `comparison_from_config`, before any image is measured.
    """
    extractor = extractor_from_config(config)
    split = compared_split(config)
    (other_split,) = set(datasets.SPLITS) - {split}
    published = published_statistics(config, extractor)
    source, other_source = (datasets.source_from_config(config, each) for each in (split, other_split))
    path = statistics_path(config, extractor)
    same = measured_statistics(extractor, source.description, all_images(source, extractor))
    statistics = published if published is not None else _kept(path, extractor, same)
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


def _kept(path: Path, extractor: FeatureExtractor, measured: Statistics) -> Statistics:
    """What is at `path` for these images, or, now written there, what was measured; as evaluation will read it."""
    stored = stored_statistics(path, extractor, measured.data)
    if stored is not None:
        return stored
    save_statistics(path, measured)
    return load_statistics(path) if jax.process_index() == 0 else measured


def _report_path(config: Config, path: Path) -> Path:
    """Beside our own statistics; of those of others, in the same folder, under both names."""
    if not config.eval.statistics:
        return path.with_suffix(".json")
    return path.with_name(f"{Path(config.eval.statistics).stem}_{path.stem}.json")
