"""The training objective on images not trained on."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array

import parallel
from build import EVAL_KEY, Run
from datasets import Source, evaluation_batch, evaluation_batch_sizes
from evaluation import mean_estimate
from losses import draw_noise, score_matching_losses
from models.score import Params
from passes.keep import Values


class LossPass:
    """The training objective, without dropout, on images not trained on."""

    def __init__(self, run: Run, source: Source):
        self.run, self.source = run, source
        self.batch_size = run.config.training.batch_size
        self.num_batches = len(evaluation_batch_sizes(source, self.batch_size))
        self.preprocess = run.trainer.preprocess.without_flip()
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
