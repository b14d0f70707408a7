"""Draws seeded batches from a source.

Batches of images are unsigned bytes, the levels 0 .. levels-1, until they are on the devices. There `Preprocess`
mirrors, dequantizes and scales them. So all randomness of a batch follows from the seed and the step, on any number of
hosts. Points of a density are 32-bit floats, which are not changed.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Float, Int

from arrays import Batch, LabelledBatch, append_dims
from configs.default import Config
from coordinates import GaussianReference
from infra.parallel import local_rows, pad_rows
from infra.waiting import waiting
from sources import MemorySource as MemorySource  # re-exported: callers need only this module
from sources import Source as Source
from sources import source_from_config as source_from_config
from sources.densities import DENSITIES
from sources.resizing import decode_grey as decode_grey
from sources.source import Examples
from sources.splits import SPLITS as SPLITS


def labels_of(source: Source) -> Int[np.ndarray, " n"]:
    """Returns the class of each image. Raises ValueError if the data have no classes, or a class is negative."""
    labels = getattr(source, "labels", None)
    if labels is None:
        raise ValueError(f"{source.description} has no class labels; set data.dataset to data with labels, as digits")
    if np.min(labels) < 0:
        raise ValueError(f"{source.description} has class {np.min(labels)}; classes are numbered from 0")
    return np.asarray(labels, np.int32)


def check_classes(source: Source, num_classes: int) -> None:
    """Raises ValueError if the images have no classes, or a class is not below `data.num_classes`."""
    largest = int(labels_of(source).max())
    if largest >= num_classes:
        raise ValueError(f"data.num_classes is {num_classes}, but {source.description} has class {largest}")


@dataclasses.dataclass(frozen=True)
class BatchOrder:
    """The images of training batch k: shuffled epochs, one after another, cut into batches.

    The order is a pure function of (seed, k). So resuming needs only the step, and each host can compute its own rows.
    """

    num_images: int
    batch_size: int
    seed: int

    def __getitem__(self, step: int) -> np.ndarray:
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = positions // self.num_images
        indices = np.empty(self.batch_size, np.int64)
        for epoch in range(epochs[0], epochs[-1] + 1):
            here = epochs == epoch
            indices[here] = _permutation(self.seed, int(epoch), self.num_images)[positions[here] % self.num_images]
        return indices


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of the images in an epoch. Cached, because a permutation takes longer than reading a batch."""
    return np.random.default_rng((seed, epoch)).permutation(size)


class _TrainingBatches:
    """Random access to this host's rows of every training batch, for grain to read ahead from."""

    def __init__(self, source: Source, order: BatchOrder, num_batches: int, with_labels: bool):
        self.source, self.order, self.num_batches = source, order, num_batches
        self.labels = labels_of(source) if with_labels else None

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> Examples | LabelledBatch:
        rows = self.order[index][local_rows(self.order.batch_size)]
        images = self.source.images(rows)
        return images if self.labels is None else LabelledBatch(images, self.labels[rows])


def training_batches(
    source: Source, batch_size: int, seed: int, first_step: int, num_steps: int, with_labels: bool = False
) -> Iterator[Any]:
    """Yields this host's rows of batches first_step, ..., num_steps - 1, read ahead in threads.

    The batches are `Examples`, or `LabelledBatch` if `with_labels`.

    Raises:
        ValueError: if the data have no labels.
    """
    if first_step >= num_steps:
        return iter(())
    batches = _TrainingBatches(source, BatchOrder(len(source), batch_size, seed), num_steps, with_labels)
    read = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
    iterator = iter(grain.MapDataset.source(batches).to_iter_dataset(read))
    iterator.set_state({"next_index": first_step})
    return iterator


def training_calls(
    source: Source,
    batch_size: int,
    seed: int,
    first_step: int,
    last_step: int,
    every: Sequence[int],
    with_labels: bool = False,
) -> Iterator[tuple[int, Any]]:
    """Yields, for each compiled call from `first_step` on, the step at its end and this host's rows of its batches.

    The batches of `training_batches` are stacked along a new first axis of steps.

    Args:
        every: a call ends at each multiple of each of these numbers of steps, wherever training starts. So a resumed
            run makes the same calls, and the states at those steps can be saved.
    """
    batches = training_batches(source, batch_size, seed, first_step, last_step, with_labels)
    step = first_step
    while step < last_step:
        end = end_of_call(step, last_step, every)
        with waiting(f"the training images of steps {step} to {end} from {source.description}"):
            stacked = jax.tree.map(lambda *each: np.stack(each), *(next(batches) for _ in range(step, end)))
        yield end, stacked
        step = end


def end_of_call(step: int, last_step: int, every: Sequence[int]) -> int:
    """Returns the step at the end of the compiled call that begins at `step`. `every` is as in `training_calls`."""
    return min(last_step, *((step // steps + 1) * steps for steps in every))


def batch_shapes(config: Config, data_shape: tuple[int, ...], steps: int, sharding: Sharding) -> Any:
    """Returns the shapes and dtypes of global training batches, stacked along a first axis of steps."""
    size, dtype = config.training.batch_size, jnp.float32 if has_points(config) else jnp.uint8
    images = jax.ShapeDtypeStruct((steps, size, *data_shape), dtype, sharding=sharding)
    if not config.data.num_classes:
        return images
    return LabelledBatch(images, jax.ShapeDtypeStruct((steps, size), jnp.int32, sharding=sharding))


class EvaluationBatch(NamedTuple):
    """A batch in the order of the source. Rows past the last example are padding and do not count."""

    images: Examples
    indices: np.ndarray
    counts: np.ndarray


def evaluation_batch(source: Source, batch_size: int, number: int, max_examples: int = 0) -> EvaluationBatch:
    """Batch `number` of the source, in which every example counts exactly once."""
    end = min(len(source), max_examples or len(source))
    indices = np.arange(number * batch_size, min((number + 1) * batch_size, end))
    images = source.images(indices)
    images, padded_indices = pad_rows(batch_size, images, indices)
    return EvaluationBatch(images, padded_indices, np.arange(batch_size) < len(indices))


def evaluation_batch_sizes(source: Source, batch_size: int, max_examples: int = 0) -> list[int]:
    """The number of examples that count in each batch of the source."""
    end = min(len(source), max_examples or len(source))
    return [min(batch_size, end - start) for start in range(0, end, batch_size)]


ROUNDINGS: dict[str, Callable[[Array], Array]] = {"truncate": jnp.floor, "nearest": jnp.round}
"""Functions that convert pixel values to levels, by eval.rounding. The published code truncates."""


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Converts integer levels to the data that the score network sees, and back."""

    levels: int
    centered: bool
    random_flip: bool = False
    dequantize: bool = False
    bin_centers: bool = False
    """Whether data without noise are the middles of bins, (k + 1/2) / levels, instead of k / (levels - 1)."""
    rounding: str = "truncate"
    """How samples become levels if the data are bare levels, one of `ROUNDINGS`."""

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"eval.rounding is {self.rounding!r}; known: {', '.join(ROUNDINGS)}")

    @property
    def description(self) -> dict[str, Any]:
        """The settings by which levels become data, without mirroring, and samples become levels."""
        return self.data_description | {"rounding": "down" if self._in_bins else self.rounding}

    @property
    def data_description(self) -> dict[str, Any]:
        """The settings by which levels become data, without mirroring."""
        return {"dequantize": self.dequantize, "bin_centers": self.bin_centers}

    @property
    def _in_bins(self) -> bool:
        """Whether data lie inside the bins of their levels, so that samples are rounded down to levels."""
        return self.dequantize or self.bin_centers

    def __call__(self, key: Array, images: Array) -> Batch:
        """Mirrors images at random and dequantizes them, if configured, then scales them for the network."""
        flip_key, noise_key = jax.random.split(key)
        if self.random_flip:
            images = random_mirror(flip_key, images)
        if self.dequantize:
            return self.scale(uniform_dequantize(noise_key, images, self.levels))
        if self.bin_centers:
            return self.scale((images.astype(jnp.float32) + 0.5) / self.levels)
        return self.scale(images.astype(jnp.float32) / (self.levels - 1))

    def without_flip(self) -> "Preprocess":
        """Returns the same preprocessing without mirroring, for test images."""
        return dataclasses.replace(self, random_flip=False)

    def scale(self, unit: Batch) -> Batch:
        """Scales values from [0, 1] to the range of the score network."""
        return 2 * unit - 1 if self.centered else unit

    def unscale(self, x: Batch) -> Batch:
        """The inverse of `scale`."""
        return (x + 1) / 2 if self.centered else x

    @property
    def unit_scale(self) -> float:
        """The derivative of `unscale`."""
        return 0.5 if self.centered else 1.0

    @property
    def data_range(self) -> tuple[float, float]:
        """The least and the greatest value that the score network sees."""
        return (-1.0, 1.0) if self.centered else (0.0, 1.0)

    def to_levels(self, x: Float[Array, "batch height width channel"]) -> Array:
        """Converts samples to integer levels. By bin, if data have noise or are middles of bins, else by `rounding`."""
        unit = self.unscale(x)
        level = jnp.floor(unit * self.levels) if self._in_bins else ROUNDINGS[self.rounding](unit * (self.levels - 1))
        return jnp.clip(level, 0, self.levels - 1).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class PointPreprocess:
    """Leaves points unchanged."""

    def __call__(self, key: Array, points: Float[Array, "batch d"]) -> Batch:
        del key
        return points

    def without_flip(self) -> "PointPreprocess":
        return self

    @property
    def data_range(self) -> None:
        """Points may lie anywhere."""
        return None


def random_mirror(key: Array, images: Array) -> Array:
    """Mirrors each image left-right with probability 1/2."""
    mirror = jax.random.bernoulli(key, shape=images.shape[:1])
    return jnp.where(append_dims(mirror, images), images[:, :, ::-1], images)


def uniform_dequantize(key: Array, images: Array, levels: int) -> Batch:
    """(k + u) / levels for level k, u uniform on [0, 1): data on [0, 1) with the density's bits/dim."""
    return (images.astype(jnp.float32) + jax.random.uniform(key, images.shape)) / levels


def has_points(config: Config) -> bool:
    """Returns whether the data are points of a density, not images."""
    return config.data.dataset in DENSITIES


def training_preprocess(config: Config) -> Preprocess | PointPreprocess:
    """Returns the preprocessing of training data, which may mirror and dequantize them."""
    return PointPreprocess() if has_points(config) else preprocess_from_config(config, train=True)


def preprocess_from_config(config: Config, *, train: bool) -> Preprocess:
    """Returns the preprocessing as configured. For evaluation it does not mirror, and it dequantizes, for bits/dim.

    Raises:
        ValueError: if the configuration asks for uniform noise in the bins and for the middles of the bins.
    """
    if config.data.bin_centers and config.data.uniform_dequantization:
        raise ValueError("data.bin_centers and data.uniform_dequantization are True, but exclude each other: set one")
    return Preprocess(
        levels=config.data.levels,
        centered=config.data.centered,
        random_flip=config.data.random_flip and train,
        dequantize=config.data.uniform_dequantization or not train,
        bin_centers=config.data.bin_centers,
        rounding=config.eval.rounding,
    )


REFERENCE_EXAMPLES = 10_000
"""The largest number of training examples from which the mean and standard deviation of the data are computed."""

_BLOCK = 256  # The number of images in memory at a time; images may be large.


def data_reference(source: Source, levels: int, bins_per_unit: int, centered: bool) -> GaussianReference:
    """Returns the mean and standard deviation of each entry of the network's data, from the first images of a source.

    If `bins_per_unit` is `levels` - 1, the data are bare levels in the middle of their bins. Otherwise they have
    uniform noise.
    """
    count = min(len(source), REFERENCE_EXAMPLES)
    total, squares = np.zeros((2, *source.image_shape), np.int64)
    for first in range(0, count, _BLOCK):
        images = source.images(np.arange(first, min(first + _BLOCK, count)))
        total += images.sum(axis=0, dtype=np.int64)
        # The squares of unsigned bytes need twice as many bits.
        squares += np.square(images, dtype=np.uint16).sum(axis=0, dtype=np.int64)
    mean = total / count
    variance = squares / count - mean**2
    bare, scale = bins_per_unit < levels, (2.0 if centered else 1.0) / bins_per_unit
    middle, noise = (0.0, 0.0) if bare else (0.5, 1 / 12)
    std = scale * np.sqrt(np.maximum(variance, 0) + noise)
    lowest = -1.0 if centered else 0.0
    return GaussianReference((lowest + scale * (mean + middle)).astype(np.float32), std.astype(np.float32))
