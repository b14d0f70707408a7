"""Passes over a data set with one set of parameters: test loss, bits/dim, samples.

A pass counts every image once. What it works out is kept batch by batch in a folder named after everything the numbers
depend on, parameters included; so an interrupted pass goes on where it was and never mixes two settings. The random
numbers of an image follow from the seed, the repeat and the image's index, not from its batch.
"""

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

import datasets
import parallel
from arrays import Batch
from build import EVAL_KEY, SAMPLE_KEY, Run
from datasets import Preprocess, Source, evaluation_batch, evaluation_batch_sizes
from evaluation import dataset_statistics, evaluate_samples, mean_estimate
from features import FeatureExtractor, Images, LabelledImages, extract_features, trained_classifier
from files import write_atomic, write_npz
from likelihood import BitsPerDim, Probes, Reference, bits_per_dim, draw_probes, ode_log_likelihood
from losses import draw_noise, score_matching_losses
from models.score import Params
from records import progress
from sampling import image_keys, sampler_from_config

Values = dict[str, np.ndarray]
"""Named numbers for each image of a batch."""


class LossPass:
    """The training objective, without dropout, on images not trained on."""

    def __init__(self, run: Run, source: Source):
        self.run, self.source = run, source
        self.batch_size = run.config.training.batch_size
        self.num_batches = len(evaluation_batch_sizes(source, self.batch_size))
        self.preprocess = dataclasses.replace(run.trainer.preprocess, random_flip=False)
        self._losses = jax.jit(self._per_example)

    def some(self, params: Params) -> dict[str, float]:
        """Means over the first `training.eval_batches` batches; always of the same images and noise, to be compared."""
        means = self._means(params, min(self.run.config.training.eval_batches, self.num_batches))
        return {name: mean["mean"] for name, mean in means.items()}

    def whole(self, params: Params) -> dict[str, Any]:
        """Means over all of the images, with standard errors."""
        return self._means(params, self.num_batches)

    def _means(self, params: Params, num_batches: int) -> dict[str, dict[str, float]]:
        key = self.run.key(EVAL_KEY)
        parts = [self._values(params, number, jax.random.fold_in(key, number)) for number in range(num_batches)]
        names = parts[0][0]
        return {name: mean_estimate(np.concatenate([v[name][c] for v, c in parts]))._asdict() for name in names}

    def _values(self, params: Params, number: int, key: Array) -> tuple[Values, np.ndarray]:
        batch = evaluation_batch(self.source, self.batch_size, number)
        images = parallel.global_array(self.run.mesh, batch.images[parallel.local_rows(self.batch_size)])
        return parallel.fetch(self._losses(params, images, key)), batch.counts

    def _per_example(self, params: Params, images: Array, key: Array) -> dict[str, Array]:
        data_key, noise_key = jax.random.split(key)
        x0 = self.preprocess(data_key, images)
        noise = draw_noise(noise_key, self.run.sde, self.run.trainer.objective, x0.shape)
        losses = score_matching_losses(self.run.score_fn(params), self.run.sde, self.run.trainer.objective, x0, noise)
        return losses.named()


class Keep:
    """The batches of a pass on disk: worked out once for the same settings and parameters, read back after that."""

    def __init__(self, folder: Path, what: str, settings: Mapping[str, Any], params: Params):
        self.settings = {**settings, "parameters": params_digest(params)}
        text = json.dumps(self.settings, sort_keys=True, indent=1)
        self.folder = folder / f"{what}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        if jax.process_index() == 0:
            write_atomic(self.folder / "settings.json", text)

    def __call__(self, name: str, compute: Callable[[], Values]) -> Values:
        path = self.folder / f"{name}.npz"
        if parallel.agree(path.exists()):
            with np.load(path) as stored:
                return dict(stored)
        values = compute()
        if jax.process_index() == 0:
            write_npz(path, **values)
        return values


def params_digest(params: Params) -> str:
    """The first digits of the SHA-256 of the parameters, to tell one set of them from another."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(parallel.fetch(params)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:12]


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
