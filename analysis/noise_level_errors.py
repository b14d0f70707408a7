"""Errors of a score model at one noise level, example by example."""

import jax
from jaxtyping import Array

from arrays import Batch, PerExample, ScoreFn, append_dims, inner, mean_square, num_dims
from derivatives import PROBES, probe_divergence


@jax.jit
def draw_noise_and_probes(keys: Array, like: Batch) -> tuple[Batch, Batch, Batch]:
    """Draws normal noise and two Rademacher probes for each image, from one key for each image."""
    shape = like.shape[1:]

    def one(own: Array) -> tuple[Array, Array, Array]:
        z, first, second = jax.random.split(own, 3)
        probe = PROBES["rademacher"]
        return jax.random.normal(z, shape), probe(first, shape), probe(second, shape)

    return jax.vmap(one)(keys)


@jax.jit
def errors_at(
    score_fn: ScoreFn, x: Batch, t: PerExample, sigma: PerExample, z: Batch, probe: Batch
) -> dict[str, Array]:
    """Returns the score at the noised data x = mean + sigma z, and the errors of its value and its trace, over d.

    Returns:
        `score`; `first`, the first-order loss |u|^2 / d with u = sigma s + z; and `trace_bias`, which is
        (sigma^2 tr J + d - |u|^2) / d with the trace estimated by the probe. Its mean is 0 for the exact score.
    """
    with jax.default_matmul_precision("highest"):
        score, trace = probe_divergence(lambda x: score_fn(x, t), x, probe)
    u, d = append_dims(sigma, x) * score + z, num_dims(x)
    return {"score": score, "first": mean_square(u), "trace_bias": (sigma**2 * trace + d - inner(u, u)) / d}
