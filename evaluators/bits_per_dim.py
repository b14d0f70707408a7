"""Bits/dim over a data set: of the ODE, or a bound on the SDE's, with any dequantization."""

import functools
import itertools
import math
import time
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Array, Float

import datasets
from arrays import Batch
from build import EVAL_KEY, Run
from coordinates import GaussianReference
from datasets import REFERENCE_EXAMPLES, EvaluationBatch, data_reference, evaluation_batch, evaluation_batch_sizes
from dequantization.noise import Dequantized, Dequantizer, Images, check_levels, importance_weights, log_mean_exp
from evaluation import mean_estimate
from evaluators.cache import BatchCache, Values
from evaluators.estimators import Estimate, checked, estimator_from_config, examined_source
from infra import parallel
from infra.workdir import EvaluationFolder
from likelihood import discrete_bits
from models.score import Params
from sampling import image_keys


class BitsPerDimEvaluator:
    """Bits/dim over the images of `eval.bpd_dataset`, `eval.num_repeats` times, as the rest of `eval` says.

    Raises:
        ValueError: for a field whose value is not allowed, or images that are not integer levels as data.levels says.
        OSError: if the data are not there.
    """

    name = "bpd"

    def __init__(self, run: Run, dequantizer: Dequantizer):
        settings = run.config.eval
        for field in ("num_repeats", "num_importance_samples"):
            if settings[field] < 1:
                raise ValueError(f"eval.{field} is {settings[field]}; it must be at least 1")
        self.run, self.dequantizer = run, dequantizer
        self.estimator = estimator_from_config(run.config)
        self.source = examined_source(run.config)
        self._reference_source = (
            datasets.source_from_config(run.config, "train") if self.estimator.needs_reference else None
        )
        self.num_draws: int = settings.num_importance_samples
        if self.num_draws > 1 and self.estimator.description["probe"] != "exact":
            logging.warning("eval.num_importance_samples > 1 with probes makes bits/dim too low; use eval.probe=exact")
        self.sizes = evaluation_batch_sizes(self.source, settings.batch_size, settings.max_examples)
        for number, size in enumerate(self.sizes):
            check_levels(self._images(number).images[:size], run.config.data.levels, self.source.description)

    @property
    def description(self) -> dict[str, Any]:
        """How the numbers come about, for whoever reads them."""
        return {
            "data": self.source.description,
            **self.dequantizer.description,
            "importance_samples": self.num_draws,
            **self.estimator.description,
            "seed": self.run.config.seed,
        }

    def __call__(self, params: Params, folder: EvaluationFolder) -> dict[str, Any]:
        """Bits/dim of the model with these parameters.

        Returns:
            mean, standard error and 95 % interval over images (of each, the mean of its repeats), the mean of each
            repeat, the terms, the estimated errors, and how all of it was computed.

        Raises:
            RuntimeError: if a solve fails, naming the time and the image.
        """
        keep = BatchCache(folder.path, "bpd", self.settings(), params)
        num_repeats, per_repeat = self.run.config.eval.num_repeats, len(self.sizes)
        each = list(itertools.product(range(num_repeats), range(per_repeat)))
        sizes = {f"repeat{repeat}_batch{number}": self.sizes[number] for repeat, number in each}
        batches = keep.all(sizes, lambda position, _: self._batch(params, *each[position]), "bits/dim", "image")
        repeats = [batches[r * per_repeat : (r + 1) * per_repeat] for r in range(num_repeats)]
        return summary(repeats) | self.description | {"values": keep.folder.name}

    def settings(self) -> dict[str, Any]:
        """Everything that the numbers of a batch depend on, beside the parameters."""
        settings, run = self.run.config.eval, self.run
        batches = {"batch_size": settings.batch_size, "max_examples": settings.max_examples}
        bins = {"bins_per_unit": self.dequantizer.bins_per_unit, "unit_scale": self.dequantizer.unit_scale}
        network = {"network": run.network_description()}
        if self._reference_source is None:
            return self.description | batches | bins | network
        reference = {"reference_data": self._reference_source.description, "reference_images": REFERENCE_EXAMPLES}
        return self.description | batches | bins | network | reference

    @functools.cached_property
    def _reference(self) -> GaussianReference:
        if self._reference_source is None:
            return GaussianReference()
        data = self.run.config.data
        return data_reference(self._reference_source, data.levels, self.dequantizer.bins_per_unit, data.centered)

    def _images(self, number: int) -> EvaluationBatch:
        settings = self.run.config.eval
        return evaluation_batch(self.source, settings.batch_size, number, settings.max_examples)

    def _batch(self, params: Params, repeat: int, number: int) -> Values:
        """Bits/dim, its terms and the estimates of its errors, for the images of one batch, and what they took."""
        started = time.monotonic()
        batch, size = self._images(number), self.sizes[number]
        rows = parallel.local_rows(len(batch.images))
        images = parallel.global_array(self.run.mesh, batch.images[rows])
        indices = parallel.global_array(self.run.mesh, batch.indices[rows])
        noise_keys, estimator_keys = _keys(jax.random.fold_in(self.run.key(EVAL_KEY), repeat), indices)
        draws = []
        for draw in range(self.num_draws):
            # the estimator's keys are those of every draw: see importance_weighted
            noisy = _dequantized(self.dequantizer, noise_keys, images, draw)
            draws.append((parallel.fetch(noisy.log_q), self._estimate(params, noisy.x, estimator_keys, batch)))
        dims = math.prod(batch.images.shape[1:])
        constants = discrete_bits(self.dequantizer.bins_per_unit, self.dequantizer.unit_scale)
        values = importance_weighted([_in_nats(log_q, estimate) for log_q, estimate in draws], dims, constants)
        cost = {"nfe": sum(estimate.nfe for _, estimate in draws), "seconds": time.monotonic() - started}
        return {name: value[:size] for name, value in values.items()} | {k: np.asarray(v) for k, v in cost.items()}

    def _estimate(self, params: Params, x: Batch, keys: Array, batch: EvaluationBatch) -> Estimate:
        """The estimate, on the host.

        Raises:
            RuntimeError: if it is none.
        """
        score_fn, t_min = self.run.score_fn(params), self.dequantizer.t_min
        estimate = self.estimator(score_fn, self.run.sde, x, keys, t_min, self._reference)
        context = f"of {self.source.description}; its bits/dim are not to be had with {self.estimator.description}"
        return checked(estimate, batch.indices, "image", context)


@jax.jit
def _keys(key: Array, indices: Array) -> tuple[Array, Array]:
    """Of each image: the key of its noise, and that of all else random."""
    keys = image_keys(key, indices)
    noise, other = (jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, n) for n in range(2))
    return noise, other


@jax.jit
def _dequantized(dequantizer: Dequantizer, keys: Array, images: Images, draw: int) -> Dequantized:
    return dequantizer(jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, draw), images)


def _in_nats(log_q: Float[np.ndarray, " batch"], estimate: Estimate) -> tuple[Values, Values]:
    """The parts of -ln (p / q), and the estimates of its errors, in nats and float64."""
    terms, errors = ({k: np.asarray(v, np.float64) for k, v in part.items()} for part in estimate[:2])
    return terms | {"dequantization": np.asarray(log_q, np.float64)}, errors


def importance_weighted(draws: list[tuple[Values, Values]], dims: int, constants: tuple[float, float]) -> Values:
    """Bits/dim of each image from draws of its noise, with terms that add up to it and estimates of its errors.

    The average inside the logarithm takes ln p to be exact. With probes it is an estimate, and an average over its
    noise, too, would come out too large. All draws of an image share their probes, which takes away the noise that
    is the same for all; with probes and several draws the result still is too good, see docs/results/dequantization.md.

    Args:
        draws: of each, the terms of -ln (p / q) and the estimates of its errors, in nats.
        constants: bits/dim of the levels and of the scaler.
    """
    nats_of_bit = dims * math.log(2)
    terms = {name: np.array([draw[0][name] for draw in draws]) for name in draws[0][0]}
    errors = {name: np.array([draw[1][name] for draw in draws]) for name in draws[0][1]}
    total = np.sum(list(terms.values()), axis=0)
    weights = importance_weights(-total)
    values = {name: term.mean(axis=0) / nats_of_bit for name, term in terms.items()}
    values |= dict(zip(("levels", "scaler"), (np.full_like(total[0], bits) for bits in constants), strict=True))
    if len(draws) > 1:
        values["importance_sampling"] = -(log_mean_exp(-total) + total.mean(axis=0)) / nats_of_bit
    values["bpd"] = np.sum(list(values.values()), axis=0)
    return values | {name: np.sum(weights * error, axis=0) / nats_of_bit for name, error in errors.items()}


ERRORS = ("solver_error", "probe_error", "sampling_error")
"""Values of an image that are no terms of its bits/dim, but estimates of its error."""


def summary(repeats: list[list[Values]]) -> dict[str, Any]:
    """Means over images, and how sure they are, from the batches of each repeat."""

    def per_image(name: str) -> np.ndarray:
        return np.array([np.concatenate([batch[name] for batch in batches]) for batches in repeats])

    every = [batch for batches in repeats for batch in batches]
    total, of_repeat = mean_estimate(per_image("bpd")), per_image("bpd").mean(axis=1)
    terms = [name for name in every[0] if name not in (*ERRORS, "bpd", "nfe", "seconds")]
    return {
        "mean": total.mean,
        "se": total.se,
        "ci95": total.ci95,
        "n": total.n,
        "repeats": len(repeats),
        "mean_of_repeat": of_repeat.tolist(),
        "se_over_repeats": float(of_repeat.std(ddof=1) / math.sqrt(len(repeats))) if len(repeats) > 1 else None,
        "terms": {name: mean_estimate(per_image(name)).mean for name in terms},
        "errors": _error_of_mean({name: per_image(name) for name in ERRORS if name in every[0]}),
        "nfe": float(np.mean([batch["nfe"] for batch in every])),
        "seconds": float(np.sum([batch["seconds"] for batch in every])),
    }


def _error_of_mean(errors: dict[str, np.ndarray]) -> dict[str, float | None]:
    """Estimates of the mean's error, in bits/dim: of its bias by the solver, of its standard error by other things.

    None where nothing can be told, as of a single probe.
    """
    means = {
        name: float(error.mean()) if name == "solver_error" else float(np.sqrt(np.sum(error**2)) / error.size)
        for name, error in errors.items()
    }
    return {name: mean if math.isfinite(mean) else None for name, mean in means.items()}
