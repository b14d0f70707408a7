"""Reads TFRecord files of tf.train.Example by position, without TensorFlow."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from jaxtyping import Int64, UInt8

HEADER, FOOTER = 12, 4
"""Bytes before a record: its length (8, little-endian) and a checksum of it (4). Bytes after it: its checksum (4)."""


class TFRecords:
    """The records of TFRecord files.

    The constructor scans the files once for the beginnings of records. Reading a record verifies its checksum.

    Raises:
        ValueError: if a file is not a TFRecord file, or is cut short; on reading, if a record is damaged.
    """

    def __init__(self, paths: Sequence[Path]):
        spans = [_spans(path) for path in paths]
        self._paths = list(paths)
        self._file = np.repeat(np.arange(len(paths)), [len(of_file) for of_file in spans])
        self._spans = np.concatenate([np.empty((0, 2), np.int64), *spans])

    def __len__(self) -> int:
        return len(self._spans)

    @property
    def lengths(self) -> Int64[np.ndarray, " records"]:
        """The length of each record in bytes."""
        return self._spans[:, 1]

    def __getitems__(self, record_keys: Sequence[int], /) -> list[bytes]:
        return [self._read(key) for key in record_keys]

    def _read(self, key: int) -> bytes:
        # The file is opened for each record, so that threads share nothing and any number of files can be used.
        begin, length = self._spans[key].tolist()
        with self._paths[self._file[key]].open("rb", buffering=0) as file:
            file.seek(begin)
            record, stored = file.read(length), file.read(FOOTER)
        if _checksum(record) != stored:
            number = key - int(np.searchsorted(self._file, self._file[key]))
            raise ValueError(f"{self._paths[self._file[key]]} is damaged: the checksum of its record {number} is wrong")
        return record


def _spans(path: Path) -> Int64[np.ndarray, "records 2"]:
    """Returns the beginning and the length of each record of a file."""
    size, end, spans = path.stat().st_size, 0, []
    with path.open("rb", buffering=0) as file:
        while end < size:
            file.seek(end)
            header = file.read(HEADER)
            if _checksum(header[:8]) != header[8:]:
                raise ValueError(f"{path} is not a TFRecord file, or is damaged where its record {len(spans)} begins")
            begin, length = end + HEADER, int.from_bytes(header[:8], "little")
            end = begin + length + FOOTER
            if end > size:
                raise ValueError(f"{path} is cut short: its record {len(spans)} ends after the end of the file")
            spans.append((begin, length))
    return np.array(spans, np.int64).reshape(-1, 2)


def _checksum(data: bytes) -> bytes:
    """Returns the checksum used in TFRecord files: CRC-32C, rotated and shifted by a constant."""
    crc = google_crc32c.value(data)
    return (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


def encoded_image(record: bytes) -> bytes:
    """Returns the feature `image`, an image file. Raises ValueError if there is none."""
    return _bytes(_features(record), "image")


def decode_raw(record: bytes) -> UInt8[np.ndarray, "height width channel"]:
    """Returns the image in a published record of FFHQ or CelebA-HQ.

    The feature `data` has the levels by channel, row and column, and `shape` their numbers.

    Raises:
        ValueError: if it is not such a record.
    """
    features = _features(record)
    shape, data = _integers(features, "shape"), _bytes(features, "data")
    if len(shape) != 3 or min(shape) < 1 or math.prod(shape) != len(data):
        raise ValueError(f"has {len(data)} bytes for an image of shape {tuple(shape)}")
    return np.frombuffer(data, np.uint8).reshape(shape).transpose(1, 2, 0)


def decode_label(record: bytes) -> int:
    """Returns the feature `label`. Raises ValueError if there is none."""
    return _integers(_features(record), "label")[0]


def _features(record: bytes) -> Any:
    """Returns the features of an Example by name."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2  # Imported here, because it takes half a second.

    message: Any = tf_example_pb2  # Any, because protobuf creates its classes at run time.
    try:
        return message.Example.FromString(record).features.feature
    except DecodeError as error:
        raise ValueError(f"is not a tf.train.Example: {error}") from error


def _bytes(features: Any, name: str) -> bytes:
    values = features[name].bytes_list.value if name in features else ()
    if len(values) != 1:
        raise ValueError(f"has no bytes {name!r}; its features are {', '.join(sorted(features)) or 'none'}")
    return values[0]


def _integers(features: Any, name: str) -> list[int]:
    values = features[name].int64_list.value if name in features else ()
    if not values:
        raise ValueError(f"has no integers {name!r}; its features are {', '.join(sorted(features)) or 'none'}")
    return list(values)
