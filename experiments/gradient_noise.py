"""Prints the signal, the noise and the direction of the gradient of each loss term, at a trained model.

Let g be the gradient of a term on one batch. The signal |E g| comes from an unbiased estimate of |E g|^2 over pairs of
batches. The noise is the square root of E|g - E g|^2. The cosine is taken between the mean gradients of a term and of
the first order. Weights by noise level and a high_order_fraction do not apply here.

    python -m experiments.gradient_noise --config=configs/digits/ncsnpp.py --workdir=runs/order1
    python -m experiments.gradient_noise --config=configs/digits/ncsnpp.py --workdir=runs/order1 \
        --config.training.high_order_estimator=unbiased
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.flatten_util import ravel_pytree
from ml_collections import config_flags

from build import TRAIN_KEY, Run, build
from datasets import BatchOrder, source_from_config
from infra.console import one_line_errors, text_table
from losses import TERMS

_CONFIG = config_flags.DEFINE_config_file("config", None, "The configuration of the run.")
_WORKDIR = flags.DEFINE_string("workdir", None, "A run; its newest checkpoint is used.")
_BATCHES = flags.DEFINE_integer("batches", 200, "Number of batches.", lower_bound=2)
flags.mark_flags_as_required(["config", "workdir"])


WITH_GRADIENT = [name for name, term in TERMS.items() if term.order]
"""The terms of an objective of order 3."""


def main(argv: list[str]) -> None:
    del argv
    config = _CONFIG.value
    config.training.score_matching_order, config.training.exact_derivatives = 3, False
    run = build(config)
    params = run.load_state(Path(str(_WORKDIR.value))).ema_params
    gradients = term_gradients(run, params, _BATCHES.value)
    signal = mean_products(gradients)
    noise = np.sqrt(np.mean(np.sum((gradients - gradients.mean(0)) ** 2, axis=2), axis=0))
    rows = []
    for i, term in enumerate(WITH_GRADIENT):
        size = np.sqrt(max(signal[i, i], 0))
        cosine = signal[0, i] / (np.sqrt(max(signal[0, 0], 0)) * size) if size else float("nan")
        rows.append((term, f"{size:.4f}", f"{noise[i]:.4f}", f"{size / noise[i]:.4f}", f"{cosine:+.2f}"))
    print(f"batch {config.training.batch_size}, {_BATCHES.value} batches, {_WORKDIR.value}")
    print(f"orders 2 and 3: {config.training.high_order_estimator}")
    print(text_table(("term", "|mean gradient|", "noise of one batch", "ratio", "cosine with first"), rows))


def term_gradients(run: Run, params: object, batches: int) -> np.ndarray:
    """Returns the gradient of each term's mean over a batch as [batches, terms, parameters].

    The terms are in the order of `WITH_GRADIENT`. Each batch has its own noise.
    """
    source = source_from_config(run.config, "train")
    order = BatchOrder(len(source), run.config.training.batch_size, run.config.seed)
    objective = run.trainer.objective.for_evaluation()

    @jax.jit
    def gradients(params: object, images: jax.Array, key: jax.Array) -> jax.Array:
        data_key, noise_key = jax.random.split(key)
        x0 = run.preprocess(data_key, images)
        noise = objective.draw_noise(noise_key, run.sde, x0.shape)

        def means(params: object) -> jax.Array:
            losses = objective.losses(run.score_fn(params), run.sde, x0, noise)
            return jnp.stack([jnp.mean(losses[term]) for term in WITH_GRADIENT])

        _, pull_back = jax.vjp(means, params)
        return jnp.stack([ravel_pytree(pull_back(one)[0])[0] for one in jnp.eye(len(WITH_GRADIENT))])

    keys = jax.random.split(run.key(TRAIN_KEY), batches)
    return np.stack([gradients(params, source.images(order[n]), keys[n]) for n in range(batches)])


def mean_products(gradients: np.ndarray) -> np.ndarray:
    """Returns the inner products of mean gradients as [terms, terms].

    The estimate is unbiased, because it pairs different batches only.
    """
    n = len(gradients)
    total = gradients.sum(0, dtype=np.float64)
    same = np.einsum("nip,njp->ij", gradients, gradients, dtype=np.float64, optimize=True)
    return (total @ total.T - same) / (n * (n - 1))


if __name__ == "__main__":
    with one_line_errors():
        app.run(main)
