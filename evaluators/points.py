"""Evaluators of models of points: likelihoods, the divergence from the density of the data, and samples."""

import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

import datasets
from arrays import ReportProgress
from build import EVAL_KEY, SAMPLE_KEY, Run
from coordinates import GaussianReference
from datasets import evaluation_batch, evaluation_batch_sizes
from evaluation import mean_estimate
from evaluators.bits_per_dim import solver_warning
from evaluators.cache import BatchCache, Values, draw_in_rounds, mean_evaluations
from evaluators.estimators import (
    BoundEstimator,
    Estimate,
    as_float64,
    estimator_from_config,
    evaluation_source,
    fetch_and_check,
)
from infra import parallel
from infra.artefacts import DensityGrid, PointCloud
from infra.workdir import DATA, EvaluationFolder
from models.score import Params
from samplers.sampler import image_keys

REFERENCE_POINTS = 10_000
"""The largest number of training points from which the mean and standard deviation of the data are computed."""

GRID_MARGIN = 1.2
"""The grid of the density extends to this factor times the largest coordinate of the test points."""

CELLS_PER_LINE = 8
"""In one dimension, the number of cells of the grid is this factor times `eval.density_grid`."""

DEQUANTIZATION_DEFAULTS = {"dequantizer": False, "dequantization": "uniform", "num_importance_samples": 1}
"""Fields of `eval` for the dequantization of images, with the values that they must have for points."""


class PointLikelihoodEvaluator:
    """Computes log-likelihoods of the points of `eval.bpd_dataset`, each counted once, as `eval` describes.

    Raises:
        ValueError: for a field whose value is not allowed, or for probes, because the divergence at points is exact.
    """

    name = "nll"

    def __init__(self, run: Run):
        settings = run.config.eval
        if not settings.bound and settings.probe != "exact":
            raise ValueError(f"eval.probe is {settings.probe!r}; the divergence at points is exact: set it to 'exact'")
        for field, required in DEQUANTIZATION_DEFAULTS.items():
            if settings[field] != required:
                raise ValueError(
                    f"eval.{field} is {settings[field]!r}, but points have no levels: set it to {required!r}"
                )
        if settings.likelihood_at != "x":
            raise ValueError(
                f"eval.likelihood_at is {settings.likelihood_at!r}, but likelihoods of points are computed at x: set "
                "it to 'x'"
            )
        if settings.density_grid < 0:
            raise ValueError(f"eval.density_grid is {settings.density_grid}; use 0 for no grid, or a positive number")
        self.run, self.settings = run, settings
        self.estimator = estimator_from_config(run.config)
        parallel.divisible(settings.batch_size, "eval.batch_size")
        self.source = evaluation_source(run.config)
        self.sizes = evaluation_batch_sizes(self.source, settings.batch_size, settings.max_examples)

    @property
    def description(self) -> dict[str, Any]:
        """The settings that readers of the result need to know."""
        t_min = self.run.config.training.smallest_time
        return {"data": self.source.description, "t_min": t_min, **self.estimator.description}

    def __call__(self, params: Params, folder: EvaluationFolder) -> dict[str, Any]:
        """Computes the negative log-likelihood of the model with these parameters, in nats.

        Returns:
            Mean, standard error, 95 % interval and terms of -ln p over the points; the `entropy` of the data if it is
            known; and the settings. If the density q of the data is known, also `kl`, the mean of ln q - ln p with its
            standard error. This estimates KL(q || p), and the spread of ln q over points cancels in it.

        Raises:
            RuntimeError: if a solve fails, naming the time and the point.
        """
        batching = {"batch_size": self.settings.batch_size, "max_examples": self.settings.max_examples}
        described = {"seed": self.run.config.seed, "network": self.run.evaluated_network()}
        if self.estimator.needs_reference:
            described |= {"reference_points": REFERENCE_POINTS, "num_points": self.run.config.data.num_points}
        cache = BatchCache(folder.path, "nll", self.description | batching | described, params)
        sizes = {f"batch{number}": size for number, size in enumerate(self.sizes)}
        batches = cache.all(sizes, lambda number, show: self._batch(params, number, show), "likelihood", "point")
        assert self.run.density is not None
        self._draw_density(params, folder)
        return summary(batches, self.run.density.entropy) | self.description | cache.origin()

    @functools.cached_property
    def reference(self) -> GaussianReference:
        """Mean and standard deviation of the first training points; the default if the estimator does not use them."""
        if not self.estimator.needs_reference:
            return GaussianReference()
        source = datasets.source_from_config(self.run.config, "train")
        points = source.images(np.arange(min(len(source), REFERENCE_POINTS)))
        return GaussianReference(points.mean(axis=0), points.std(axis=0))

    def _batch(self, params: Params, number: int, show: ReportProgress) -> Values:
        """Computes -ln p, its terms and errors for the points of one batch, and ln q if the density is known."""
        started = time.monotonic()
        batch = evaluation_batch(self.source, self.settings.batch_size, number, self.settings.max_examples)
        context = f"Cannot compute the likelihood of {self.source.description} with {self.estimator.description}"
        estimate = self._estimate_points(params, batch.images, batch.indices, show)
        estimate = fetch_and_check(estimate, batch.indices, "point", context)
        values = estimate.terms | {"nll": np.sum(list(estimate.terms.values()), axis=0)}
        density = self.run.density
        if density is not None and density.log_density_of_data is not None:
            values["log_density"] = np.asarray(density.log_density_of_data(jnp.asarray(batch.images)), np.float64)
        values |= estimate.errors
        cost = {"nfe": np.asarray(estimate.nfe), "seconds": np.asarray(time.monotonic() - started)}
        return {name: value[: self.sizes[number]] for name, value in values.items()} | cost

    def _estimate_points(
        self,
        params: Params,
        points: Float[np.ndarray, "n d"],
        indices: np.ndarray,
        show: ReportProgress | None = None,
    ) -> Estimate:
        """Estimates -ln p on the devices, for points with these indices in their source."""
        rows = parallel.local_rows(len(points))
        x, numbers = (parallel.global_array(self.run.mesh, a[rows]) for a in (points, indices))
        keys = image_keys(self.run.key(EVAL_KEY), numbers)
        t_min = self.run.config.training.smallest_time
        return self.estimator(self.run.score_fn(params), self.run.sde, x, keys, t_min, self.reference, show)

    def _draw_density(self, params: Params, folder: EvaluationFolder) -> None:
        """Writes the densities of the model's ODE and of the data on a grid, in one or two dimensions."""
        density, cells = self.run.density, self.settings.density_grid
        if density is None or density.dims > 2 or cells == 0 or isinstance(self.estimator, BoundEstimator):
            return
        limit = GRID_MARGIN * float(np.max(np.abs(self.source.images(np.arange(len(self.source))))))
        cells = cells if density.dims == 2 else CELLS_PER_LINE * cells
        x, shape = grid_points(limit, cells, density.dims), (cells,) * density.dims
        model, data = self.model_density(params, x).reshape(shape), None
        if density.log_density_of_data is not None:
            data = np.exp(np.asarray(density.log_density_of_data(jnp.asarray(x)), np.float64)).reshape(shape)
        if jax.process_index() == 0:
            grid = DensityGrid(model, data, limit, folder.step)
            grid.write(folder.workdir.density / f"{folder.artefact_label}.npz")

    def model_density(self, params: Params, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """Computes the density of the model at any points, in batches of the likelihood's size to reuse its program.

        The density is not finite where the estimate is not finite.
        """
        size = self.settings.batch_size
        densities = []
        for first in range(0, len(x), size):
            indices = np.minimum(np.arange(first, first + size), len(x) - 1)
            estimate = self._estimate_points(params, x[indices], indices, lambda *_: parallel.check_stop())
            terms = as_float64(parallel.fetch(estimate.terms))
            densities.append(np.exp(-np.sum(list(terms.values()), axis=0)))
        return np.concatenate(densities)[: len(x)]


def grid_points(limit: float, cells: int, dims: int) -> Float[np.ndarray, "n d"]:
    """Returns the centres of the cells of [-limit, limit]^d; in two dimensions the first coordinate varies fastest."""
    side = ((np.arange(cells) + 0.5) / cells * 2 - 1) * limit
    axes = np.meshgrid(*[side] * dims)
    return np.stack(axes, axis=-1).reshape(-1, dims).astype(np.float32)


def summary(batches: list[Values], entropy: float | None) -> dict[str, Any]:
    """Averages the batches over points, with standard errors, in nats; see `PointLikelihoodEvaluator`.

    The result has a `warning` if the solver's own estimate of its error is not small.
    """

    def per_point(name: str) -> np.ndarray:
        return np.concatenate([batch[name] for batch in batches])

    terms = [name for name in batches[0] if name in ("prior", "divergence", "integral", "start_correction")]
    nll = mean_estimate(per_point("nll"))
    result: dict[str, Any] = {"mean": nll.mean, "se": nll.se, "ci95": nll.ci95, "n": nll.n, "unit": "nats"}
    if "log_density" in batches[0]:
        kl = mean_estimate(per_point("log_density") + per_point("nll"))
        result["kl"] = {"mean": kl.mean, "se": kl.se}
    if entropy is not None:
        result["entropy"] = entropy
    if "solver_error" in batches[0] and math.isfinite(error := float(per_point("solver_error").mean())):
        result["solver_error"] = error
        if warning := solver_warning(error, nll.se, "nats"):
            result["warning"] = warning
    return result | {
        "terms": {name: float(per_point(name).mean()) for name in terms},
        "nfe": mean_evaluations(batches),
        "seconds": float(np.sum([batch["seconds"] for batch in batches])),
    }


class PointSamplesEvaluator:
    """Draws `eval.num_samples` points by the configured sampler, in rounds of `sampling.batch_size`.

    Raises:
        ValueError: for a field whose value is not allowed.
    """

    name = "points"

    def __init__(self, run: Run):
        if run.config.eval.num_samples < 1:
            raise ValueError(f"eval.num_samples is {run.config.eval.num_samples}; it must be at least 1")
        parallel.divisible(run.config.sampling.batch_size, "sampling.batch_size")
        self.run, self.num_samples = run, run.config.eval.num_samples
        self.sampler = run.sampler()

    def __call__(self, params: Params, folder: EvaluationFolder) -> dict[str, Any]:
        """Draws the points and writes them, with as many test points, to samples/points/.

        Raises:
            RuntimeError: if a point is not finite, or the solve of the ODE sampler fails.
        """
        config = self.run.config
        described = self.run.sample_settings()
        cache = BatchCache(folder.path, "points", described | {"network": self.run.evaluated_network()}, params)
        draw = functools.partial(self._draw, params)
        drawn = draw_in_rounds(cache, "point", self.num_samples, config.sampling.batch_size, draw)
        cost = {"sampler": config.sampling.method, "n": self.num_samples, "nfe": drawn.nfe, "seconds": drawn.seconds}
        self._write(drawn.samples, folder)
        return cost | described | cache.origin()

    def _draw(self, params: Params, numbers: np.ndarray, show: ReportProgress) -> tuple[np.ndarray, int]:
        local = numbers[parallel.local_rows(len(numbers))]
        samples = self.sampler(
            self.run.score_fn(params),
            self.run.key(SAMPLE_KEY),
            parallel.global_array(self.run.mesh, local),
            self.run.data_shape,
            show,
        )
        points = np.asarray(parallel.fetch(samples.x))
        finite = np.isfinite(points).all(axis=1)
        if not finite.all():
            bad, method = numbers[np.argmin(finite)], self.run.config.sampling.method
            raise RuntimeError(
                f"Point {bad} is not finite with sampling.method={method}; try other settings of sampling"
            )
        return points, samples.nfe

    def _write(self, points: Float[np.ndarray, "n d"], folder: EvaluationFolder) -> None:
        source = datasets.source_from_config(self.run.config, "test")
        data = source.images(np.arange(min(len(source), self.num_samples)))
        if jax.process_index() == 0:
            PointCloud(data, 0).write(folder.workdir.points / f"{DATA}.npz")
            PointCloud(points, folder.step).write(folder.workdir.points / f"{folder.artefact_label}.npz")
