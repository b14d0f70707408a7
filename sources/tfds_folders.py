"""Data sets that tensorflow-datasets (tfds) has prepared, read without TensorFlow: array_record or TFRecord files."""

import functools
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from infra.console import progress
from sources.resizing import Framing, exact
from sources.source import ImageLevels, MemorySource, Records, RecordSource, records_digest
from sources.splits import describe, is_test
from sources.tfrecord import TFRecords, decode_encoded, decode_label, decode_raw

IN_MEMORY = 2**30
"""Bytes up to which the images of a split are kept decoded, which is faster than decoding each time they are needed."""


class TfdsSet(NamedTuple):
    """A data set of tfds: which of its splits are meant, and how its images are brought to size."""

    name: str
    """Of its folder, with that of its configuration, e.g. lsun/church_outdoor."""
    train: str = "train"
    test: str | None = "test"
    """As published; None: of the images for training one in ten, by their positions."""
    framing: Framing = exact

    def part(self, split: str) -> str:
        """Its own name of "train" or "test"."""
        return self.test if split == "test" and self.test is not None else self.train


def find_tfds(dataset: TfdsSet, data_dir: Path) -> Path | None:
    """The folder of the newest version that has been prepared under `data_dir`."""
    versions = [path.parent for path in (data_dir / dataset.name).glob("*/dataset_info.json")]
    numbered = [folder for folder in versions if re.fullmatch(r"\d+\.\d+\.\d+", folder.name)]
    return max(numbered, key=lambda folder: tuple(map(int, folder.name.split("."))), default=None)


def load_tfds(
    folder: Path, dataset: TfdsSet, split: str, image_size: int, in_memory: int = IN_MEMORY
) -> MemorySource | RecordSource:
    """One split: of at most `in_memory` bytes decoded at once, else record by record when asked for.

    Raises:
        FileNotFoundError: if one of its files is missing.
        ValueError: if it is damaged, is in another format, or has no such split or images.
    """
    info, part = _read_info(folder), dataset.part(split)
    if part not in info.splits or "image" not in info.features:
        raise ValueError(
            f"{folder} has splits {', '.join(info.splits)} of {', '.join(info.features)}: no {part} images"
        )
    records = _open_records(info, part)
    shape = (image_size, image_size, info.features["image"].shape[-1])
    decode = functools.partial(decode_encoded, framing=dataset.framing, image_size=image_size, num_channels=shape[2])
    title = f"tfds {dataset.name} {folder.name} ({info.file_format.value}), {part}"
    by_position = split_positions(len(records), split) if dataset.test is None else np.arange(len(records))
    source = record_source(records, by_position, decode, shape, title, split, dataset.framing.__name__)
    if len(source) * np.prod(shape) > in_memory:
        return source
    return _in_memory(source, title, split, labelled="label" in info.features)


def load_raw_records(path: Path, split: str) -> RecordSource:
    """The split of a TFRecord file of FFHQ or CelebA-HQ as published, whose images have levels as they are.

    The published code tests on the images it trains on. Here test images are one in ten, by their positions.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such file, or cut short.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data.path is {str(path)!r}, which is no file")
    records = TFRecords([path])
    if not len(records):
        raise ValueError(f"{path} has no records")
    try:
        first = decode_raw(records.__getitems__([0])[0])
    except ValueError as error:
        raise ValueError(f"record 0 of {path} {error}") from error
    height, width, channels = first.shape
    positions = split_positions(len(records), split)
    return record_source(records, positions, decode_raw, (height, width, channels), path.name, split, "raw")


def split_positions(count: int, split: str) -> np.ndarray:
    """Which of the records are in a split, where there is one file for both: about one in ten is for testing."""
    testing = np.array([is_test(f"{position}".encode()) for position in range(count)], bool)
    return np.flatnonzero(testing == (split == "test"))


def record_source(
    records: Records,
    positions: np.ndarray,
    decode: Callable[[bytes], ImageLevels],
    shape: tuple[int, int, int],
    title: str,
    split: str,
    framing: str,
) -> RecordSource:
    """A source whose description tells apart what is read, and how."""
    digest = records_digest(records, positions, shape, framing)
    return RecordSource(records, positions, decode, shape, f"{title}, {split}, {shape[0]}x{shape[1]}, records {digest}")


def _in_memory(source: RecordSource, title: str, split: str, labelled: bool) -> MemorySource:
    images = np.empty((len(source), *source.image_shape), np.uint8)
    labels = np.empty(len(source), np.int64) if labelled else None
    with progress(len(source), f"decoding {split}", "image") as bar:
        for begin in range(0, len(source), 1000):
            rows = np.arange(begin, min(begin + 1000, len(source)))
            images[rows] = source.images(rows)
            if labels is not None:
                records = source.records.__getitems__(source.positions[rows].tolist())
                labels[rows] = [decode_label(record) for record in records]
            bar.update(len(rows))
    return MemorySource(images, describe(title, split, images), labels)


def _read_info(folder: Path) -> Any:
    import tensorflow_datasets as tfds  # here, because other data sets can do without; it loads no TensorFlow

    try:
        return tfds.builder_from_directory(folder).info
    except Exception as error:  # damaged JSON makes it raise half a dozen kinds
        raise ValueError(f"{folder} holds no data set that tensorflow-datasets can read: {error}") from error


def _open_records(info: Any, part: str) -> Records:
    kind = info.file_format.value
    if kind not in OPENERS:
        raise ValueError(f"{info.full_name} is prepared in the format {kind}; known are {', '.join(OPENERS)}")
    files = [Path(path) for path in info.splits[part].filepaths]
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{missing[0]} is missing; prepare {info.full_name} again, or copy all of its folder")
    records = OPENERS[kind](files)
    wanted = info.splits[part].num_examples
    if len(records) != wanted:
        raise ValueError(f"{files[0].parent} is damaged: {part} has {len(records)} records instead of {wanted}")
    return records


class ArrayRecords:
    """The records of array_record files, whose checksums their reader verifies.

    Raises:
        ValueError: if a file is damaged; found when it is opened, or when the record is read.
    """

    def __init__(self, paths: list[Path]):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._folder = paths[0].parent
        try:
            self._records = ArrayRecordDataSource([str(path) for path in paths])
        except Exception as error:  # of its own, and without the file's name
            raise ValueError(f"{self._folder} is damaged: {error}") from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitems__(self, record_keys: Sequence[int], /) -> Sequence[bytes]:
        try:
            return self._records.__getitems__(record_keys)
        except RuntimeError as error:  # without the file's name
            raise ValueError(f"{self._folder} is damaged: {error}") from error


OPENERS: dict[str, Callable[[list[Path]], Records]] = {"array_record": ArrayRecords, "tfrecord": TFRecords}
"""Readers of tfds's file formats."""


def can_download() -> bool:
    """Whether there is the TensorFlow that tfds needs to prepare data."""
    return importlib.util.find_spec("tensorflow") is not None


def download_tfds(dataset: TfdsSet, data_dir: Path) -> str:
    """Has tfds download and prepare a data set, which loads TensorFlow; returns what was written, for people.

    Raises:
        ValueError: if tfds cannot.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(dataset.name, data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
    except Exception as error:  # of many kinds: of the network, of its checks, of what is to be downloaded by hand
        raise ValueError(f"tensorflow-datasets could not prepare {dataset.name}: {error}") from error
    counts = " and ".join(f"{split.num_examples:,} {name}" for name, split in builder.info.splits.items())
    return f"{builder.data_dir}: tfds {dataset.name}, {counts} images"
