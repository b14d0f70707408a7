"""Samples drawn in rounds, of which each is kept when it is done."""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from evaluators.cache import BatchCache, Values
from sampling import Progress

Draw = Callable[[np.ndarray, Progress], tuple[np.ndarray, int]]
"""The samples with these numbers, and the network evaluations that each took; it may report its steps."""


class Rounds(NamedTuple):
    samples: np.ndarray
    nfe: int
    """Network evaluations for each sample."""
    seconds: float
    """That all rounds took, in whatever runs."""


def draw_in_rounds(keep: BatchCache, kind: str, wanted: int, size: int, draw: Draw) -> Rounds:
    """Samples 0, ..., `wanted` - 1 in rounds of `size`; those that an earlier run has left are not drawn again.

    Args:
        kind: of the samples, one word; rounds hold them under its plural.
        draw: called with the numbers of a whole round.
    """
    name = f"{kind}s"
    sizes = {f"round{first // size}": min(size, wanted - first) for first in range(0, wanted, size)}

    def draw_round(number: int, show: Progress) -> Values:
        started = time.monotonic()
        samples, nfe = draw(np.arange(number * size, (number + 1) * size), show)
        return {name: samples, "nfe": np.asarray(nfe), "seconds": np.asarray(time.monotonic() - started)}

    rounds = keep.all(sizes, draw_round, "sampling", kind)
    samples = np.concatenate([each[name] for each in rounds])[:wanted]
    return Rounds(samples, int(rounds[0]["nfe"]), float(sum(each["seconds"] for each in rounds)))
