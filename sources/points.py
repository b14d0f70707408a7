"""Points drawn from a density, once and for all: every run of a data set sees the same ones."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Float

from configs.default import Config
from sources.densities import DENSITIES
from sources.splits import SPLITS

SEED = 0
"""Of the points of every data set. It is not the run's: runs of several seeds are compared on the same points."""

OF_IMAGES = ("centered", "random_flip", "uniform_dequantization")
"""Fields of config.data that say what is done with images."""


@dataclasses.dataclass(frozen=True)
class PointSource:
    """A `Source` of points: an "image" is one of them, of shape [d]."""

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
    """The points of a split of `data.dataset`, one of DENSITIES.

    Raises:
        ValueError: for a number of points below 1, or if config.data asks for something that is done with images.
    """
    for field in OF_IMAGES:
        if data[field]:
            raise ValueError(f"data.{field} is True, but {data.dataset} has points, not images: set it to False")
    field = "num_test_points" if split == "test" else "num_points"
    if data[field] < 1:
        raise ValueError(f"data.{field} is {data[field]}; it must be at least 1")
    density = DENSITIES[data.dataset]
    key = jax.random.fold_in(jax.random.key(SEED), SPLITS.index(split))
    points = np.asarray(density.sample(key, (data[field], density.dims)), np.float32)
    return PointSource(points, f"{data.dataset}, {split}, {len(points)} points of seed {SEED}")
