"""Where an image model is good or bad, by noise level ([L22] Fig. 6 and 7)."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from analysis.noise_level_errors import draw_noise_and_probes, errors_at
from analysis.ode_score import likelihood_by_start, ode_score
from analysis.score_distances import curve_of, time_nodes
from arrays import Batch, PerExample, ReportProgress, append_dims, inner, num_dims
from build import EVAL_KEY, Run
from datasets import evaluation_batch, evaluation_batch_sizes
from dequantization.noise import Dequantizer
from evaluation import mean_estimate
from evaluators.bits_per_dim import dequantized
from evaluators.cache import BatchCache, Values
from evaluators.estimators import evaluation_source
from infra import parallel
from infra.workdir import EvaluationFolder
from likelihood import bits_per_dim
from models.score import NetworkScore, Params
from ode import require_success
from samplers.sampler import image_keys

CURVES = ("difference", "first", "trace_bias")
"""Values of an image at each time: l_Diff in nats per unit of time, the first-order loss, and the trace's bias."""


class DiagnosticsEvaluator:
    """Bits/dim against the start time, l_Diff(t), and the errors of score and trace by noise level.

    They are means over the first `eval.diagnose_images` images of `eval.bpd_dataset`:

    - `bpd`: bits/dim with the data taken to be x_t at each of several start times ([L22] Fig. 6);
    - `difference`: l_Diff(t) = g^2 / 2 E|s - grad ln p_t|^2 ([L22] Fig. 7), the distance between the model's score and
      the score of the ODE's own density, as a product of two estimates with independent probes, which is unbiased;
    - `first`: the first-order loss |sigma s + z|^2 / d;
    - `trace_bias`: (sigma^2 tr J + d - |sigma s + z|^2) / d, whose mean is 0 for the exact score.

    Raises:
        ValueError: for points, or a field whose value is not allowed.
        OSError: if the data are missing.
    """

    name = "diagnostics"

    def __init__(self, run: Run, dequantizer: Dequantizer):
        settings = run.config.eval
        if run.density is not None:
            raise ValueError(f"data.dataset is {run.config.data.dataset!r}, but --mode=diagnose is for images")
        self.run, self.dequantizer, self.source = run, dequantizer, evaluation_source(run.config)
        self.preprocess = run.preprocess.without_flip()
        self.sizes = evaluation_batch_sizes(self.source, settings.batch_size, settings.diagnose_images)
        t_min = run.config.training.smallest_time
        self.nodes = time_nodes(run.sde, t_min, settings.diagnose_times)
        self.starts = np.geomspace(t_min, 0.3, settings.diagnose_starts)
        self.tolerances = {"rtol": settings.rtol, "atol": settings.atol}

    @property
    def description(self) -> dict[str, Any]:
        """The settings that readers of the result need to know."""
        return {
            "data": self.source.description,
            "starts": self.starts.tolist(),
            "times": self.nodes.t.tolist(),
            **self.dequantizer.description,
            **self.tolerances,
            "seed": self.run.config.seed,
        }

    def __call__(self, params: Params, folder: EvaluationFolder) -> dict[str, Any]:
        """Computes the curves, with standard errors over images. An interrupted diagnosis resumes with its batch.

        Raises:
            RuntimeError: if a solve fails.
        """
        settings = self.run.config.eval
        batches = {"batch_size": settings.batch_size, "diagnose_images": settings.diagnose_images}
        known = self.description | batches | {"network": self.run.evaluated_network()}
        cache = BatchCache(folder.path, "diagnostics", known, params)
        sizes = {f"batch{number}": size for number, size in enumerate(self.sizes)}
        stored = cache.all(sizes, lambda number, show: self._batch(params, number, show), "diagnostics", "image")
        values = {name: np.concatenate([batch[name] for batch in stored]) for name in ("bpd", *CURVES)}
        t = jnp.asarray(self.nodes.t, jnp.float32)
        integral = curve_of(self.nodes, values["difference"].T).integral if len(values["bpd"]) > 1 else None
        means = {name: [mean_estimate(column)._asdict() for column in array.T] for name, array in values.items()}
        return {
            **means,
            "difference_integral": integral and integral._asdict(),
            "log_noise_level": np.asarray(self.run.sde.log_noise_level(t), np.float64).tolist(),
            "n": len(values["bpd"]),
            "seconds": float(sum(batch["seconds"] for batch in stored)),
            **self.description,
            "values": cache.folder.name,
        }

    def _batch(self, params: Params, number: int, show: ReportProgress) -> Values:
        """Computes the values of the images of one batch: [images, starts] or [images, times].

        Args:
            show: called between the solves, with the number of finished solves and the number of all solves.
        """
        started, settings, run = time.monotonic(), self.run.config.eval, self.run
        key = run.key(EVAL_KEY)
        batch = evaluation_batch(self.source, settings.batch_size, number, settings.diagnose_images)
        rows = parallel.local_rows(len(batch.images))
        images = parallel.global_array(run.mesh, batch.images[rows])
        indices = parallel.global_array(run.mesh, batch.indices[rows])
        keys = image_keys(jax.random.fold_in(key, number), indices)
        score_fn, x0 = run.score_fn(params), self.preprocess(jax.random.fold_in(key, number), images)
        solves, rows_of_time = 2 * len(self.nodes.t) + len(self.starts), []
        for k, t in enumerate(self.nodes.t):
            times = jnp.full(len(x0), t, x0.dtype)
            rows_of_time.append(self._at_time(score_fn, x0, times, jax.random.fold_in(key, k), keys))
            show(2 * (k + 1), solves)
        values = {name: np.stack([row[name] for row in rows_of_time], axis=1) for name in CURVES}
        values["bpd"] = self._bpd_by_start(
            score_fn, images, keys, lambda done: show(2 * len(self.nodes.t) + done, solves)
        )
        used = {name: value[: self.sizes[number]] for name, value in values.items()}
        return used | {"seconds": np.asarray(time.monotonic() - started)}

    def _at_time(
        self, score_fn: NetworkScore, x0: Batch, t: PerExample, key: Array, keys: Array
    ) -> dict[str, np.ndarray]:
        sde = self.run.sde
        z, first, second = draw_noise_and_probes(key, keys, x0)
        mean, sigma = sde.marginal(x0, t)
        x = mean + append_dims(sigma, x0) * z
        scores = [ode_score(score_fn, sde, x, t, probe[None], **self.tolerances) for probe in (first, second)]
        for solved in scores:
            require_success(solved.info)
        weight = 0.5 * sde.diffusion(t) ** 2
        errors = errors_at(score_fn, x, t, sigma, z, first)
        difference = weight * inner(errors["score"] - scores[0].score, errors["score"] - scores[1].score)
        fetched = parallel.fetch((difference, errors["first"], errors["trace_bias"]))
        return {name: np.asarray(value, np.float64) for name, value in zip(CURVES, fetched, strict=True)}

    def _bpd_by_start(
        self, score_fn: NetworkScore, images: Array, keys: Array, solved: Callable[[int], None]
    ) -> Float[np.ndarray, "images starts"]:
        noisy = dequantized(self.dequantizer, keys, images, 0)
        probe = draw_noise_and_probes(self.run.key(EVAL_KEY), keys, noisy.x)[1]
        log_q = np.asarray(parallel.fetch(noisy.log_q), np.float64)
        columns = []
        for number, start in enumerate(self.starts, start=1):
            logp, info = likelihood_by_start(
                score_fn, self.run.sde, noisy.x, np.array([start]), probe[None], **self.tolerances
            )
            require_success(info)
            terms = {"nll": -np.asarray(parallel.fetch(logp), np.float64)[0], "dequantization": log_q}
            values = bits_per_dim(
                terms,
                num_dims=num_dims(noisy.x),
                levels=self.dequantizer.bins_per_unit,
                unit_scale=self.dequantizer.unit_scale,
            )
            columns.append(values["bpd"])
            solved(number)
        return np.stack(columns, axis=1)
