"""Samples drawn in rounds, of which each is kept when it is done."""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from passes.keep import Keep, Values
from records import progress
from sampling import Progress

Draw = Callable[[np.ndarray, Progress], tuple[np.ndarray, int]]
"""The samples with these numbers, and the network evaluations that each took; it may report its steps."""


class Rounds(NamedTuple):
    samples: np.ndarray
    nfe: int
    """Network evaluations for each sample."""
    seconds: float
    """That all rounds took, in whatever runs."""


def draw_in_rounds(keep: Keep, kind: str, wanted: int, size: int, draw: Draw) -> Rounds:
    """Samples 0, ..., `wanted` - 1 in rounds of `size`; those that an earlier run has left are not drawn again.

    Args:
        kind: of the samples, one word; rounds hold them under its plural.
        draw: called with the numbers of a whole round.
    """
    sizes = {f"round{first // size}": min(size, wanted - first) for first in range(0, wanted, size)}
    rounds: list[Values] = []
    with progress(wanted, "sampling", kind, initial=keep.count(sizes)) as bar:

        def show(step: int, steps: int) -> None:
            bar.set_postfix(step=f"{step}/{steps}", refresh=False)
            bar.update(0)  # draws it, if it is time to

        for number, name in enumerate(sizes):
            numbers = np.arange(number * size, (number + 1) * size)
            rounds.append(keep(name, functools.partial(_round, f"{kind}s", draw, numbers, show)))
            bar.update(max(0, min((number + 1) * size, wanted) - bar.n))
    samples = np.concatenate([each[f"{kind}s"] for each in rounds])[:wanted]
    return Rounds(samples, int(rounds[0]["nfe"]), float(sum(each["seconds"] for each in rounds)))


def _round(name: str, draw: Draw, numbers: np.ndarray, show: Progress) -> Values:
    started = time.monotonic()
    samples, nfe = draw(numbers, show)
    return {name: samples, "nfe": np.asarray(nfe), "seconds": np.asarray(time.monotonic() - started)}
