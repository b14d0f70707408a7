"""The test loss counts each example once, with times of all sizes."""

import dataclasses
from typing import Any

import jax
import numpy as np

from arrays import Batch, PerExample, ScoreFn
from build import build
from configs.digits.smoke import get_config
from datasets import MemorySource
from evaluators.loss import LossEvaluator
from losses import Noise, Objective
from objectives.objective import Residual
from sde_lib import SDE


class Times(Objective):
    """An objective whose loss is the time of the example."""

    def losses(
        self, score_fn: ScoreFn, sde: SDE, x0: Batch, noise: Noise, residual: Residual | None = None
    ) -> dict[str, PerExample]:
        return {"total": noise.t}


def test_even_times_are_spread_over_a_batch_that_is_not_full() -> None:
    """Even times rise from row to row, so the two images of a batch for 16 would have neighbouring times."""
    run: Any = build(get_config())
    object.__setattr__(run, "trainer", dataclasses.replace(run.trainer, objective=Times(stratified_times=True)))
    evaluator = LossEvaluator(run, MemorySource(np.zeros((2, 8, 8, 1), np.uint8), "images"))
    assert evaluator.batch_size == 16
    apart = []
    for seed in range(8):
        values, counts = evaluator._values({}, 0, jax.random.key(seed))
        distance = abs(np.subtract(*values["total"][counts]))
        apart.append(min(distance, 1 - distance))
    assert np.mean(apart) > 0.15  # 1/4 on average, and 1/16 for neighbours
