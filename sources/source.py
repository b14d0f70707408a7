"""What a source is, and the two ways of holding images: decoded in memory, or as records decoded when asked for."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Protocol

import numpy as np
from jaxtyping import UInt8

from sources.splits import Levels

ImageLevels = UInt8[np.ndarray, "height width channel"]


class Source(Protocol):
    """The images of one split, in a fixed order, and what describes them; of densities, points stand for images."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(height, width, channels), or (d,) of points."""
        ...

    @property
    def description(self) -> str:
        """Name, version and split, as stamped into results; two sources of other images differ in it."""
        ...

    def __len__(self) -> int: ...

    def images(self, indices: np.ndarray) -> Levels:
        """The images of these indices."""
        ...


class Records(Protocol):
    """Byte strings in a fixed order, that threads may read at the same time."""

    def __len__(self) -> int: ...

    def __getitems__(self, record_keys: Sequence[int], /) -> Sequence[bytes]: ...


@dataclasses.dataclass(frozen=True)
class MemorySource:
    """Images held decoded in memory, or mapped into it, with class labels where there are any."""

    levels_array: Levels
    description: str
    labels: np.ndarray | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, height, width, channels = self.levels_array.shape
        return height, width, channels

    def __len__(self) -> int:
        return len(self.levels_array)

    def images(self, indices: np.ndarray) -> Levels:
        return np.asarray(self.levels_array[indices])


@dataclasses.dataclass(frozen=True)
class RecordSource:
    """Images decoded from records each time they are asked for, in threads: for what is too large for memory.

    `positions` are the records that belong to the split; `decode` takes one, and raises ValueError if it is no image.
    """

    records: Records
    positions: np.ndarray
    decode: Callable[[bytes], ImageLevels]
    image_shape: tuple[int, int, int]
    description: str
    workers: Executor = dataclasses.field(default_factory=ThreadPoolExecutor, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.positions)

    def images(self, indices: np.ndarray) -> Levels:
        if not len(indices):
            return np.empty((0, *self.image_shape), np.uint8)
        parts = np.array_split(np.asarray(indices), min(len(indices), os.cpu_count() or 1))
        return np.concatenate(list(self.workers.map(self._decoded, parts)))

    def _decoded(self, indices: np.ndarray) -> Levels:
        images = np.empty((len(indices), *self.image_shape), np.uint8)
        wanted = self.positions[indices].tolist()
        for row, (position, record) in enumerate(zip(wanted, self.records.__getitems__(wanted), strict=True)):
            try:
                images[row] = self.decode(record)
            except ValueError as error:
                raise ValueError(f"record {position} of {self.description} {error}") from error
        return images


def records_digest(records: Records, positions: np.ndarray, *settings: object) -> str:
    """Identifies images without reading all of them: by how they are decoded, their number, and 64 of the records."""
    chosen = positions[np.linspace(0, len(positions) - 1, 64, dtype=int)] if len(positions) else positions
    digest = hashlib.sha256(repr((settings, len(positions))).encode())
    for record in records.__getitems__(sorted({int(position) for position in chosen})):
        digest.update(record)
    return digest.hexdigest()[:12]
