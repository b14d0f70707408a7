"""Reads array_record and TFRecord files that tensorflow-datasets (tfds) has prepared, without TensorFlow."""

import functools
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from infra import stop
from infra.console import progress
from sources.resizing import Framing, decode_image, exact
from sources.source import MemorySource, Records, RecordSource, SingleImage, records_digest
from sources.splits import describe, is_test
from sources.tfrecord import TFRecords, decode_label, decode_raw, encoded_image

IN_MEMORY = 2**30
"""Splits of up to this many bytes are kept decoded in memory, which is faster than decoding images for each batch."""


class TfdsSet(NamedTuple):
    """A data set of tfds, with the names of its splits and the function that crops and resizes its images."""

    name: str
    """The name of its folder, including its configuration, e.g. lsun/church_outdoor."""
    train: str = "train"
    test: str | None = "test"
    """The published test split. None takes one in ten training images, chosen by their positions."""
    framing: Framing = exact

    def part(self, split: str) -> str:
        """Returns the name in tfds of the split "train" or "test"."""
        return self.test if split == "test" and self.test is not None else self.train


def find_tfds(dataset: TfdsSet, data_dir: Path) -> Path | None:
    """Returns the folder of the newest version that has been prepared under `data_dir`, or None."""
    versions = [path.parent for path in (data_dir / dataset.name).glob("*/dataset_info.json")]
    numbered = [folder for folder in versions if re.fullmatch(r"\d+\.\d+\.\d+", folder.name)]
    return max(numbered, key=lambda folder: tuple(map(int, folder.name.split("."))), default=None)


def load_tfds(
    folder: Path, dataset: TfdsSet, split: str, image_size: int, in_memory: int = IN_MEMORY
) -> MemorySource | RecordSource:
    """Loads one split. Up to `in_memory` bytes are decoded at once, larger splits record by record when needed.

    Raises:
        FileNotFoundError: if one of its files is missing.
        ValueError: if it is damaged, is in an unknown format, or has no images of this split.
    """
    info, part = _read_info(folder), dataset.part(split)
    if part not in info.splits or "image" not in info.features:
        raise ValueError(
            f"{folder} has no {part} images: its splits are {', '.join(info.splits)}, with the features "
            f"{', '.join(info.features)}"
        )
    records = _open_records(info, part)
    shape = (image_size, image_size, info.features["image"].shape[-1])
    decode = functools.partial(_decode, framing=dataset.framing, image_size=image_size, num_channels=shape[2])
    title = f"tfds {dataset.name} {folder.name} ({info.file_format.value}), {part}"
    by_position = split_positions(len(records), split) if dataset.test is None else np.arange(len(records))
    source = record_source(records, by_position, decode, shape, title, split, dataset.framing.__name__)
    if len(source) * np.prod(shape) > in_memory:
        return source
    return _in_memory(source, title, split, labelled="label" in info.features)


def _decode(record: bytes, framing: Framing, image_size: int, num_channels: int) -> SingleImage:
    return decode_image(encoded_image(record), framing, image_size, num_channels)


def load_raw_records(path: Path, split: str) -> RecordSource:
    """Loads a split of a published TFRecord file of FFHQ or CelebA-HQ, whose images are stored without compression.

    The published code tests on its training images. Here, one in ten images is a test image, chosen by its position.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a file, is cut short, or has images of several sizes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data.path is {str(path)!r}, which is not a file; set it to the .tfrecords file")
    records = TFRecords([path])
    if not len(records):
        raise ValueError(f"{path} has no records")
    try:
        first = decode_raw(records.__getitems__([0])[0])
    except ValueError as error:
        raise ValueError(f"record 0 of {path} {error}") from error
    others = np.flatnonzero(records.lengths != records.lengths[0])
    if len(others):
        number = int(others[0])
        raise ValueError(
            f"record {number} of {path} has {records.lengths[number]} bytes, but record 0 has {records.lengths[0]}; "
            "all images must have one size"
        )
    height, width, channels = first.shape
    positions = split_positions(len(records), split)
    return record_source(records, positions, decode_raw, (height, width, channels), path.name, split, "raw")


def split_positions(count: int, split: str) -> np.ndarray:
    """Returns the positions of the records of a split if one file has both: about one in ten is a test image."""
    testing = np.array([is_test(f"{position}".encode()) for position in range(count)], bool)
    return np.flatnonzero(testing == (split == "test"))


def record_source(
    records: Records,
    positions: np.ndarray,
    decode: Callable[[bytes], SingleImage],
    shape: tuple[int, int, int],
    title: str,
    split: str,
    framing: str,
) -> RecordSource:
    """Returns a source whose description identifies the records and the settings that decode them."""
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
            stop.check()
    return MemorySource(images, describe(title, split, images), labels)


def _read_info(folder: Path) -> Any:
    import tensorflow_datasets as tfds  # Other data sets do not need tfds. This import does not load TensorFlow.

    try:
        return tfds.builder_from_directory(folder).info
    except Exception as error:  # For damaged JSON, tfds raises many kinds of errors.
        raise ValueError(f"Cannot read {folder} as a data set of tensorflow-datasets: {error}") from error


def _open_records(info: Any, part: str) -> Records:
    kind = info.file_format.value
    if kind not in OPENERS:
        raise ValueError(f"{info.full_name} was prepared in the format {kind}; supported are {', '.join(OPENERS)}")
    files = [Path(path) for path in info.splits[part].filepaths]
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{missing[0]} is missing; prepare {info.full_name} again, or copy its whole folder")
    records = OPENERS[kind](files)
    wanted = info.splits[part].num_examples
    if len(records) != wanted:
        raise ValueError(
            f"{files[0].parent} is damaged: {part} has {len(records)} records instead of {wanted}; prepare it again"
        )
    return records


class ArrayRecords:
    """The records of array_record files. Their reader verifies checksums.

    Raises:
        ValueError: if a file is damaged, when it is opened or when a record is read.
    """

    def __init__(self, paths: list[Path]):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._folder = paths[0].parent
        try:
            self._records = ArrayRecordDataSource([str(path) for path in paths])
        except Exception as error:  # The reader's errors do not name the file.
            raise ValueError(f"{self._folder} is damaged: {error}") from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitems__(self, record_keys: Sequence[int], /) -> Sequence[bytes]:
        try:
            return self._records.__getitems__(record_keys)
        except RuntimeError as error:  # The reader's errors do not name the file.
            raise ValueError(f"{self._folder} is damaged: {error}") from error


OPENERS: dict[str, Callable[[list[Path]], Records]] = {"array_record": ArrayRecords, "tfrecord": TFRecords}
"""Readers of the file formats of tfds."""


def can_download() -> bool:
    """Returns whether TensorFlow is installed, which tfds needs to prepare data."""
    return importlib.util.find_spec("tensorflow") is not None


def download_tfds(dataset: TfdsSet, data_dir: Path) -> str:
    """Downloads and prepares a data set with tfds, which loads TensorFlow; returns a line for people.

    Raises:
        ValueError: if tfds fails.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(dataset.name, data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
    except Exception as error:  # Many kinds: of the network, checksums, manual downloads.
        raise ValueError(f"tensorflow-datasets could not prepare {dataset.name}: {error}") from error
    counts = " and ".join(f"{split.num_examples:,} {name}" for name, split in builder.info.splits.items())
    return f"{builder.data_dir}: tfds {dataset.name}, {counts} images"
