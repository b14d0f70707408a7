"""Opens data sets by name.

A source holds the images of one split as unsigned bytes, with levels 0 .. levels-1, in an order that never changes.
To add a source, write a function like `load_digits` and name it in SOURCES.
"""

import importlib.util
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from configs.checks import check_config
from configs.default import Config
from sources.catalogue import CATALOGUE, load_entry, prepare_entry
from sources.densities import DENSITIES
from sources.folder import load_folder
from sources.npz import load_npz
from sources.points import draw_points
from sources.source import MemorySource, Source
from sources.splits import SPLITS

__all__ = ["MemorySource", "Source", "check_levels", "prepare", "source_from_config"]


def load_digits(split: str) -> MemorySource:
    """Loads scikit-learn's handwritten digits: 1797 images of 8x8 with 17 levels; one in five is a test image."""
    pixels, classes = _all_digits()
    order = np.random.default_rng(0).permutation(len(pixels))
    test_size = len(order) // 5
    chosen = order[:test_size] if split == "test" else order[test_size:]
    images = pixels[chosen].astype(np.uint8).reshape(-1, 8, 8, 1)
    return MemorySource(images, f"digits (scikit-learn), {split}", classes[chosen])


def _all_digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns the pixels of scikit-learn's digits, 64 for each image, and their classes.

    Reads scikit-learn's file if it is where it has always been, because the import of scikit-learn takes a second.
    """
    package = importlib.util.find_spec("sklearn")
    if package is not None and package.origin is not None:
        file = Path(package.origin).with_name("datasets") / "data" / "digits.csv.gz"
        if file.is_file():
            rows = np.loadtxt(file, delimiter=",").astype(int)
            return rows[:, :-1], rows[:, -1]
    import sklearn.datasets

    digits: Any = sklearn.datasets.load_digits()
    return digits.data, digits.target


def _npz(data: Config, split: str) -> Source:
    return load_npz(_path(data), split)


def _folder(data: Config, split: str) -> Source:
    return MemorySource(*load_folder(_path(data), split, data.image_size, data.num_channels, Path(data.dir)))


def _path(data: Config) -> Path:
    if not data.path:
        raise ValueError(f"data.path is empty; data.dataset={data.dataset} reads the images at this path, so set it")
    return Path(data.path)


CHECKED_IMAGES, CHECKED_BYTES = 1000, 2**26
"""The largest number of images, and their largest total size in bytes, in the sample that is checked for its levels."""

SOURCES: dict[str, Callable[[Config, str], Source]] = {
    "digits": lambda data, split: load_digits(split),
    "npz": _npz,
    "folder": _folder,
}
"""Functions that open a split of a data set, from config.data."""


def source_from_config(config: Config, split: str) -> Source:
    """Opens one split of `data.dataset`.

    Raises:
        FileNotFoundError: if its files are missing. The message says what to supply.
        ValueError: if the data set is unknown, a file is damaged, or the images do not fit the fields of `data`.
    """
    data = config.data
    if data.path and data.dataset in ("digits", *DENSITIES):
        raise ValueError(
            f"data.path is {data.path!r}, but data.dataset={data.dataset} reads no files; set data.dataset to npz or "
            "folder, or data.path to an empty string"
        )
    if data.dataset in DENSITIES:
        return draw_points(data, split)
    _check_fields(data)
    source = _opened(data, split)
    wanted = (data.image_size, data.image_size, data.num_channels)
    if source.image_shape != wanted:
        raise ValueError(
            f"{source.description} has images of {source.image_shape}, but data.image_size and data.num_channels "
            f"ask for {wanted}"
        )
    check_levels(source, data.levels, (_opened(data, other) for other in SPLITS if other != split))
    return source


def _opened(data: Config, split: str) -> Source:
    if data.dataset in SOURCES:
        return SOURCES[data.dataset](data, split)
    if data.dataset in CATALOGUE:
        return load_entry(data, split)
    raise ValueError(f"data.dataset is {data.dataset!r}; known: {', '.join((*SOURCES, *CATALOGUE, *DENSITIES))}")


def _check_fields(data: Config) -> None:
    for field, least, most in (("image_size", 1, 2**16), ("num_channels", 1, 2**16), ("levels", 2, 256)):
        if not least <= data[field] <= most:
            raise ValueError(f"data.{field} is {data[field]}; it must lie between {least} and {most}")


def prepare(config: Config) -> None:
    """Converts a published data set from the files at `data.archive`, once; see sources/published.py.

    Raises:
        FileNotFoundError, ValueError: if a file is missing, is not the published one, or is damaged.
    """
    check_config(config)
    print(prepare_entry(config.data))


def check_levels(source: Source, levels: int, others: Iterable[Source] = ()) -> None:
    """Checks data.levels on a sample of the images: all levels must be below it, and some in its upper half.

    Args:
        others: the other splits of the data. They are read only if this split has no bright image. Then one of them
            must have one.

    Raises:
        ValueError: if data.levels does not fit.
    """
    highest = _brightest(source)
    if (highest < levels // 2 and all(_brightest(other) < levels // 2 for other in others)) or highest >= levels:
        raise ValueError(
            f"data.levels is {levels}, but the brightest pixel of {source.description} has level {highest}; bits/dim "
            "would be wrong, so set data.levels to the number of grey levels of a channel"
        )


def _brightest(source: Source) -> int:
    """Returns the highest level in a sample of the images."""
    count = min(len(source), CHECKED_IMAGES, max(1, CHECKED_BYTES // math.prod(source.image_shape)))
    return int(source.images(np.linspace(0, len(source) - 1, count, dtype=int)).max())
