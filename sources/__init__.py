"""Images as integer levels, by the name of their data set.

A source holds the images of one split as unsigned bytes, levels 0 .. levels-1, in an order that never changes.
To add one, write a function like `load_digits` and name it in SOURCES.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from configs.default import Config
from sources.catalogue import CATALOGUE, load_entry, prepare_entry
from sources.densities import DENSITIES
from sources.folder import load_folder
from sources.points import draw_points
from sources.source import MemorySource as MemorySource  # sources are found here, too
from sources.source import Source as Source
from sources.splits import TEST_SHARE, Split, describe, is_test


def load_digits(split: str) -> MemorySource:
    """scikit-learn's handwritten digits: 1797 images of 8x8 with 17 levels, one in five of them for testing."""
    import sklearn.datasets  # here, because its import takes a second that other data sets need not spend

    digits: Any = sklearn.datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    test_size = len(order) // 5
    chosen = order[:test_size] if split == "test" else order[test_size:]
    images = digits.images[chosen].astype(np.uint8)[..., None]
    return MemorySource(images, f"digits (scikit-learn), {split}", digits.target[chosen])


def load_npz(path: Path, split: str) -> MemorySource:
    """Images of an .npz file: x_train and x_test, or `images`, of which those are for testing whose hashes say so.

    Arrays are unsigned bytes, [n, height, width, channels] or [n, height, width]. Labels are y_train and y_test, or
    `labels`, where there are any.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or has no such arrays, or a split has no images.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data.path is {str(path)!r}, which is no file")
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            held = list(arrays)
            read = {name: arrays[name] for name in held if name in ("images", "labels", f"x_{split}", f"y_{split}")}
    except Exception as error:  # damaged bytes make NumPy, zipfile and zlib raise a dozen kinds
        raise ValueError(f"{path} is no readable .npz file: {error}") from error
    if "images" not in held and f"x_{split}" not in held:
        raise ValueError(f"{path} holds {', '.join(held) or 'nothing'}, but neither images nor x_{split}")
    images, labels = _split_of(read, path, split)
    return MemorySource(images, describe(f"npz {path.name}", split, images), labels)


def _split_of(arrays: dict[str, np.ndarray], path: Path, split: str) -> Split:
    whole = "images" in arrays
    name, labels_name = ("images", "labels") if whole else (f"x_{split}", f"y_{split}")
    images = arrays[name]
    labels = arrays[labels_name].ravel() if labels_name in arrays else None
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(
            f"{name} in {path} is {images.dtype} of shape {images.shape}; it must be uint8 of 3 or 4 axes, "
            "[n, height, width] or [n, height, width, channels]"
        )
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{path} has {len(images)} images in {name}, but {len(labels)} labels in {labels_name}")
    if whole:
        chosen = np.array([is_test(image.tobytes()) == (split == "test") for image in images], bool)
        images, labels = images[chosen], None if labels is None else labels[chosen]
    if not len(images):
        raise ValueError(f"{path} has no {split} images; of `images`, about {TEST_SHARE:.0%} are for testing")
    return Split(images if images.ndim == 4 else images[..., None], labels)


def _npz(data: Config, split: str) -> Source:
    return load_npz(_path(data), split)


def _folder(data: Config, split: str) -> Source:
    return MemorySource(*load_folder(_path(data), split, data.image_size, data.num_channels, Path(data.dir)))


def _path(data: Config) -> Path:
    if not data.path:
        raise ValueError(f"data.path is empty; data.dataset={data.dataset} reads the images that are there")
    return Path(data.path)


CHECKED_IMAGES, CHECKED_BYTES = 1000, 2**26
"""How many images, and of what size in all, are looked at for their levels before anything else is done."""

SOURCES: dict[str, Callable[[Config, str], Source]] = {
    "digits": lambda data, split: load_digits(split),
    "npz": _npz,
    "folder": _folder,
}
"""Opens a split of a data set, from config.data."""


def source_from_config(config: Config, split: str) -> Source:
    """Opens one split of `data.dataset`.

    Raises:
        FileNotFoundError: if its files are not there, saying what to supply.
        ValueError: for an unknown data set, for damaged files, or when its images are not as `data` says.
    """
    data = config.data
    if data.path and data.dataset in ("digits", *DENSITIES):
        raise ValueError(
            f"data.path is {data.path!r}, but data.dataset={data.dataset} reads no files; set data.dataset to npz or "
            "folder, or leave data.path empty"
        )
    if data.dataset in DENSITIES:
        return draw_points(data, split)
    _check_fields(data)
    if data.dataset in SOURCES:
        source = SOURCES[data.dataset](data, split)
    elif data.dataset in CATALOGUE:
        source = load_entry(data, split)
    else:
        raise ValueError(f"data.dataset is {data.dataset!r}; known are {', '.join((*SOURCES, *CATALOGUE, *DENSITIES))}")
    wanted = (data.image_size, data.image_size, data.num_channels)
    if source.image_shape != wanted:
        raise ValueError(
            f"{source.description} has images of {source.image_shape}, but data.image_size and data.num_channels "
            f"ask for {wanted}"
        )
    check_levels(source, data.levels)
    return source


def _check_fields(data: Config) -> None:
    for field, least, most in (("image_size", 1, 2**16), ("num_channels", 1, 2**16), ("levels", 2, 256)):
        if not least <= data[field] <= most:
            raise ValueError(f"data.{field} is {data[field]}; it must lie between {least} and {most}")


def prepare_from_config(config: Config) -> str:
    """See `prepare_entry`."""
    return prepare_entry(config.data)


def check_levels(source: Source, levels: int) -> None:
    """Checks data.levels against a sample from all over the images: all below it, and the upper half in use."""
    count = min(len(source), CHECKED_IMAGES, max(1, CHECKED_BYTES // math.prod(source.image_shape)))
    highest = int(source.images(np.linspace(0, len(source) - 1, count, dtype=int)).max())
    if not levels // 2 <= highest < levels:
        raise ValueError(
            f"data.levels is {levels}, but the brightest pixel of {source.description} has level {highest}; "
            "bits/dim would be wrong"
        )
