"""Bits/dim of the ODE over a data set."""

import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import datasets
import parallel
from arrays import Batch
from build import EVAL_KEY, Run
from datasets import Preprocess, Source, evaluation_batch, evaluation_batch_sizes
from evaluation import mean_estimate
from likelihood import BitsPerDim, Probes, Reference, bits_per_dim, draw_probes, ode_log_likelihood
from models.score import Params
from passes.keep import Keep, Values
from records import progress
from sampling import image_keys


def bits_per_dim_pass(run: Run, params: Params, folder: Path) -> dict[str, Any]:
    """Bits/dim of the ODE over the images of `eval.bpd_dataset`, `eval.num_repeats` times.

    Returns:
        mean, standard error and 95 % interval over images (of each, the mean of its repeats), the mean of each repeat,
        the terms, and how all of it was computed.

    Raises:
        RuntimeError: if a solve fails, naming the time and the image.
    """
    settings = run.config.eval
    source = datasets.source_from_config(run.config, settings.bpd_dataset)
    described = {"data": source.description, "dequantization": "uniform", "seed": run.config.seed} | _solver(run)
    keep = Keep(folder, "bpd", described | {"batch_size": settings.batch_size}, params)
    solve = functools.partial(_bits_per_dim_batch, run, params, source, _data_reference(run))
    sizes = evaluation_batch_sizes(source, settings.batch_size, settings.max_examples)
    repeats: list[list[Values]] = []
    with progress(settings.num_repeats * sum(sizes), "bits/dim", "image") as bar:
        for repeat in range(settings.num_repeats):
            repeats.append([])
            for number, size in enumerate(sizes):
                batch = keep(f"repeat{repeat}_batch{number}", functools.partial(solve, repeat, number, size))
                repeats[-1].append(batch)
                bar.update(size)
    return _bits_per_dim_summary(repeats) | described | {"values": keep.folder.name}


def _solver(run: Run) -> dict[str, Any]:
    """The likelihood's settings, as they are recorded."""
    settings = run.config.eval
    recorded = {
        "solver": settings.ode_solver,
        "t_min": run.config.training.smallest_time,
        "probe": settings.probe,
        "num_probes": settings.num_probes,
    }
    if settings.ode_solver.startswith(("rk4", "adams")):
        return recorded | {"steps": settings.ode_steps}
    return recorded | {"rtol": settings.rtol, "atol": settings.atol}


def _data_reference(run: Run) -> Reference:
    """Mean and standard deviation of each pixel of, at most 10,000, dequantized training images."""
    source = datasets.source_from_config(run.config, "train")
    preprocess = datasets.preprocess_from_config(run.config, train=False)
    images = source.images(np.arange(min(len(source), 10_000)))
    x = np.asarray(preprocess(jax.random.key(0), jnp.asarray(images)), np.float64)
    return Reference(mean=x.mean(0).astype(np.float32), std=x.std(0).astype(np.float32))


def _bits_per_dim_batch(
    run: Run, params: Params, source: Source, reference: Reference, repeat: int, number: int, size: int
) -> Values:
    """Bits/dim and its terms for the images of one batch, with what the solve took."""
    started = time.monotonic()
    settings = run.config.eval
    batch = evaluation_batch(source, settings.batch_size, number, settings.max_examples)
    rows = parallel.local_rows(settings.batch_size)
    images = parallel.global_array(run.mesh, batch.images[rows])
    keys = image_keys(
        jax.random.fold_in(run.key(EVAL_KEY), repeat), parallel.global_array(run.mesh, batch.indices[rows])
    )
    preprocess = datasets.preprocess_from_config(run.config, train=False)
    x, probes = _data_and_probes(keys, images, preprocess, settings.probe, settings.num_probes)
    result = ode_log_likelihood(
        run.score_fn(params),
        run.sde,
        x,
        probes,
        t_min=run.config.training.smallest_time,
        method=settings.ode_solver,
        reference=reference,
        rtol=settings.rtol,
        atol=settings.atol,
        num_steps=settings.ode_steps,
    )
    terms = bits_per_dim(result, levels=preprocess.levels, unit_scale=preprocess.unit_scale)
    values, info = parallel.fetch(({**terms._asdict(), "bpd": terms.total}, result.info))
    if not info.success:
        raise RuntimeError(
            f"the likelihood's solve broke down at t = {info.t:.6g}, at image {batch.indices[info.suspect]} of "
            f"{source.description}; its bits/dim are not to be had with eval.ode_solver={settings.ode_solver}"
        )
    cost = {"nfe": info.nfe, "seconds": time.monotonic() - started}
    return {name: value[:size] for name, value in values.items()} | {k: np.asarray(v) for k, v in cost.items()}


@functools.partial(jax.jit, static_argnames=("preprocess", "probe", "num_probes"))
def _data_and_probes(
    keys: Array, images: Array, preprocess: Preprocess, probe: str, num_probes: int
) -> tuple[Batch, Probes | None]:
    """Each image dequantized, and its probes, by its own key."""
    data_keys, probe_keys = (jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, n) for n in range(2))
    x = jax.vmap(lambda key, image: preprocess(key, image[None])[0])(data_keys, images)
    draw = functools.partial(draw_probes, kind=probe, shape=x.shape[1:], num_probes=num_probes)
    return x, jax.vmap(draw, out_axes=1)(probe_keys)


def _bits_per_dim_summary(repeats: list[list[Values]]) -> dict[str, Any]:
    def per_image(name: str) -> np.ndarray:
        return np.array([np.concatenate([batch[name] for batch in batches]) for batches in repeats])

    total = mean_estimate(per_image("bpd"))
    every = [batch for batches in repeats for batch in batches]
    return {
        "mean": total.mean,
        "se": total.se,
        "ci95": total.ci95,
        "n": total.n,
        "repeats": len(repeats),
        "mean_of_repeat": [float(np.mean(row)) for row in per_image("bpd")],
        "terms": {name: mean_estimate(per_image(name)).mean for name in BitsPerDim._fields},
        "nfe": float(np.mean([batch["nfe"] for batch in every])),
        "seconds": float(np.sum([batch["seconds"] for batch in every])),
    }
