"""Evaluator of the training objective on test data."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from arrays import Batch
from build import EVAL_KEY, Run
from datasets import Source, evaluation_batch, evaluation_batch_sizes
from evaluation import mean_estimate
from infra import parallel
from infra.workdir import EvaluationFolder
from models.score import Params


class LossEvaluator:
    """Computes the mean training objective and its terms on test data, with constant weights and without dropout."""

    name = "loss"

    def __init__(self, run: Run, source: Source):
        self.run, self.source = run, source
        self.batch_size = run.config.training.batch_size
        parallel.divisible(self.batch_size, "training.batch_size")
        self.eval_batches = run.config.training.eval_batches
        self.num_batches = len(evaluation_batch_sizes(source, self.batch_size))
        self.preprocess = run.preprocess.without_flip()
        self._losses = jax.jit(self._per_example)

    def __call__(self, params: Params, folder: EvaluationFolder) -> dict[str, Any]:
        """Computes means over all examples, with standard errors.

        Raises:
            KeyboardInterrupt: after a request to stop.
        """
        del folder  # Nothing is cached: the loss of all images takes little time.
        means = self._means(params, self.num_batches)
        if means is None:
            raise KeyboardInterrupt
        return means

    def first_batches(self, params: Params) -> dict[str, float] | None:
        """Computes means over the first `training.eval_batches` batches, always with the same noise.

        Returns None after a request to stop, and does not raise, so that training can save its state first.
        """
        means = self._means(params, min(self.eval_batches, self.num_batches))
        return None if means is None else {name: mean["mean"] for name, mean in means.items()}

    def _means(self, params: Params, num_batches: int) -> dict[str, dict[str, float]] | None:
        key = self.run.key(EVAL_KEY)
        parts = []
        for number in range(num_batches):
            if parallel.stop_requested():
                return None
            parts.append(self._values(params, number, jax.random.fold_in(key, number)))
        names = parts[0][0]
        return {name: mean_estimate(np.concatenate([v[name][c] for v, c in parts]))._asdict() for name in names}

    def _values(self, params: Params, number: int, key: Array) -> tuple[dict[str, np.ndarray], np.ndarray]:
        batch = evaluation_batch(self.source, self.batch_size, number)
        images = parallel.global_array(self.run.mesh, batch.images[parallel.local_rows(self.batch_size)])
        return parallel.fetch(self._losses(params, images, key)), batch.counts

    def _per_example(self, params: Params, images: Array, key: Array) -> dict[str, Array]:
        data_key, noise_key, order_key = jax.random.split(key, 3)
        x0 = self.preprocess(data_key, images)
        objective = self.run.trainer.objective.for_evaluation()
        noise = objective.draw_noise(noise_key, self.run.sde, x0.shape)
        # Even times rise from row to row. In random order, a batch that is not full has times of all sizes, too.
        order = jax.random.permutation(order_key, len(x0))
        noise = jax.tree.map(lambda rows: rows[order], noise)
        score_fn, trainer = self.run.score_fn(params), self.run.trainer

        def losses(part: tuple[Batch, Any]) -> dict[str, Array]:
            return objective.losses(score_fn, self.run.sde, *part)

        with trainer.arithmetic():
            if trainer.accumulation_steps == 1:
                return losses((x0, noise))
            # As many parts as in training, so that the test loss fits the memory that training needs.
            return jax.tree.map(trainer.join, jax.lax.map(losses, jax.tree.map(trainer.split, (x0, noise))))
