"""Evaluator of samples: draws images, and compares them with real images.

Samples are drawn in rounds of `sampling.batch_size`. A finished round is never drawn again, so an interrupted
evaluation resumes with the next one, on any number of devices. The noise of image k depends only on the seed and k. So
device counts and interruptions change at most the last bits. The batch size is one of the settings of the cache, so
another batch size draws all rounds again. The reason is that two samplers couple the images of a batch: Langevin
correctors average norms over the batch, and the adaptive ODE solver chooses its steps for the whole batch.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Bool, UInt8

import datasets
from arrays import Batch, ReportProgress
from build import SAMPLE_KEY, Run
from datasets import Preprocess
from evaluators.cache import BatchCache, draw_in_rounds
from evaluators.control_inputs import require_images
from evaluators.fid import Comparison
from infra import parallel
from infra.workdir import PER_GRID, EvaluationFolder
from models.score import Params
from samplers.sampler import Sampler


class SamplesEvaluator:
    """Draws `eval.num_samples` images and compares them with real images: FID, IS and KID.

    Raises:
        ValueError: from the constructor, for fields that are not allowed.
    """

    name = "samples"

    def __init__(self, run: Run, comparison: Comparison):
        parallel.divisible(run.config.sampling.batch_size, "sampling.batch_size")
        run.sampler()  # This raises ValueError for a field that is not allowed.
        self.run, self.comparison = run, comparison

    def __call__(self, params: Params, folder: EvaluationFolder) -> dict[str, Any]:
        """Draws the images and writes them to samples/.

        Returns:
            FID, IS, KID and the settings.

        Raises:
            RuntimeError: if a sample is not finite, or the solve of the ODE sampler fails.
        """
        run, config = self.run, self.run.config
        for concern in run.sampler().concerns(discrete=run.model.levels is not None):
            logging.warning("%s", concern)
        self.comparison.prepare()  # Errors in the real images are reported before any sample is drawn.
        rounding = require_images(run, "eval").description["rounding"]
        described = run.sample_settings() | {"rounding": rounding}
        cache = BatchCache(folder.path, "samples", described | {"network": run.evaluated_network()}, params)
        count, size = config.eval.num_samples, config.sampling.batch_size
        drawn = draw_in_rounds(cache, "sample", count, size, functools.partial(draw_images, run, params))
        cost = {"sampler": config.sampling.method, "nfe": drawn.nfe, "seconds": drawn.seconds}
        cost |= {"images_per_second": drawn.per_second}
        result = self.comparison(drawn.samples) | cost | described | cache.origin()
        if jax.process_index() == 0:
            source, levels = datasets.source_from_config(config, "test"), config.data.levels
            real = source.images(np.arange(min(PER_GRID, len(source))))
            folder.workdir.write_samples(drawn.samples, real, folder.artefact_label, levels, folder.step)
        return result


def draw_images(
    run: Run,
    params: Params,
    numbers: np.ndarray,
    show: ReportProgress | None = None,
    sampler: Sampler | None = None,
) -> tuple[UInt8[np.ndarray, "batch height width channel"], int]:
    """Draws the images with these numbers together, as integer levels.

    Args:
        numbers: their count must be divisible by the number of devices.
        show: called between the compiled calls of the sampler.
        sampler: None: the configured one.

    Returns:
        The images, on every host, and the network evaluations for each.

    Raises:
        RuntimeError: if an image is not finite, or the solve of the ODE sampler fails.
    """
    local = numbers[parallel.local_rows(len(numbers))]
    configured = sampler is None
    sampler = sampler or run.sampler()
    samples = sampler(
        run.score_fn(params), run.key(SAMPLE_KEY), parallel.global_array(run.mesh, local), run.data_shape, show
    )
    images, finite = parallel.fetch(_levels(run.preprocess, samples.x))
    if not finite.all():
        chosen = f"sampling.method={run.config.sampling.method}" if configured else "the sampler of snapshots"
        raise RuntimeError(
            f"Sample {numbers[np.argmin(finite)]} is not finite ({np.sum(~finite)} of {len(numbers)} are not). The "
            f"model diverged, or {chosen} diverges; try other settings of sampling, with Langevin dynamics a smaller "
            "sampling.step_size"
        )
    return np.asarray(images), samples.nfe


@functools.partial(jax.jit, static_argnums=0)
def _levels(preprocess: Preprocess, x: Batch) -> tuple[Array, Bool[Array, " batch"]]:
    """Converts to integer levels, and checks before the conversion whether each image is finite."""
    return preprocess.to_levels(x), jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))
