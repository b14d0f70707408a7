"""Latent codes: images to x at t_max by the probability-flow ODE, and back ([S21a] Sec. 4.3).

They use the fields of the sampler `ode` (sampling.ode_solver, rtol, atol, smallest_time), for every sampling.method.
Codes and pictures are in latents/ and pictures/ of the workdir.
"""

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Float

from arrays import Batch, ReportProgress
from build import Run
from configs.usage import count_reads, unrecorded
from datasets import evaluation_batch, evaluation_batch_sizes
from evaluation import mean_estimate
from evaluators.cache import BatchCache, Values, mean_evaluations
from evaluators.control_inputs import (
    device_images,
    finite_levels,
    input_source,
    named_array,
    require_images_of_levels,
)
from evaluators.extractor import array_hash
from infra import parallel
from infra.checkpoints import params_digest
from infra.files import write_npz
from infra.workdir import PER_GRID, EvaluationFolder
from models.score import Params
from samplers.probability_flow import ode_from_config


class Codec:
    """Encodes and decodes images with a model.

    Raises:
        ValueError: from the constructor, for points, or for fields of `sampling` or `eval` that are not allowed.
    """

    def __init__(self, run: Run, mode: str):
        self.run, self.preprocess = run, require_images_of_levels(run, mode)
        parallel.divisible(run.config.eval.batch_size, "eval.batch_size")
        with unrecorded(run.config):  # A field of the sampler may have no effect on codes.
            self.sampler = ode_from_config(run.config, run.sde)
        count_reads(run.config.sampling, *_fields_of_codes(mode))
        self.batch_size: int = run.config.eval.batch_size

    @property
    def description(self) -> dict[str, Any]:
        """Returns the settings that codes depend on."""
        sampler = self.sampler
        settings = {"solver": sampler.method, "rtol": sampler.rtol, "atol": sampler.atol}
        return settings | {"t_min": sampler.smallest_time, "seed": self.run.config.seed}

    def settings(self) -> dict[str, Any]:
        """Returns all settings that the values of a batch depend on, except the parameters and the input."""
        network = {"network": self.run.evaluated_network(), "batch_size": self.batch_size}
        return self.description | self.preprocess.description | network

    def encode(self, params: Params, x: Batch, show: ReportProgress | None = None) -> tuple[Batch, int]:
        """Returns the latents of data x, and the number of network evaluations."""
        return self.sampler.encode(self.run.score_fn(params), x, show)

    def decode(self, params: Params, latents: Batch, show: ReportProgress | None = None) -> tuple[Batch, int]:
        """Returns the data of latents, and the number of network evaluations."""
        return self.sampler.decode(self.run.score_fn(params), latents, show)

    def decode_array(
        self, params: Params, latents: Float[np.ndarray, "n h w c"], show: ReportProgress | None
    ) -> Values:
        """Decodes at most one batch of latents, multiplied by sampling.temperature, to integer images on the host."""
        started, count = time.monotonic(), len(latents)
        (padded,) = parallel.pad_rows(self.batch_size, self.sampler.temperature * latents)
        rows = padded[parallel.local_rows(len(padded))].astype(np.float32)
        x, nfe = self.decode(params, parallel.global_array(self.run.mesh, rows), show)
        images = finite_levels(self.preprocess, x, "Cannot decode the latents")[:count]
        return {"images": images, "nfe": np.asarray(nfe), "seconds": np.asarray(time.monotonic() - started)}


def _fields_of_codes(mode: str) -> tuple[str, ...]:
    """The fields of `sampling` that have an effect in a mode. Only latents that are decoded have a temperature."""
    solver = ("ode_solver", "rtol", "atol", "smallest_time")
    return solver if mode == "encode" else (*solver, "temperature")


class EncodeEvaluator:
    """Encodes images, decodes the latents again, and reports the error of the reconstruction.

    Raises:
        ValueError, OSError: from the constructor, for settings or images that are not allowed, or missing files.
    """

    name = "latents"

    def __init__(self, run: Run):
        self.run, self.codec, self.source = run, Codec(run, "encode"), input_source(run)
        self.most: int = run.config.eval.max_examples
        self.sizes = evaluation_batch_sizes(self.source, self.codec.batch_size, self.most)

    def __call__(self, params: Params, folder: EvaluationFolder) -> dict[str, Any]:
        """Encodes batch by batch. An interrupted run resumes with the next batch.

        Returns:
            The mean over images of the root mean square difference between data and their reconstruction, in units of
            the range of the data; the largest difference; the share of pixels whose level changes; and the mean square
            of the latents relative to the prior's variance, which is 1 if they follow the prior.

        Raises:
            RuntimeError: if a solve fails or a value is not finite.
        """
        data = {"data": self.source.description, "max_examples": self.most}
        cache = BatchCache(folder.path, "latents", self.codec.settings() | data, params)
        sizes = {f"batch{number}": size for number, size in enumerate(self.sizes)}
        batches = cache.all(sizes, lambda number, show: self._batch(params, number, show), "encoding", "image")
        stored = {name: np.concatenate([batch[name] for batch in batches]) for name in PER_IMAGE}
        file = folder.workdir.latents / f"{folder.artefact_label}.npz"
        codes = {"latents": stored["latents"], "ids": np.arange(len(stored["latents"])), "step": folder.step}
        if jax.process_index() == 0:
            write_npz(file, **codes, parameters=params_digest(params), data=self.source.description)
            self._write_picture(stored["reconstructions"], folder)
        error = mean_estimate(stored["rms"])
        return {
            "reconstruction_error": error.mean,
            "se": error.se,
            "largest_error": float(stored["largest"].max()),
            "changed_levels": float(stored["changed"].mean()),
            "latent_variance": float(stored["latent_variance"].mean()),
            "n": error.n,
            "nfe": mean_evaluations(batches),
            "seconds": float(np.sum([batch["seconds"] for batch in batches])),
            "file": str(file.relative_to(folder.workdir.path)),
            "data": self.source.description,
            **self.codec.description,
            **cache.origin(),
        }

    def _batch(self, params: Params, number: int, show: ReportProgress) -> Values:
        started, codec, size = time.monotonic(), self.codec, self.sizes[number]
        batch = evaluation_batch(self.source, codec.batch_size, number, self.most)
        x = device_images(self.run, codec.preprocess, batch.images, batch.indices)
        latents, nfe = codec.encode(params, x, show)
        decoded, nfe_back = codec.decode(params, latents, show)
        levels = finite_levels(codec.preprocess, decoded, "Cannot encode the images")
        width = np.ptp(codec.preprocess.data_range)
        host_x, host_decoded, host_latents = (np.asarray(a, np.float32) for a in parallel.fetch((x, decoded, latents)))
        difference = (host_decoded - host_x).reshape(len(host_x), -1) / width
        flat = host_latents.reshape(len(host_x), -1) / self.run.sde.prior_sigma
        values = {
            "latents": host_latents,
            "reconstructions": levels,
            "rms": np.sqrt(np.mean(difference**2, axis=1)),
            "largest": np.abs(difference).max(axis=1),
            "changed": np.mean(levels != batch.images, axis=(1, 2, 3)),
            "latent_variance": np.mean(flat**2, axis=1),
        }
        cost = {"nfe": np.asarray(nfe + nfe_back), "seconds": np.asarray(time.monotonic() - started)}
        return {name: value[:size] for name, value in values.items()} | cost

    def _write_picture(self, reconstructions: np.ndarray, folder: EvaluationFolder) -> None:
        """Writes rows of images, each above a row of their reconstructions."""
        columns = min(len(reconstructions), 8)
        count = min(len(reconstructions), PER_GRID // 2) // columns * columns
        both = self.source.images(np.arange(count)), reconstructions[:count]
        pairs = np.stack([images.reshape(-1, columns, *images.shape[1:]) for images in both], axis=1)
        images = pairs.reshape(-1, *reconstructions.shape[1:])
        folder.write_picture("reconstructions", images, self.run.config.data.levels, columns)


PER_IMAGE = ("latents", "reconstructions", "rms", "largest", "changed", "latent_variance")
"""The values that `EncodeEvaluator` stores for each image."""


class DecodeEvaluator:
    """Decodes the latents in `control.latents`, by default those that --mode=encode wrote for the same checkpoint.

    Raises:
        ValueError, OSError: from the constructor, for settings that are not allowed, or a file that cannot be read.
    """

    name = "decoded"

    def __init__(self, run: Run):
        self.run, self.codec = run, Codec(run, "decode")
        self.given = self._read(Path(run.config.control.latents)) if run.config.control.latents else None

    def __call__(self, params: Params, folder: EvaluationFolder) -> dict[str, Any]:
        """Decodes batch by batch, and writes the images. An interrupted run resumes with the next batch.

        Raises:
            FileNotFoundError: if the latents of this checkpoint do not exist.
            RuntimeError: if a solve fails or a value is not finite.
        """
        latents = self._of_checkpoint(folder, params) if self.given is None else self.given
        temperature, size = self.codec.sampler.temperature, self.codec.batch_size
        settings = {"latents": array_hash(latents), "temperature": temperature}
        cache = BatchCache(folder.path, "decoded", self.codec.settings() | settings, params)
        firsts = range(0, len(latents), size)
        sizes = {f"batch{first // size}": min(size, len(latents) - first) for first in firsts}

        def decode(number: int, show: ReportProgress) -> Values:
            return self.codec.decode_array(params, latents[number * size : (number + 1) * size], show)

        batches = cache.all(sizes, decode, "decoding", "image")
        images = np.concatenate([batch["images"] for batch in batches])
        if jax.process_index() == 0:
            folder.write_picture("decoded", images, self.run.config.data.levels)
        return {
            "n": len(images),
            **settings,
            **_cost(batches),
            **self.codec.description,
            **cache.origin(),
        }

    def _of_checkpoint(self, folder: EvaluationFolder, params: Params) -> Float[np.ndarray, "n h w c"]:
        file = folder.workdir.latents / f"{folder.artefact_label}.npz"
        if not file.is_file():
            raise FileNotFoundError(
                f"there are no latents in {file}; run --mode=encode first, or set control.latents to a file"
            )
        encoded_by = str(named_array(file, "parameters", "control.latents"))
        if encoded_by != params_digest(params):
            logging.warning("%s was written for other parameters; run --mode=encode again", file)
        return self._read(file)

    def _read(self, path: Path) -> Float[np.ndarray, "n h w c"]:
        latents = named_array(path, "latents", "control.latents")
        if latents.shape[1:] != self.run.data_shape or not len(latents) or not np.isfinite(latents).all():
            raise ValueError(
                f"latents in {path} have shape {latents.shape}; they must be finite and of shape [n, "
                f"{', '.join(map(str, self.run.data_shape))}]"
            )
        return latents.astype(np.float32)


class InterpolateEvaluator:
    """Draws strips of pictures between pairs of images: interpolates their latents on a sphere, and decodes them.

    Images 0 and 1 are the first pair, images 2 and 3 the second, and so on.

    Raises:
        ValueError, OSError: from the constructor, for settings or images that are not allowed, or missing files.
    """

    name = "interpolation"

    def __init__(self, run: Run):
        self.run, self.codec, self.source = run, Codec(run, "interpolate"), input_source(run)
        self.pairs, self.steps = run.config.control.num_images, run.config.control.num_steps
        if 2 * self.pairs > len(self.source):
            raise ValueError(
                f"control.num_images is {self.pairs}, but {self.source.description} has {len(self.source)} images, "
                f"which are {len(self.source) // 2} pairs"
            )

    def __call__(self, params: Params, folder: EvaluationFolder) -> dict[str, Any]:
        """Computes strip by strip. An interrupted run resumes with the next strips.

        Raises:
            RuntimeError: if a solve fails or a value is not finite.
        """
        settings = {"data": self.source.description, "steps": self.steps}
        temperature = {"temperature": self.codec.sampler.temperature}
        cache = BatchCache(folder.path, "interpolation", self.codec.settings() | settings | temperature, params)
        together = max(1, self.codec.batch_size // self.steps)
        firsts = range(0, self.pairs, together)
        counts = {first: min(together, self.pairs - first) for first in firsts}
        sizes = {f"pair{first}_{count}": count for first, count in counts.items()}

        def strips(number: int, show: ReportProgress) -> Values:
            return self._strips(params, np.arange(self.pairs)[number * together : (number + 1) * together], show)

        batches = cache.all(sizes, strips, "interpolating", "pair")
        images = np.concatenate([batch["images"] for batch in batches])
        if jax.process_index() == 0:
            flat = images.reshape(-1, *images.shape[2:])
            folder.write_picture("interpolation", flat, self.run.config.data.levels, self.steps)
        return {
            "n": self.pairs,
            **settings,
            **temperature,
            **_cost(batches),
            **self.codec.description,
            **cache.origin(),
        }

    def _strips(self, params: Params, pairs: np.ndarray, show: ReportProgress) -> Values:
        indices, size = np.stack([2 * pairs, 2 * pairs + 1], axis=1).ravel(), self.codec.batch_size
        latents = []
        for first in range(0, len(indices), size):
            chosen = indices[first : first + size]
            images, padded = parallel.pad_rows(size, self.source.images(chosen), chosen)
            x = device_images(self.run, self.codec.preprocess, images, padded)
            latents.append(np.asarray(parallel.fetch(self.codec.encode(params, x, show)[0]))[: len(chosen)])
        ends = np.concatenate(latents).reshape(len(pairs), 2, *self.run.data_shape)
        weights = np.linspace(0, 1, self.steps)
        between = np.stack([spherical_interpolation(ends[:, 0], ends[:, 1], w) for w in weights], axis=1)
        flat = between.reshape(-1, *self.run.data_shape)
        firsts = range(0, len(flat), size)
        parts = [self.codec.decode_array(params, flat[first : first + size], show) for first in firsts]
        images = np.concatenate([part["images"] for part in parts]).reshape(between.shape)
        return {"images": images} | {name: np.asarray(value) for name, value in _cost(parts).items()}


def spherical_interpolation(
    a: Float[np.ndarray, "n *dims"], b: Float[np.ndarray, "n *dims"], weight: float
) -> Float[np.ndarray, "n *dims"]:
    """Returns the point on the arc from a (weight 0) to b (weight 1), for each example (Shoemake, 1985).

    Between two draws of Gaussian noise, points on the arc keep its typical norm. Points on the line are shorter.
    """
    flat_a, flat_b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (a, b))
    norms = np.linalg.norm(flat_a, axis=1) * np.linalg.norm(flat_b, axis=1)
    cosine = np.clip(np.sum(flat_a * flat_b, axis=1) / np.maximum(norms, np.finfo(float).tiny), -1, 1)
    angle = np.arccos(cosine)[:, None]
    near = np.sin(angle) < 1e-6  # The arc is a line, or not unique.
    safe = np.where(near, 1.0, angle)
    first = np.where(near, 1 - weight, np.sin((1 - weight) * safe) / np.sin(safe))
    second = np.where(near, weight, np.sin(weight * safe) / np.sin(safe))
    return (first * flat_a + second * flat_b).reshape(a.shape).astype(a.dtype)


def _cost(batches: list[Values]) -> dict[str, float]:
    """Returns the mean number of network evaluations of a batch, and the total time."""
    return {
        "nfe": mean_evaluations(batches),
        "seconds": float(np.sum([batch["seconds"] for batch in batches])),
    }
