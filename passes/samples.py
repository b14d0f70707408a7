"""Samples, and how they compare with the training images."""

import functools
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import parallel
from build import SAMPLE_KEY, Run
from features import Images
from models.score import Params
from passes.extractors import Comparison
from passes.keep import Keep, Values
from records import progress
from sampling import sampler_from_config


def sampling_pass(run: Run, comparison: Comparison, params: Params, folder: Path) -> tuple[dict[str, Any], Images]:
    """Draws `eval.num_samples` images and compares them with real ones.

    Returns:
        FID, IS, KID and how they were computed; and the images, as integer levels.
    """
    settings = run.config.eval
    comparison.prepare()  # what can fail with the real images fails before anything is drawn
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
    result = comparison(images)
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
