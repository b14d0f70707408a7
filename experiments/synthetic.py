"""Problems on which experiments/reproduce.py compares the orders, and their sizes."""

import dataclasses
from typing import Any

import numpy as np

SEEDS = (1, 2, 3)

BRANCHES = {"order1": 1, "order2": 2, "order3": 3, "continued3": 3, "order1_long": 1}
"""The orders of the compared models, by name.

"continued3" is trained with the first order for the first half of its steps, and then with the third. "order1_long" is
trained with the first order for as long as "order3" took."""

TEST_POINTS = 2000
NUM_TIMES, POINTS_AT_TIME = 16, 96
"""The number of times for the distances between scores, and of points at each time."""
SOURCE_POINTS = 24
"""The number of points at each time for the sources of the ODE's error."""
ENTROPY_POINTS = 32_768
STARTS, STARTING_POINTS = np.geomspace(1e-5, 0.3, 12), 500
"""The start times of the likelihood's solve, and the number of points for each."""
TOLERANCE = 1e-6
"""The tolerance of the solves that the distances need."""
START_TOLERANCE = 1e-4
"""The tolerance of the likelihoods from several start times."""
SDE_STEPS, SDE_CELLS = 400, 2000
"""Steps and cells of the Fokker-Planck equation of the SDE model."""
LOSS_POINTS = 20_000
"""Points for the variance of the loss."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """The data, SDE, network and size of a comparison: every model is trained for `steps` steps in total."""

    name: str
    """The name of the problem and of its file in configs/toy."""
    title: str
    dataset: str
    steps: int
    batch_size: int
    branch: tuple[int, ...]
    """Widths of the branches of the network."""
    trunk: tuple[int, ...]
    """Widths of the trunk of the network."""
    limit: float
    """Densities are drawn on [-limit, limit]^d."""
    grid: int
    minutes: float
    """Minutes for one seed on an idle CPU core."""

    def settings(self, seed: int) -> dict[str, Any]:
        """Returns the fields that differ from the configuration."""
        return {
            "seed": seed,
            "training.batch_size": self.batch_size,
            "training.snapshot_freq": self.steps // 2,
            "training.snapshot_freq_for_preemption": 1_000_000,
            "training.eval_freq": 1_000_000,
            "data.num_test_points": TEST_POINTS,
            "training.log_freq": 200,
            "model.mlp_time_widths": self.branch,
            "model.mlp_data_widths": self.branch,
            "model.mlp_widths": self.trunk,
            "eval.batch_size": TEST_POINTS,
            "eval.enable_sampling": False,
        }

    def scaled(self, factor: float) -> "Problem":
        """Returns the problem with its number of steps multiplied by `factor`, as a multiple of 200."""
        return dataclasses.replace(self, steps=200 * max(1, round(self.steps * factor / 200)))


_MIXTURE = (4000, 256, (32, 32, 32), (64, 64), 1.6, 321, 1.5)
_BOARD = (4000, 256, (48, 48, 48), (96, 96), 5.0, 48, 2.5)

PROBLEMS = (
    Problem("checkerboard_ve_published", "Checkerboard, VE, the paper's network", "checkerboard", *_BOARD),
    Problem("mixture_ve_published", "Mixture, VE, the paper's network", "mixture", *_MIXTURE),
    Problem("mixture_vp_published", "Mixture, VP, the paper's network", "mixture", *_MIXTURE),
    Problem("mixture_subvp_published", "Mixture, sub-VP, the paper's network", "mixture", *_MIXTURE),
    Problem("checkerboard_ve", "Checkerboard, VE, our network", "checkerboard", *_BOARD),
    Problem("mixture_ve", "Mixture, VE, our network", "mixture", *_MIXTURE),
)
