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
from tests.tiny_network import tiny_network


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


def test_parts_need_less_memory_and_give_the_same_values() -> None:
    """The test loss has to fit into the memory that is enough for a training step in parts."""
    images = np.random.default_rng(0).integers(0, 17, (64, 8, 8, 1)).astype(np.uint8)
    found = []
    for parts in (1, 4):
        config = get_config()
        config.training.update(score_matching_order=3, batch_size=64, accumulation_steps=parts)
        with tiny_network():
            evaluator = LossEvaluator(build(config), MemorySource(images, "images"))
            state = evaluator.run.fresh_state()
            program = jax.jit(evaluator._per_example).lower(state.params, images, jax.random.key(0)).compile()
        memory = program.memory_analysis()
        assert memory is not None
        found.append((memory.temp_size_in_bytes, program(state.params, images, jax.random.key(0))))
    (whole, values), (quarter, values_of_parts) = found
    assert quarter < 0.5 * whole
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), values, values_of_parts)
