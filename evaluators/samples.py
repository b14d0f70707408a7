"""Samples, and how they compare with real images.

They are drawn in rounds of `sampling.batch_size`, and a round that is done is never drawn again: an interrupted pass
goes on with the next one, on any number of devices. Image k follows from the seed and k, so that device counts and
interruptions change nothing but, at most, the last bits. The batch size is among the settings that rounds are kept
under. Where it changes all rounds are drawn again, because two samplers couple the images of a batch: Langevin
correctors average norms over it, and the adaptive ODE solver chooses its steps for all of it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Bool, UInt8

import datasets
from arrays import Batch
from build import SAMPLE_KEY, Run
from datasets import Preprocess
from evaluators.cache import BatchCache
from evaluators.fid import Comparison
from evaluators.rounds import draw_in_rounds
from infra import parallel
from infra.workdir import PER_GRID, EvaluationFolder
from models.score import Params
from sampling import Progress


class SamplesEvaluator:
    """Draws `eval.num_samples` images and compares them with real images: FID, IS and KID.

    Raises:
        ValueError: from the constructor, for fields that are not allowed.
    """

    name = "samples"

    def __init__(self, run: Run, comparison: Comparison):
        parallel.divisible(run.config.sampling.batch_size, "sampling.batch_size")
        run.sampler()  # raises ValueError for a field that is not allowed
        self.run, self.comparison = run, comparison

    def __call__(self, params: Params, folder: EvaluationFolder) -> dict[str, Any]:
        """Draws the images and writes them to samples/.

        Returns:
            FID, IS, KID and how they were computed.

        Raises:
            RuntimeError: if a sample is not finite, or the ODE sampler's solve fails.
        """
        run, config = self.run, self.run.config
        _warn_of_odes(run)
        self.comparison.prepare()  # whatever can fail with the real images fails before anything is drawn
        described = {
            "sampling": config.sampling.to_dict(),
            "num_scales": config.model.num_scales,
            "seed": config.seed,
            "rounding": "down" if config.data.uniform_dequantization else "nearest",
        }
        keep = BatchCache(folder.path, "samples", described | {"network": run.network_description()}, params)
        wanted, size = config.eval.num_samples, config.sampling.batch_size
        drawn = draw_in_rounds(keep, "sample", wanted, size, functools.partial(draw_images, run, params))
        cost = {"sampler": config.sampling.method, "nfe": drawn.nfe, "seconds": drawn.seconds}
        result = self.comparison(drawn.samples) | cost | described | {"values": keep.folder.name}
        if jax.process_index() == 0:
            source, levels = datasets.source_from_config(config, "test"), config.data.levels
            real = source.images(np.arange(min(PER_GRID, len(source))))
            folder.workdir.write_samples(drawn.samples, real, folder.artefact_label, levels, folder.step)
        return result


def _warn_of_odes(run: Run) -> None:
    sampling = run.config.sampling
    follows_ode = {
        "pc": sampling.probability_flow and sampling.corrector == "none",
        "ode": True,
        "dpm_solver": sampling.eta == 0,
        "heun": True,
    }[sampling.method]
    if follows_ode and run.sde.variance_exploding:
        logging.warning(
            "the ODE of a VE model keeps every error of the score at large noise, and its samples are often poor; "
            "--config.sampling.method=dpm_solver --config.sampling.eta=1 follows the SDE"
        )


def draw_images(
    run: Run, params: Params, numbers: np.ndarray, show: Progress | None = None
) -> tuple[UInt8[np.ndarray, "batch height width channel"], int]:
    """The images with these numbers as integer levels, drawn together by the configured sampler.

    Args:
        numbers: as many as the devices divide.
        show: called between the compiled calls of a long sampler with the steps done and the steps in all.

    Returns:
        The images, on every host, and the network evaluations each took.

    Raises:
        RuntimeError: if an image is not finite, naming it, or the ODE sampler's solve breaks down.
    """
    local = numbers[parallel.local_rows(len(numbers))]
    samples = run.sampler()(
        run.score_fn(params), run.key(SAMPLE_KEY), parallel.global_array(run.mesh, local), run.data_shape, show
    )
    images, finite = parallel.fetch(_levels(run.preprocess, samples.x))
    if not finite.all():
        raise RuntimeError(
            f"sample {numbers[np.argmin(finite)]} is not finite ({np.sum(~finite)} of {len(numbers)} are not); the "
            f"model diverged, or sampling.method={run.config.sampling.method} does with these settings"
        )
    return np.asarray(images), samples.nfe


@functools.partial(jax.jit, static_argnums=0)
def _levels(preprocess: Preprocess, x: Batch) -> tuple[Array, Bool[Array, " batch"]]:
    """Integer levels, and whether each image is finite: levels do not tell."""
    return preprocess.to_levels(x), jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))
