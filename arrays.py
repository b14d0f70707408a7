"""The vocabulary of the project: types of batches, per-example numbers, score functions and progress reports."""

from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

Batch: TypeAlias = Float[Array, "batch *dims"]
"""Examples along the first axis; the other axes are data dimensions, d of them in total."""

Scalar: TypeAlias = Float[Array, ""]
"""One number for all examples, such as the time of a solver."""

PerExample: TypeAlias = Float[Array, " batch"]
"""One number for each example: a time, a loss, a log-likelihood in nats."""

Factor: TypeAlias = Float[Array, "batch *#dims"]
"""One number for each example, shaped [batch, 1, ..., 1] to multiply a batch."""

ScoreFn: TypeAlias = Callable[[Batch, PerExample], Batch]
"""score(x, t): an estimate of grad_x ln q_t(x). All that losses, likelihoods and samplers see of a network."""

ReportProgress: TypeAlias = Callable[[int, int], None]
"""report(steps_done, total_steps), called between the compiled calls of a long computation."""


def append_dims(values: Shaped[Array, " batch"], like: Shaped[Array, "batch *dims"]) -> Shaped[Array, "batch *#dims"]:
    """Reshapes one number for each example so that it multiplies a batch shaped as `like`."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def inner(a: Batch, b: Batch) -> PerExample:
    """Inner product over the data dimensions of each example."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)))


def mean_square(a: Batch) -> PerExample:
    """Mean over the data dimensions of the squared entries of each example."""
    return jnp.mean(jnp.square(a), axis=tuple(range(1, a.ndim)))


def num_dims(x: Batch) -> int:
    """d, the number of data dimensions of one example."""
    return x[0].size
