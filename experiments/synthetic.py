"""Problems on which experiments/reproduce.py compares the orders, and their sizes."""

import dataclasses
from typing import Any

import numpy as np

SEEDS = (1, 2, 3)

BRANCHES = {"order1": 1, "order2": 2, "order3": 3, "order1_long": 1}
"""The orders of the compared models, by name. "order1_long" is "order1", trained for as long as "order3"."""

TEST_POINTS = 2000
NUM_TIMES, POINTS_AT_TIME = 16, 256
"""The number of times for the distances between scores, and of points at each time."""
ENTROPY_POINTS = 32_768
STARTS, STARTING_POINTS = np.geomspace(1e-5, 0.3, 12), 500
"""The start times of the likelihood's solve, and the number of points for each."""
TOLERANCE = 1e-3
"""The tolerance of the solves that the distances need."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """The data, SDE and size of a comparison: `base` steps of the first order, then `steps` steps of each order."""

    name: str
    """The name of the problem and of its file in configs/toy."""
    title: str
    dataset: str
    base: int
    steps: int
    batch_size: int
    widths: tuple[int, int]
    """Widths of the branches and of the trunk of the network."""
    limit: float
    """Densities are drawn on [-limit, limit]^d."""
    grid: int
    minutes: float
    """Minutes for one seed on an idle CPU core."""

    def settings(self, seed: int) -> dict[str, Any]:
        """Returns the fields that differ from the configuration."""
        branch, trunk = self.widths
        return {
            "seed": seed,
            "training.batch_size": self.batch_size,
            "training.snapshot_freq": self.steps,
            "training.snapshot_freq_for_preemption": 1_000_000,
            "training.eval_freq": 1_000_000,
            "data.num_test_points": TEST_POINTS,
            "model.mlp_time_widths": (branch, branch),
            "model.mlp_data_widths": (branch, branch),
            "model.mlp_widths": (trunk, trunk),
            "eval.batch_size": TEST_POINTS,
            "eval.enable_sampling": False,
        }

    def scaled(self, factor: float) -> "Problem":
        """Returns the problem with its numbers of steps multiplied by `factor`."""
        return dataclasses.replace(self, base=round(self.base * factor), steps=round(self.steps * factor))


PROBLEMS = (
    Problem("mixture_ve", "Mixture, VE", "mixture", 12_000, 6000, 256, (32, 64), 1.6, 321, 1.0),
    Problem("checkerboard_ve", "Checkerboard, VE", "checkerboard", 12_000, 6000, 256, (48, 96), 5.0, 48, 2.0),
    Problem("mixture_vp", "Mixture, VP", "mixture", 12_000, 6000, 256, (32, 64), 1.6, 321, 1.0),
)
