"""Samples, and how they compare with real images.

They are drawn in rounds of `sampling.batch_size`, and a round that is done is never drawn again: an interrupted pass
goes on with the next one, on any number of devices. Image k follows from the seed and k, so that device counts and
interruptions change nothing but, at most, the last bits. The batch size is among the settings that rounds are kept
under. Where it changes all rounds are drawn again, because two samplers couple the images of a batch: Langevin
correctors average norms over it, and the adaptive ODE solver chooses its steps for all of it.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Bool, UInt8

import datasets
import parallel
from arrays import Batch
from build import SAMPLE_KEY, Run
from datasets import Preprocess
from features import Images
from figures import save_grid
from files import write_npz
from models.score import Params
from passes.extractors import Comparison
from passes.keep import Keep
from passes.rounds import draw_in_rounds
from sampling import Progress, sampler_from_config

SHOWN = 64
"""Images in a grid, at most."""

SHARD = 10_000
"""Images in a file, at most."""


def sampling_pass(run: Run, comparison: Comparison, params: Params, folder: Path) -> tuple[dict[str, Any], Images]:
    """Draws `eval.num_samples` images and compares them with real ones.

    Returns:
        FID, IS, KID and how they were computed; and the images, as integer levels.

    Raises:
        RuntimeError: if a sample is not finite, or the ODE sampler's solve breaks down.
    """
    _warn_of_odes(run)
    comparison.prepare()  # what can fail with the real images fails before anything is drawn
    described = {
        "sampling": run.config.sampling.to_dict(),
        "num_scales": run.config.model.num_scales,
        "seed": run.config.seed,
        "rounding": "down" if run.config.data.uniform_dequantization else "nearest",
    }
    keep = Keep(folder, "samples", described | {"network": run.network_description()}, params)
    wanted, size = run.config.eval.num_samples, run.config.sampling.batch_size
    drawn = draw_in_rounds(keep, "sample", wanted, size, functools.partial(draw_images, run, params))
    cost = {"sampler": run.config.sampling.method, "nfe": drawn.nfe, "seconds": drawn.seconds}
    return comparison(drawn.samples) | cost | described | {"values": keep.folder.name}, drawn.samples


def _warn_of_odes(run: Run) -> None:
    sampling = run.config.sampling
    follows_ode = {
        "pc": sampling.probability_flow and sampling.corrector == "none",
        "ode": True,
        "dpm_solver": sampling.eta == 0,
        "heun": True,
    }[sampling.method]
    if follows_ode and run.config.training.sde in ("vesde", "linearvesde"):
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
    sampler = sampler_from_config(run.config, run.sde)
    samples = sampler(
        run.score_fn(params), run.key(SAMPLE_KEY), parallel.global_array(run.mesh, local), run.data_shape, show
    )
    images, finite = parallel.fetch(_levels(run.trainer.preprocess, samples.x))
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


def write_samples(run: Run, images: Images, label: str, step: int, workdir: Path) -> None:
    """Samples for people and other programs, and as many real images to hold them against.

    samples/<label>.png, .npz     the first 64; data.npz: real ones
    samples/<label>/images_K.npz  all, at most 10,000 a file, K the number of its first: `samples`, integers from 0 to
                                  `levels` - 1 of shape [n, height, width, channels], and the training `step`
    samples/<label>/images_K.png  its first 64
    """
    if jax.process_index() != 0:
        return
    folder, levels = workdir / "samples", run.config.data.levels
    source = datasets.source_from_config(run.config, "test")
    write_npz(folder / "data.npz", samples=source.images(np.arange(min(SHOWN, len(source)))), levels=levels, step=0)
    write_npz(folder / f"{label}.npz", samples=images[:SHOWN], levels=levels, step=step)
    save_grid(folder / f"{label}.png", images[:SHOWN], levels)
    for path in (folder / label).glob("images_*"):  # of an earlier evaluation, which may have drawn more
        path.unlink()
    for first in range(0, len(images), SHARD):
        shard, name = images[first : first + SHARD], f"images_{first:06d}"
        write_npz(folder / label / f"{name}.npz", samples=shard, levels=levels, step=step)
        save_grid(folder / label / f"{name}.png", shard[:SHOWN], levels)
