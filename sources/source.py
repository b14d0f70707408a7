"""The interface of a source, and its two forms: images decoded in memory, and records decoded when they are needed."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8

from sources.splits import ImageArray

SingleImage = UInt8[np.ndarray, "height width channel"]

Examples = ImageArray | Float[np.ndarray, "batch d"]
"""Images, or points."""


@runtime_checkable
class Source(Protocol):
    """The images of one split in a fixed order, with a description. The "images" of a density are points."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(height, width, channels) of an image, or (d,) of a point."""
        ...

    @property
    def description(self) -> str:
        """Name, version and split, as recorded in results. Sources with other images have other descriptions."""
        ...

    def __len__(self) -> int: ...

    def images(self, indices: np.ndarray) -> Examples:
        """Returns the images at these indices."""
        ...


@runtime_checkable
class Records(Protocol):
    """Byte strings in a fixed order. Several threads may read them at the same time."""

    def __len__(self) -> int: ...

    def __getitems__(self, record_keys: Sequence[int], /) -> Sequence[bytes]: ...


@dataclasses.dataclass(frozen=True)
class MemorySource:
    """Decoded images in memory, or mapped into it, with class labels if there are any."""

    levels_array: ImageArray
    description: str
    labels: np.ndarray | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, height, width, channels = self.levels_array.shape
        return height, width, channels

    def __len__(self) -> int:
        return len(self.levels_array)

    def images(self, indices: np.ndarray) -> ImageArray:
        return np.asarray(self.levels_array[indices])


@dataclasses.dataclass(frozen=True)
class RecordSource:
    """Images that threads decode from records each time they are read: for data sets too large for memory.

    `positions` are the positions of the split's records. `decode` decodes one record and raises ValueError if it is not
    an image.
    """

    records: Records
    positions: np.ndarray
    decode: Callable[[bytes], SingleImage]
    image_shape: tuple[int, int, int]
    description: str
    workers: Executor = dataclasses.field(default_factory=ThreadPoolExecutor, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.positions)

    def images(self, indices: np.ndarray) -> ImageArray:
        if not len(indices):
            return np.empty((0, *self.image_shape), np.uint8)
        parts = np.array_split(np.asarray(indices), min(len(indices), os.cpu_count() or 1))
        return np.concatenate(list(self.workers.map(self._decoded, parts)))

    def _decoded(self, indices: np.ndarray) -> ImageArray:
        images = np.empty((len(indices), *self.image_shape), np.uint8)
        wanted = self.positions[indices].tolist()
        for row, (position, record) in enumerate(zip(wanted, self.records.__getitems__(wanted), strict=True)):
            try:
                image = self.decode(record)
                if image.shape != self.image_shape:  # NumPy would repeat a smaller image to fill the row.
                    raise ValueError(f"has shape {image.shape} instead of {self.image_shape}")
            except ValueError as error:
                raise ValueError(f"record {position} of {self.description} {error}") from error
            images[row] = image
        return images


def records_digest(records: Records, positions: np.ndarray, *settings: object) -> str:
    """Returns a hash of the number of records, of 64 of them, and of the settings that decode them.

    It identifies the images without reading all of them.
    """
    chosen = positions[np.linspace(0, len(positions) - 1, 64, dtype=int)] if len(positions) else positions
    digest = hashlib.sha256(repr((settings, len(positions))).encode())
    for record in records.__getitems__(sorted({int(position) for position in chosen})):
        digest.update(record)
    return digest.hexdigest()[:12]
