"""Samples, and how they compare with the training images."""

import functools
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import datasets
import parallel
from build import SAMPLE_KEY, Run
from evaluation import dataset_statistics, evaluate_samples
from features import FeatureExtractor, Images, LabelledImages, extract_features, trained_classifier
from models.score import Params
from passes.keep import Keep, Values
from records import progress
from sampling import sampler_from_config


def sampling_pass(run: Run, params: Params, folder: Path) -> tuple[dict[str, Any], Images]:
    """Draws `eval.num_samples` images and compares them with the training images.

    Returns:
        FID, IS, KID and how they were computed; and the images, as integer levels.

    Raises:
        ValueError: for features that cannot be had, before anything is drawn.
    """
    extractor = extractor_from_config(run)
    settings = run.config.eval
    train_source = datasets.source_from_config(run.config, "train")
    statistics = dataset_statistics(
        Path(settings.statistics_dir) / f"{run.config.data.dataset}_{extractor.name}_{extractor.hash}.npz",
        extractor,
        train_source.description,
        [train_source.images(np.arange(len(train_source)))],
    )
    described = {"sampling": run.config.sampling.to_dict(), "num_scales": run.config.model.num_scales}
    keep = Keep(folder, "samples", described | {"seed": run.config.seed}, params)
    batch_size = run.config.sampling.batch_size
    rounds = -(-settings.num_samples // batch_size)
    batches: list[Values] = []
    with progress(settings.num_samples, "sampling", "image") as bar:
        for number in range(rounds):
            batches.append(keep(f"round{number}", functools.partial(_sample_batch, run, params, number, bar)))
            bar.update(min((number + 1) * batch_size, settings.num_samples) - bar.n)
    images = np.concatenate([batch["samples"] for batch in batches])[: settings.num_samples]
    result = evaluate_samples(extract_features(extractor, [images]), extractor, statistics)
    cost = {
        "sampler": run.config.sampling.method,
        "nfe": int(batches[0]["nfe"]),
        "seconds": float(np.sum([batch["seconds"] for batch in batches])),
    }
    return result | cost | described | {"values": keep.folder.name}, images


def _sample_batch(run: Run, params: Params, number: int, bar: tqdm) -> Values:
    """The images of one round, as integer levels."""
    started = time.monotonic()
    size = run.config.sampling.batch_size
    indices = np.arange(number * size, (number + 1) * size)[parallel.local_rows(size)]
    samples = sampler_from_config(run.config, run.sde)(
        run.score_fn(params),
        run.key(SAMPLE_KEY),
        parallel.global_array(run.mesh, indices),
        run.image_shape,
        lambda step, steps: bar.set_postfix(step=f"{step}/{steps}"),
    )
    levels = np.asarray(parallel.fetch(run.trainer.preprocess.to_levels(samples.x)))
    return {"samples": levels, "nfe": np.asarray(samples.nfe), "seconds": np.asarray(time.monotonic() - started)}


def extractor_from_config(run: Run) -> FeatureExtractor:
    """The network that `eval.features` names.

    Raises:
        ValueError: for an unknown name, or a classifier where the data have no labels.
    """
    config = run.config
    if config.eval.features != "classifier":
        raise ValueError(f"eval.features is {config.eval.features!r}; known is classifier")
    splits = []
    for split in datasets.SPLITS:
        source = datasets.source_from_config(config, split)
        labels = getattr(source, "labels", None)
        if labels is None:
            raise ValueError(f"eval.features is 'classifier', but {source.description} has no class labels")
        splits.append(LabelledImages(source.images(np.arange(len(source))), labels))
    return trained_classifier(*splits, levels=config.data.levels, cache_dir=Path(config.eval.statistics_dir))
