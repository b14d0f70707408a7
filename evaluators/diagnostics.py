"""Errors of an image model by noise level and by start time ([L22] Fig. 6 and 7)."""

import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import datasets
from analysis.likelihood_gradient import likelihood_gradients
from analysis.noise_level_errors import draw_noise_and_probes, errors_at
from analysis.score_distances import time_nodes
from arrays import Batch, ReportProgress, ScoreFn, append_dims, inner, num_dims
from build import EVAL_KEY, Run
from coordinates import GaussianReference
from datasets import REFERENCE_EXAMPLES, data_reference, evaluation_batch, evaluation_batch_sizes
from dequantization.noise import Dequantizer
from evaluation import mean_estimate
from evaluators.bits_per_dim import dequantized, example_keys
from evaluators.cache import BatchCache, Values
from evaluators.control_inputs import require_images
from evaluators.estimators import as_float64, evaluation_source, fetch_and_check, ode_estimator_from_config
from infra import parallel
from infra.workdir import EvaluationFolder
from likelihood import bits_per_dim, to_bits_per_dim
from models.score import Params
from samplers.sampler import image_keys
from sde_lib import SDE

BY_TIME = ("difference", "first", "trace_bias")
"""Values of an image at each time: l_Diff in nats per unit of time, the first-order loss, and the trace's bias."""

BY_START = ("bpd", "solver_error")
"""Values of an image at each start time: bits/dim, and the solver's estimate of its error (NaN if it has none)."""


class DiagnosticsEvaluator:
    """Computes bits/dim by start time, and l_Diff(t) and the errors of score and trace by noise level.

    They are means over the first `eval.diagnose_images` images of `eval.bpd_dataset`:

    - `bpd`: bits/dim with the data as x_t at each of several start times ([L22] Fig. 6). Solver and probes are the
      same as in --mode=eval, and so is the first start time, which gives the same number;
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
        self.run, self.preprocess = run, require_images(run, "diagnose")
        parallel.divisible(settings.batch_size, "eval.batch_size")
        self.dequantizer, self.source = dequantizer, evaluation_source(run.config)
        self.estimator, self.num_steps = ode_estimator_from_config(run.config), settings.ode_steps
        if self.num_steps < 2:
            raise ValueError(f"eval.ode_steps is {self.num_steps}; --mode=diagnose needs at least 2")
        self._reference_source = datasets.source_from_config(run.config, "train")
        self.batch_size = _batch_size(settings.batch_size, min(len(self.source), settings.diagnose_images))
        self.sizes = evaluation_batch_sizes(self.source, self.batch_size, settings.diagnose_images)
        t_min = dequantizer.t_min
        if not t_min < LAST_START * run.sde.t_max:
            raise ValueError(
                f"--mode=diagnose varies the start time up to t = {LAST_START * run.sde.t_max:g}, but "
                f"eval.dequantization={settings.dequantization} starts at t = {t_min:.3g}: use uniform noise or an "
                "earlier eval.start_time"
            )
        self.nodes = time_nodes(run.sde, t_min, settings.diagnose_times)
        self.starts = start_times(run.sde, t_min, settings.diagnose_starts)

    @property
    def description(self) -> dict[str, Any]:
        """The settings that readers of the result need to know."""
        return {
            "data": self.source.description,
            "starts": self.starts.tolist(),
            "times": self.nodes.t.tolist(),
            **self.dequantizer.description,
            **self.estimator.description,
            "score_steps": self.num_steps,
            "seed": self.run.config.seed,
        }

    def __call__(self, params: Params, folder: EvaluationFolder) -> dict[str, Any]:
        """Computes the curves, with standard errors over images.

        Each time and each start time of a batch of images is stored when it is finished, so that an interrupted
        diagnosis resumes with the next one. The bar counts images at each of them.

        Raises:
            RuntimeError: if a solve fails.
        """
        settings = self.run.config.eval
        batches = {"batch_size": self.batch_size, "diagnose_images": settings.diagnose_images}
        reference = {"reference_data": self._reference_source.description, "reference_images": REFERENCE_EXAMPLES}
        data = self.preprocess.data_description
        known = self.description | batches | reference | data | {"network": self.run.evaluated_network()}
        cache = BatchCache(folder.path, "diagnostics", known, params)
        parts = [("time", number) for number in range(len(self.nodes.t))]
        parts += [("start", number) for number in range(len(self.starts))]
        each = [(batch, *part) for batch in range(len(self.sizes)) for part in parts]
        sizes = {f"batch{batch}_{kind}{number}": self.sizes[batch] for batch, kind, number in each}
        stored = cache.all(
            sizes, lambda place, show: self._part(params, *each[place], show), "diagnostics, images x times", "solve"
        )
        found = dict(zip(each, stored, strict=True))
        columns = {"time": (BY_TIME, len(self.nodes.t)), "start": (BY_START, len(self.starts))}
        values = {
            name: np.concatenate(
                [
                    np.stack([found[batch, kind, number][name] for number in range(count)], axis=1)
                    for batch in range(len(self.sizes))
                ]
            )
            for kind, (names, count) in columns.items()
            for name in names
        }
        return self._result(values) | {
            "seconds": float(sum(part["seconds"] for part in stored)),
            **self.description,
            **cache.origin(),
        }

    def _result(self, values: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Averages values of shape [images, times] or [images, starts] over images."""

        def levels(t: np.ndarray) -> list[float]:
            return np.asarray(self.run.sde.log_noise_level(jnp.asarray(t, jnp.float32)), np.float64).tolist()

        named = {name: array for name, array in values.items() if name != "solver_error"}
        means = {name: [mean_estimate(column)._asdict() for column in array.T] for name, array in named.items()}
        errors = values["solver_error"].mean(axis=0)
        integral = mean_estimate(values["difference"] @ self.nodes.weight) if len(values["bpd"]) > 1 else None
        return {
            **means,
            "difference_integral": integral and integral._asdict(),
            "log_noise_level": levels(self.nodes.t),
            "start_log_noise_level": levels(self.starts),
            "solver_error": [float(error) if np.isfinite(error) else None for error in errors],
            "n": len(values["bpd"]),
        }

    @functools.cached_property
    def _reference(self) -> GaussianReference:
        data = self.run.config.data
        return data_reference(self._reference_source, data.levels, self.dequantizer.bins_per_unit, data.centered)

    def _part(self, params: Params, batch_number: int, kind: str, number: int, show: ReportProgress) -> Values:
        """Computes the values of the images of one batch at one time, or at one start time: [images] each."""
        started, settings, run = time.monotonic(), self.run.config.eval, self.run
        batch = evaluation_batch(self.source, self.batch_size, batch_number, settings.diagnose_images)
        rows = parallel.local_rows(len(batch.images))
        images = parallel.global_array(run.mesh, batch.images[rows])
        indices = parallel.global_array(run.mesh, batch.indices[rows])
        score_fn, key = run.score_fn(params), run.key(EVAL_KEY)
        if kind == "time":
            x0 = self.preprocess(jax.random.fold_in(key, batch_number), images)
            keys = image_keys(jax.random.fold_in(key, number), indices)
            fetched = parallel.fetch(
                errors_at_time(
                    score_fn,
                    run.sde,
                    x0,
                    self.nodes.t[number],
                    keys,
                    self._reference,
                    num_steps=self.num_steps,
                    progress=show,
                )
            )
            values = as_float64(fetched)
            if not np.all(np.isfinite(values["difference"])):
                example = batch.indices[np.argmin(np.isfinite(values["difference"]))]
                raise RuntimeError(f"the ODE solve failed from t = {self.nodes.t[number]:.6g}, at image {example}")
        else:
            values = self._bits_per_dim(score_fn, images, indices, batch.indices, float(self.starts[number]), show)
        used = {name: value[: self.sizes[batch_number]] for name, value in values.items()}
        return used | {"seconds": np.asarray(time.monotonic() - started)}

    def _bits_per_dim(
        self,
        score_fn: ScoreFn,
        images: Array,
        indices: Array,
        on_host: np.ndarray,
        start: float,
        show: ReportProgress,
    ) -> Values:
        """Computes bits/dim with the data as x at the start time, and the solver's estimate of its error."""
        noise_keys, estimator_keys = example_keys(jax.random.fold_in(self.run.key(EVAL_KEY), 0), indices)
        noisy = dequantized(self.dequantizer, noise_keys, images, 0)
        sde, reference = self.run.sde, self._reference
        estimate = self.estimator(score_fn, sde, noisy.x, estimator_keys, start, reference, show)
        context = f"Cannot compute bits/dim from t = {start:.6g}"
        found = fetch_and_check(estimate, on_host, "image", context)
        log_q = np.asarray(parallel.fetch(noisy.log_q), np.float64)
        scale = {"levels": self.dequantizer.bins_per_unit, "unit_scale": self.dequantizer.unit_scale}
        dims = num_dims(noisy.x)
        total = bits_per_dim(found.terms | {"dequantization": log_q}, num_dims=dims, **scale)["bpd"]
        return {"bpd": total, "solver_error": to_bits_per_dim(found.errors["solver_error"], dims)}


LAST_START = 0.3
"""The last start time of the likelihood, as a fraction of T."""


def start_times(sde: SDE, t_min: float, num: int) -> Float[np.ndarray, " num"]:
    """Returns times from t_min to `LAST_START` T at equal steps of the logarithm of the noise level."""
    first, last = sde.log_noise_level(jnp.asarray([t_min, LAST_START * sde.t_max]))
    times = sde.time_of_log_noise_level(jnp.linspace(first, last, num))
    return np.concatenate([[t_min], np.asarray(times[1:], np.float64)])


def _batch_size(most: int, images: int) -> int:
    """Returns the size of a batch without more padding than the devices need."""
    devices = jax.device_count()
    return min(most, -(-images // devices) * devices)


def errors_at_time(
    score_fn: ScoreFn,
    sde: SDE,
    x0: Batch,
    t: float,
    keys: Array,
    reference: GaussianReference,
    *,
    num_steps: int,
    progress: ReportProgress | None = None,
) -> dict[str, Array]:
    """Computes `BY_TIME` of each image at x_t = alpha x_0 + sigma z, from one key for each image.

    Args:
        reference, num_steps, progress: as in `likelihood_gradients`.
    """
    times = jnp.full(len(x0), t, x0.dtype)
    z, first, second = draw_noise_and_probes(keys, x0)
    mean, sigma = sde.marginal(x0, times)
    x = mean + append_dims(sigma, x0) * z
    probes = jnp.stack([first, second])
    errors = errors_at(score_fn, x, times, sigma, z, first)
    solver = {"reference": reference, "num_steps": num_steps, "progress": progress}
    of_ode = likelihood_gradients(score_fn, sde, x, t, probes, **solver)
    apart = errors.pop("score")[None] - of_ode
    return errors | {"difference": 0.5 * sde.diffusion(times) ** 2 * inner(apart[0], apart[1])}
