"""The vocabulary of the project: types of batches, per-example numbers, score functions and progress reports."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
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
"""score(x, t): an estimate of grad_x ln q_t(x). Losses, likelihoods and samplers see a network only in this form."""


class LabelledBatch(NamedTuple):
    """Images as integer levels, and their classes. Both may have one more axis before the axis of examples."""

    images: Any
    labels: Any


ReportProgress: TypeAlias = Callable[[int, int], None]
"""report(steps_done, total_steps), called between the compiled calls of a long computation. An exception stops it."""

State = TypeVar("State")
Function = TypeVar("Function", bound=Callable)


def as_pytree(function: Function) -> Function:
    """Makes a callable an argument of jit: returns it if it is a pytree of arrays, otherwise wraps it as one."""
    is_leaf = jax.tree.all(jax.tree.map(lambda leaf: leaf is function, function))
    return jax.tree_util.Partial(function) if is_leaf and jax.tree.leaves(function) else function  # pyright: ignore[reportReturnType]


PART_SECONDS = 1.0
"""The time that one part of a long computation should take."""


def in_parts(
    advance: Callable[[State, int, int], State],
    state: State,
    steps: int,
    progress: ReportProgress | None,
    done: Callable[[State], tuple[int, int]] | None = None,
) -> State:
    """Runs steps 0, ..., `steps` - 1 of a computation in parts, so that it can be watched and stopped between them.

    The parts grow until each takes about `PART_SECONDS`. Several hosts, whose clocks differ, take single steps.

    Args:
        advance: advance(state, first, last) runs steps first, ..., last - 1. It is compiled for any bounds.
        progress: called after each part. None: all steps are one part.
        done: computes the (steps_done, total_steps) to report from the state; the computation ends when they are equal.
            None: the steps taken, out of `steps`.
    """
    if progress is None:
        return advance(state, 0, steps)
    first, size, report = 0, 1, (0, steps)
    while first < steps and report[0] < report[1]:
        started, last = time.monotonic(), min(first + size, steps)
        state = jax.block_until_ready(advance(state, first, last))
        report = (last, steps) if done is None else done(state)
        progress(*report)
        seconds, first = time.monotonic() - started, last
        if jax.process_count() == 1:
            size = 2 * size if seconds < PART_SECONDS / 2 else max(1, int(size * min(1, PART_SECONDS / seconds)))
    return state


def append_dims(values: Shaped[Array, " batch"], like: Shaped[Array, "batch *dims"]) -> Shaped[Array, "batch *#dims"]:
    """Reshapes one number for each example so that it multiplies a batch shaped as `like`."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def level_values(levels: int, centered: bool, bare: bool) -> Float[np.ndarray, " {levels}"]:
    """Returns the data value of each grey level k: k / (levels - 1) if `bare`, otherwise the middle of its bin.

    The bins tile [0, 1]. With `centered`, values are scaled from [0, 1] to [-1, 1].
    """
    unit = np.arange(levels) / (levels - 1) if bare else (np.arange(levels) + 0.5) / levels
    return (2 * unit - 1 if centered else unit).astype(np.float32)


def inner(a: Batch, b: Batch) -> PerExample:
    """Inner product over the data dimensions of each example."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)))


def mean_square(a: Batch) -> PerExample:
    """Mean over the data dimensions of the squared entries of each example."""
    return jnp.mean(jnp.square(a), axis=tuple(range(1, a.ndim)))


def num_dims(x: Batch) -> int:
    """d, the number of data dimensions of one example."""
    return x[0].size
