"""Conditional samples: images with a known part, and images of given classes ([S21a] Sec. 5 and App. I).

For every sampling.method, the predictor-corrector sampler with the fields of `sampling` draws images with a known part.
The sampler that sampling.method names draws images of classes. Pictures are in pictures/ of the workdir.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import datasets
from arrays import Batch, ReportProgress, ScoreFn, mean_square
from build import SAMPLE_KEY, Run
from evaluation import mean_estimate
from evaluators.cache import BatchCache, Values, mean_evaluations
from evaluators.class_training import ClassifierTraining, number_of_classes
from evaluators.classifier import classifier_from_config
from evaluators.control_inputs import (
    Problem,
    colorization,
    device_images,
    finite_levels,
    inpainting,
    input_source,
    padded_round,
    require_images,
    require_images_of_levels,
    restoration,
)
from infra import parallel
from infra.workdir import EvaluationFolder, Workdir
from models.score import Params
from samplers.controllable import ClassifierFreeScore, GuidedScore, Observation

PROBLEMS: dict[str, tuple[str, Callable[[Any, Any, int], Problem]]] = {
    "inpaint": ("inpainting", inpainting),
    "colorize": ("colorization", colorization),
    "restore": ("restoration", restoration),
}
"""For each mode, the name of its result, and the function that builds its problem from the configuration."""

SHOWN = 16
"""The largest number of rows in a picture."""


class ConditionalEvaluator:
    """Draws `control.num_draws` images for each of the first `control.num_images` images, given its known part.

    Raises:
        ValueError, OSError: from the constructor, for settings that are not allowed, or missing files.
    """

    def __init__(self, run: Run, mode: str):
        self.run, self.preprocess = run, require_images_of_levels(run, mode)
        self.source, control = input_source(run), run.config.control
        self.num_images, self.num_draws = min(control.num_images, len(self.source)), control.num_draws
        self.sampler = run.predictor_corrector()
        self.name, build = PROBLEMS[mode]
        self.problem = build(run.config, run.data_shape, self.num_images)
        parallel.divisible(run.config.sampling.batch_size, "sampling.batch_size")
        self.count = self.num_images * self.num_draws
        self.round_size = min(run.config.sampling.batch_size, padded_round(self.count))

    def __call__(self, params: Params, folder: EvaluationFolder) -> dict[str, Any]:
        """Draws the images in rounds. An interrupted run resumes with the next round.

        Returns:
            `known_error` and `unknown_error`: root mean square differences between drawn images and the original, in
            units of the data's range, over the known and over the other components. `spread`: the standard deviation of
            a pixel over the images drawn for one original, in the same units.

        Raises:
            RuntimeError: if an image is not finite.
        """
        settings = self._settings()
        cache = BatchCache(folder.path, self.name, settings | {"network": self.run.evaluated_network()}, params)
        sizes = _rounds(self.count, self.round_size)
        rounds = cache.all(sizes, lambda number, show: self._round(params, number, show), "sampling", "sample")
        values = {name: np.concatenate([each[name] for each in rounds])[: self.count] for name in PER_SAMPLE}
        images = values["images"].reshape(self.num_images, self.num_draws, *self.run.data_shape)
        rows = self._picture(images)
        if jax.process_index() == 0:
            flat = rows.reshape(-1, *self.run.data_shape)
            folder.write_picture(self.name, flat, self.run.config.data.levels, rows.shape[1])
        unit = images.astype(np.float64) / (self.run.config.data.levels - 1)
        spread = float(np.sqrt(unit.var(axis=1, ddof=1).mean())) if self.num_draws > 1 else None
        unknown = mean_estimate(values["unknown"].reshape(self.num_images, -1).mean(axis=1))
        return {
            "known_error": float(np.sqrt(values["known"].mean())),
            "unknown_error": float(np.sqrt(unknown.mean)),
            "spread": spread,
            "n": self.num_images,
            "draws": self.num_draws,
            **settings,
            "nfe": mean_evaluations(rounds),
            "seconds": float(sum(each["seconds"] for each in rounds)),
            **cache.origin(),
        }

    def _settings(self) -> dict[str, Any]:
        """Returns all settings that the images depend on, except the parameters and the network."""
        sampler = self.sampler
        names = ("predictor", "corrector", "num_steps", "corrector_steps", "snr", "probability_flow")
        fields = {name: getattr(sampler, name) for name in (*names, "smallest_time", "noise_removal", "temperature")}
        images = {"images": self.num_images, "draws": self.num_draws, "round_size": self.round_size}
        return {
            "data": self.source.description,
            **self.problem.description,
            **images,
            "sampling": fields,
            **self.preprocess.description,
            "seed": self.run.config.seed,
        }

    def _round(self, params: Params, number: int, show: ReportProgress) -> Values:
        started, run = time.monotonic(), self.run
        numbers = np.arange(number * self.round_size, (number + 1) * self.round_size)
        originals = np.minimum(numbers // self.num_draws, self.num_images - 1)
        x0, observation = self._observation(originals)
        local = parallel.global_array(run.mesh, numbers[parallel.local_rows(len(numbers))])
        samples = self.sampler.conditional(run.score_fn(params), run.key(SAMPLE_KEY), local, observation, show)
        levels = finite_levels(self.preprocess, samples.x, f"Cannot draw images for {self.name}")
        known, unknown = parallel.fetch(_square_errors(observation, x0, samples.x))
        width = float(np.ptp(self.preprocess.data_range)) ** 2
        values = {"images": levels, "known": np.asarray(known) / width, "unknown": np.asarray(unknown) / width}
        return values | {"nfe": np.asarray(samples.nfe), "seconds": np.asarray(time.monotonic() - started)}

    def _observation(self, originals: np.ndarray) -> tuple[Batch, Observation]:
        """Returns the data of the originals with these indices, and their known components."""
        problem, run = self.problem, self.run
        x0 = device_images(run, self.preprocess, self.source.images(originals), originals)
        rows = parallel.local_rows(len(originals))
        mask = parallel.global_array(run.mesh, np.ascontiguousarray(problem.mask_of(originals)[rows]))
        basis = None if problem.basis is None else jnp.asarray(problem.basis, jnp.float32)
        if problem.components is None:
            return x0, Observation(_components(Observation(x0, mask, basis), x0), mask, basis)
        components = parallel.global_array(run.mesh, problem.components[originals][rows])
        shift = self.preprocess.scale(jnp.zeros_like(x0))
        known = components / self.preprocess.unit_scale + _components(Observation(x0, mask, basis), shift)
        return x0, Observation(known, mask, basis)

    def _picture(self, images: np.ndarray) -> np.ndarray:
        """Makes a row of each original, its known part and the images drawn for it. All hosts must call this."""
        shown = np.arange(padded_round(min(self.num_images, SHOWN)))
        indices = np.minimum(shown, self.num_images - 1)
        x0, observation = self._observation(indices)
        fill = self.preprocess.scale(jnp.full_like(x0, self.problem.fill))
        observed = finite_levels(self.preprocess, _shown(observation, fill), self.name)
        count = min(self.num_images, SHOWN)
        originals = self.source.images(indices)[:count]
        return np.concatenate([originals[:, None], observed[:count, None], images[:count]], axis=1)


PER_SAMPLE = ("images", "known", "unknown")
"""The values that `ConditionalEvaluator` stores for each sample."""


@jax.jit
def _components(observation: Observation, x: Batch) -> Batch:
    return observation.components(x)


@jax.jit
def _shown(observation: Observation, fill: Batch) -> Batch:
    """Returns the known components. The others come from `fill` if components are pixels; otherwise they are 0."""
    rest = fill if observation.basis is None else jnp.zeros_like(fill)
    return observation.replace(rest, observation.known)


@jax.jit
def _square_errors(observation: Observation, x0: Batch, x: Batch) -> tuple[Array, Array]:
    """Returns the mean squared differences of the known and of the unknown components, for each example."""
    mask, got = observation.mask, observation.components(x)
    share = mean_square(mask)  # The mask has values 0 and 1, so this is the share of ones.
    known = mean_square((got - observation.known) * mask) / share
    unknown = mean_square((got - observation.components(x0)) * (1 - mask)) / (1 - share)
    return known, unknown


class ClassesEvaluator:
    """Draws `control.num_draws` images of each class, with the guidance weight `control.guidance`.

    A network with classes as input (`data.num_classes`) guides itself. The classifier of --mode=train_classifier guides
    other networks.

    The result reports the share of images that the classifier of clean images (`eval.features=classifier`) assigns to
    their class. That classifier has never seen noisy images, so it is independent of the classifier that guides.

    Raises:
        ValueError, OSError: from the constructor, for settings that are not allowed, or if the classifier is missing.
    """

    name = "classes"

    def __init__(self, run: Run, workdir: Workdir):
        self.run, self.preprocess = run, require_images(run, "classes")
        control = run.config.control
        self.sampler = run.sampler()
        source = datasets.source_from_config(run.config, "train")
        num_classes = run.config.data.num_classes or number_of_classes(source)
        self.labels = tuple(control.labels) or tuple(range(num_classes))
        if max(self.labels) >= num_classes:
            raise ValueError(
                f"control.labels is {self.labels}; the classes of {run.config.data.dataset} are 0 to {num_classes - 1}"
            )
        self.classifier, self.origin = None, "the network itself"
        if not run.config.data.num_classes:
            self.classifier, self.origin = ClassifierTraining(run).newest(workdir)
        self.scale, self.num_draws = float(control.guidance), control.num_draws
        parallel.divisible(run.config.sampling.batch_size, "sampling.batch_size")
        self.count = len(self.labels) * self.num_draws
        self.round_size = min(run.config.sampling.batch_size, padded_round(self.count))

    def __call__(self, params: Params, folder: EvaluationFolder) -> dict[str, Any]:
        """Draws the images in rounds. An interrupted run resumes with the next round.

        Raises:
            RuntimeError: if an image is not finite, or a solve fails.
        """
        run = self.run
        settings = {
            "labels": list(self.labels),
            "draws": self.num_draws,
            "guidance": self.scale,
            "guided_by": self.origin,
            "round_size": self.round_size,
            **run.sample_settings(),
            **self.preprocess.description,
        }
        cache = BatchCache(folder.path, self.name, settings | {"network": run.evaluated_network()}, params)
        sizes = _rounds(self.count, self.round_size)
        rounds = cache.all(sizes, lambda number, show: self._round(params, number, show), "sampling", "sample")
        images = np.concatenate([each["images"] for each in rounds])[: self.count]
        if jax.process_index() == 0:
            folder.write_picture(self.name, images, run.config.data.levels, self.num_draws)
        judge = classifier_from_config(run.config)()
        found = judge(images).logits.argmax(axis=1)
        accuracy = mean_estimate((found == self._labels_of(np.arange(self.count))).astype(np.float64))
        return {
            "accuracy": accuracy.mean,
            "se": accuracy.se,
            "n": accuracy.n,
            "judge_accuracy": judge.test_accuracy,
            **settings,
            "nfe": mean_evaluations(rounds),
            "seconds": float(sum(each["seconds"] for each in rounds)),
            **cache.origin(),
        }

    def _guided(self, params: Params, labels: Array) -> ScoreFn:
        score_fn = self.run.score_fn(params)
        if self.classifier is None:
            return ClassifierFreeScore(score_fn, score_fn.with_classes(labels), self.scale)
        return GuidedScore(score_fn, self.classifier, labels, self.scale)

    def _labels_of(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the classes of the images with these numbers. Each class has `num_draws` consecutive images."""
        return np.asarray(self.labels)[np.minimum(numbers // self.num_draws, len(self.labels) - 1)]

    def _round(self, params: Params, number: int, show: ReportProgress) -> Values:
        started, run = time.monotonic(), self.run
        numbers = np.arange(number * self.round_size, (number + 1) * self.round_size)
        rows = parallel.local_rows(len(numbers))
        indices, labels = (parallel.global_array(run.mesh, a[rows]) for a in (numbers, self._labels_of(numbers)))
        samples = self.sampler(self._guided(params, labels), run.key(SAMPLE_KEY), indices, run.data_shape, show)
        images = finite_levels(self.preprocess, samples.x, "Cannot draw images of classes")
        cost = {"nfe": np.asarray(samples.nfe), "seconds": np.asarray(time.monotonic() - started)}
        return {"images": images} | cost


def _rounds(count: int, size: int) -> dict[str, int]:
    """Returns the number of samples to keep from each round, by the name of the round."""
    return {f"round{first // size}": min(size, count - first) for first in range(0, count, size)}
