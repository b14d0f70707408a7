"""Points drawn from a density. Every run on a data set uses the same points."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Float

from configs.default import Config
from sources.densities import DENSITIES
from sources.splits import SPLITS

SEED = 0
"""The seed of the points of every data set. It is not the run's seed, so that runs are compared on the same points."""

IMAGE_FIELDS = ("centered", "random_flip", "uniform_dequantization", "bin_centers")
"""Fields of config.data that apply to images only."""


@dataclasses.dataclass(frozen=True)
class PointSource:
    """A `Source` of points. Its "images" are points of shape [d]."""

    points: Float[np.ndarray, "n d"]
    description: str

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.points.shape[1:]

    def __len__(self) -> int:
        return len(self.points)

    def images(self, indices: np.ndarray) -> Float[np.ndarray, "batch d"]:
        return self.points[indices]


def draw_points(data: Config, split: str) -> PointSource:
    """Draws the points of a split of `data.dataset`, one of DENSITIES.

    Raises:
        ValueError: if the number of points is below 1, or a field of config.data that applies to images only is set.
    """
    for field in IMAGE_FIELDS:
        if data[field]:
            raise ValueError(f"data.{field} is True, but {data.dataset} has points, not images; set it to False")
    field = "num_test_points" if split == "test" else "num_points"
    if data[field] < 1:
        raise ValueError(f"data.{field} is {data[field]}; it must be at least 1")
    density = DENSITIES[data.dataset]
    key = jax.random.fold_in(jax.random.key(SEED), SPLITS.index(split))
    points = np.asarray(density.sample(key, (data[field], density.dims)), np.float32)
    return PointSource(points, f"{data.dataset}, {split}, {len(points)} points of seed {SEED}")
