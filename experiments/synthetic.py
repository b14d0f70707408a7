"""The problems that experiments/reproduce.py compares the orders on, and their sizes."""

import dataclasses
from typing import Any

import numpy as np

SEEDS = (1, 2, 3)

BRANCHES = {"order1": 1, "order2": 2, "order3": 3, "order1_long": 1}
"""The models that are compared, with their orders; the last is the first, trained for as long as the third."""

TEST_POINTS = 2000
NUM_TIMES, POINTS_AT_TIME = 16, 256
"""Of the distances between scores against time."""
ENTROPY_POINTS = 32_768
STARTS, STARTING_POINTS = np.geomspace(1e-5, 0.3, 12), 500
"""Times that a likelihood's solve starts at, and the points solved from each."""
TOLERANCE = 1e-3
"""Of the solves behind the distances."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Data, SDE and size of a comparison; `steps` more of each order follow on `base` steps of the first."""

    name: str
    """Also that of its file in configs/toy."""
    title: str
    dataset: str
    base: int
    steps: int
    batch_size: int
    widths: tuple[int, int]
    """Of the network's branches and of its trunk."""
    limit: float
    """Densities are drawn on [-limit, limit]^d."""
    grid: int
    minutes: float
    """Of one seed, on one idle CPU core."""

    def settings(self, seed: int) -> dict[str, Any]:
        """What differs from the configuration."""
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
        """The same with a multiple of the steps."""
        return dataclasses.replace(self, base=round(self.base * factor), steps=round(self.steps * factor))


PROBLEMS = (
    Problem("mixture_ve", "Mixture, VE", "mixture", 12_000, 6000, 256, (32, 64), 1.6, 321, 1.0),
    Problem("checkerboard_ve", "Checkerboard, VE", "checkerboard", 12_000, 6000, 256, (48, 96), 5.0, 48, 2.0),
    Problem("mixture_vp", "Mixture, VP", "mixture", 12_000, 6000, 256, (32, 64), 1.6, 321, 1.0),
)
