"""Bits/dim over a data set, from the likelihood of the ODE or a bound on that of the SDE, with any dequantization."""

import functools
import itertools
import math
import time
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Array, Int

import datasets
from arrays import Batch, ReportProgress
from build import EVAL_KEY, Run
from coordinates import GaussianReference
from datasets import REFERENCE_EXAMPLES, EvaluationBatch, data_reference, evaluation_batch, evaluation_batch_sizes
from dequantization.noise import Dequantized, Dequantizer, Images, check_levels, importance_weights, log_mean_exp
from evaluation import mean_estimate
from evaluators.cache import BatchCache, Values, examples_per_second, mean_evaluations
from evaluators.estimators import (
    HostEstimate,
    OdeEstimator,
    estimator_from_config,
    evaluation_source,
    fetch_and_check,
    noised,
)
from infra import parallel
from infra.workdir import EvaluationFolder
from likelihood import bits_per_dim, to_bits_per_dim
from models.score import Params
from samplers.sampler import image_keys


class BitsPerDimEvaluator:
    """Computes bits/dim of the images of `eval.bpd_dataset`, `eval.num_repeats` times, as `eval` describes.

    Args:
        at: x as published, or x_tmin, where the likelihood of the ODE compares with the bound without start-time
            correction, and where [L22] Theorem 3.1 holds. See `estimators.AT`.

    Raises:
        ValueError: for a field whose value is not allowed, or images that are not integer levels below data.levels.
        OSError: if the data are missing.
    """

    def __init__(self, run: Run, dequantizer: Dequantizer, at: str = "x"):
        self.at, self.name = at, "bpd" if at == "x" else "bpd_tmin"
        settings = run.config.eval
        for field in ("num_repeats", "num_importance_samples"):
            if settings[field] < 1:
                raise ValueError(f"eval.{field} is {settings[field]}; it must be at least 1")
        self.run, self.dequantizer = run, dequantizer
        self.estimator = estimator_from_config(run.config, at)
        parallel.divisible(settings.batch_size, "eval.batch_size")
        self.source = evaluation_source(run.config)
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
        """The settings that readers of the result need to know."""
        return {
            "data": self.source.description,
            **self.dequantizer.description,
            "importance_samples": self.num_draws,
            **self.estimator.description,
            **({} if self.at == "x" else {"at": self.at}),
            "seed": self.run.config.seed,
        }

    def __call__(self, params: Params, folder: EvaluationFolder) -> dict[str, Any]:
        """Computes bits/dim of the model with these parameters.

        Returns:
            Mean, standard error and 95 % interval over images, where an image has the mean of its repeats; the mean of
            each repeat; the terms; the estimated errors; and the settings.

        Raises:
            RuntimeError: if a solve fails, naming the time and the image.
        """
        cache = BatchCache(folder.path, "bpd", self.settings(), params)
        num_repeats, per_repeat = self.run.config.eval.num_repeats, len(self.sizes)
        each = list(itertools.product(range(num_repeats), range(per_repeat)))
        sizes = {f"repeat{repeat}_batch{number}": self.sizes[number] for repeat, number in each}
        batches = cache.all(
            sizes, lambda position, show: self._batch(params, *each[position], show), "bits/dim", "image"
        )
        repeats = [batches[r * per_repeat : (r + 1) * per_repeat] for r in range(num_repeats)]
        return summary(repeats) | self.description | cache.origin()

    def settings(self) -> dict[str, Any]:
        """Returns everything that the values of a batch depend on, except the parameters."""
        settings, run = self.run.config.eval, self.run
        batches = {"batch_size": settings.batch_size, "max_examples": settings.max_examples}
        bins = {"bins_per_unit": self.dequantizer.bins_per_unit, "unit_scale": self.dequantizer.unit_scale}
        network = {"network": run.evaluated_network()}
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

    def _batch(self, params: Params, repeat: int, number: int, show: ReportProgress | None = None) -> Values:
        """Computes bits/dim, the terms and the estimated errors of the images of one batch, and measures the cost."""
        started = time.monotonic()
        batch, size = self._images(number), self.sizes[number]
        rows = parallel.local_rows(len(batch.images))
        images = parallel.global_array(self.run.mesh, batch.images[rows])
        indices = parallel.global_array(self.run.mesh, batch.indices[rows])
        noise_keys, estimator_keys = example_keys(jax.random.fold_in(self.run.key(EVAL_KEY), repeat), indices)
        draws, nfe = [], 0
        for draw in range(self.num_draws):
            # All draws use the same keys for the estimator, for the reason given in importance_weighted.
            noisy = dequantized(self.dequantizer, noise_keys, images, draw)
            log_q = np.asarray(parallel.fetch(noisy.log_q), np.float64)
            estimate = self._estimate(params, noisy.x, estimator_keys, batch, show)
            draws.append((estimate.terms | {"dequantization": log_q}, estimate.errors))
            nfe += estimate.nfe
        values = importance_weighted(
            draws,
            num_dims=math.prod(batch.images.shape[1:]),
            levels=self.dequantizer.bins_per_unit,
            unit_scale=self.dequantizer.unit_scale,
        )
        cost = {"nfe": np.asarray(nfe), "seconds": np.asarray(time.monotonic() - started)}
        return {name: value[:size] for name, value in values.items()} | cost

    def _estimate(
        self, params: Params, x: Batch, keys: Array, batch: EvaluationBatch, show: ReportProgress | None
    ) -> HostEstimate:
        """Estimates -ln p(x). Raises RuntimeError if the solve failed or a value is not finite."""
        score_fn, t_min = self.run.score_fn(params), self.dequantizer.t_min
        if self.at == "x_tmin" and isinstance(self.estimator, OdeEstimator):  # The bound draws x_tmin itself.
            x = noised(self.run.sde, x, keys, t_min)
        estimate = self.estimator(score_fn, self.run.sde, x, keys, t_min, self._reference, show)
        context = f"Cannot compute bits/dim for {self.source.description} with {self.estimator.description}"
        return fetch_and_check(estimate, batch.indices, "image", context)


@jax.jit
def example_keys(key: Array, indices: Array) -> tuple[Array, Array]:
    """Derives two keys for each image: one for its noise, and one for the estimator."""
    keys = image_keys(key, indices)
    noise, estimator = (jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, n) for n in range(2))
    return noise, estimator


@jax.jit
def dequantized(dequantizer: Dequantizer, keys: Array, images: Images, draw: Int[Array, ""] | int) -> Dequantized:
    """Adds the noise of this draw to the images, from one key for each image."""
    return dequantizer(jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, draw), images)


def importance_weighted(draws: list[tuple[Values, Values]], *, num_dims: int, levels: int, unit_scale: float) -> Values:
    """Computes bits/dim of each image from draws of its noise, with the terms and estimates of the errors.

    The average inside the logarithm assumes that ln p is exact. With probes, ln p is an estimate, and averaging over
    the noise of the probes as well would make the likelihood too large. Therefore all draws of an image share their
    probes, which removes the noise that is common to all draws. With probes and several draws, bits/dim are still too
    low; see docs/results/dequantization.md.

    Args:
        draws: for each draw, the terms of -ln (p / q) and the estimates of the errors, in nats.
        num_dims, levels, unit_scale: as in `likelihood.bits_per_dim`.
    """
    terms = {name: np.array([draw[0][name] for draw in draws]) for name in draws[0][0]}
    errors = {name: np.array([draw[1][name] for draw in draws]) for name in draws[0][1]}
    total = np.sum(list(terms.values()), axis=0)
    weights = importance_weights(-total)
    values = bits_per_dim(
        {name: term.mean(axis=0) for name, term in terms.items()},
        num_dims=num_dims,
        levels=levels,
        unit_scale=unit_scale,
        importance_sampling=-(log_mean_exp(-total) + total.mean(axis=0)) if len(draws) > 1 else None,
    )
    return values | {name: to_bits_per_dim(np.sum(weights * error, axis=0), num_dims) for name, error in errors.items()}


ERRORS = ("solver_error", "probe_error", "sampling_error")
"""Values of an image that estimate an error of its bits/dim. All other values, except bpd and the cost, are terms."""


MOST_SOLVER_ERROR = 0.005
"""An estimated error of the solver above this (in bits/dim for images, in nats for points), or above half the standard
error, causes a warning."""


def summary(repeats: list[list[Values]]) -> dict[str, Any]:
    """Averages the batches of each repeat over images, with standard errors.

    The result has a `warning` if the solver's own estimate of its error is not small.
    """

    def per_image(name: str) -> np.ndarray:
        return np.array([np.concatenate([batch[name] for batch in batches]) for batches in repeats])

    every = [batch for batches in repeats for batch in batches]
    total, repeat_means = mean_estimate(per_image("bpd")), per_image("bpd").mean(axis=1)
    terms = [name for name in every[0] if name not in (*ERRORS, "bpd", "nfe", "seconds")]
    errors = _error_of_mean({name: per_image(name) for name in ERRORS if name in every[0]})
    warning = solver_warning(errors.get("solver_error"), total.se)
    return ({"warning": warning} if warning else {}) | {
        "mean": total.mean,
        "se": total.se,
        "ci95": total.ci95,
        "n": total.n,
        "repeats": len(repeats),
        "mean_of_repeat": repeat_means.tolist(),
        "se_over_repeats": float(repeat_means.std(ddof=1) / math.sqrt(len(repeats))) if len(repeats) > 1 else None,
        "terms": {name: mean_estimate(per_image(name)).mean for name in terms},
        "errors": errors,
        "nfe": mean_evaluations(every),
        "seconds": float(np.sum([batch["seconds"] for batch in every])),
        "images_per_second": examples_per_second([len(batch["bpd"]) for batch in every], every),
    }


def _error_of_mean(errors: dict[str, np.ndarray]) -> dict[str, float | None]:
    """Estimates the error of the mean in bits/dim: the bias due to the solver, the standard error due to the others.

    Returns None without an estimate, for example with a single probe.
    """
    means = {
        name: float(error.mean()) if name == "solver_error" else float(np.sqrt(np.sum(error**2)) / error.size)
        for name, error in errors.items()
    }
    return {name: mean if math.isfinite(mean) else None for name, mean in means.items()}


def solver_warning(solver_error: float | None, se: float, unit: str = "bits/dim") -> str:
    """Returns and logs a warning if the solver's error is not small; an empty text otherwise.

    Args:
        solver_error: the solver's estimate of the error of the mean, in this unit; None if it makes none.
        se: the standard error of the mean.
        unit: the unit of the likelihood.
    """
    if solver_error is None or abs(solver_error) <= min(MOST_SOLVER_ERROR, 0.5 * se if se > 0 else math.inf):
        return ""
    warning = (
        f"The solver estimates that {unit} are off by {abs(solver_error):.1g}, but the standard error is {se:.1g}; "
        "raise eval.ode_steps, or set eval.ode_solver=dopri5"
    )
    logging.warning("%s", warning)
    return warning
