"""Records of tf.train.Example read by their position, without TensorFlow: TFRecord files, and what an Example holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from jaxtyping import Int64

from sources.resizing import Framing, decode_image
from sources.source import ImageLevels

HEADER, FOOTER = 12, 4
"""Bytes around a record: its length (8, little-endian) and a checksum of that (4) before, a checksum (4) behind it."""


class TFRecords:
    """The records of TFRecord files, which are looked through once for where each record begins.

    The checksum of a record is verified whenever it is read.

    Raises:
        ValueError: if a file is no TFRecord file, or cut short; later, naming the record that is damaged.
    """

    def __init__(self, paths: Sequence[Path]):
        spans = [_spans(path) for path in paths]
        self._paths = list(paths)
        self._file = np.repeat(np.arange(len(paths)), [len(of_file) for of_file in spans])
        self._spans = np.concatenate([np.empty((0, 2), np.int64), *spans])

    def __len__(self) -> int:
        return len(self._spans)

    def __getitems__(self, record_keys: Sequence[int], /) -> list[bytes]:
        return [self._read(key) for key in record_keys]

    def _read(self, key: int) -> bytes:
        # opened anew each time: threads share nothing, and a data set may have more files than can be open
        begin, length = self._spans[key].tolist()
        with self._paths[self._file[key]].open("rb", buffering=0) as file:
            file.seek(begin)
            record, stored = file.read(length), file.read(FOOTER)
        if _checksum(record) != stored:
            number = key - int(np.searchsorted(self._file, self._file[key]))
            raise ValueError(f"{self._paths[self._file[key]]} is damaged: its record {number} has another checksum")
        return record


def _spans(path: Path) -> Int64[np.ndarray, "records 2"]:
    """Where each record of a file begins, and its length."""
    size, end, spans = path.stat().st_size, 0, []
    with path.open("rb", buffering=0) as file:
        while end < size:
            file.seek(end)
            header = file.read(HEADER)
            if _checksum(header[:8]) != header[8:]:
                raise ValueError(f"{path} is no TFRecord file, or damaged where its record {len(spans)} begins")
            begin, length = end + HEADER, int.from_bytes(header[:8], "little")
            end = begin + length + FOOTER
            if end > size:
                raise ValueError(f"{path} is cut short: its record {len(spans)} ends behind it")
            spans.append((begin, length))
    return np.array(spans, np.int64).reshape(-1, 2)


def _checksum(data: bytes) -> bytes:
    """As TFRecord files hold it: CRC-32C, rotated and moved by a constant."""
    crc = google_crc32c.value(data)
    return (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


def decode_encoded(record: bytes, framing: Framing, image_size: int, num_channels: int) -> ImageLevels:
    """The feature `image`, an encoded image; raises ValueError if there is none."""
    return decode_image(_bytes(_features(record), "image"), framing, image_size, num_channels)


def decode_raw(record: bytes) -> ImageLevels:
    """The levels in `data`, by channel, row and column, of the `shape` given: FFHQ's and CelebA-HQ's published records.

    Raises:
        ValueError: if it is no such record.
    """
    features = _features(record)
    shape, data = _integers(features, "shape"), _bytes(features, "data")
    if len(shape) != 3 or np.prod(shape) != len(data):
        raise ValueError(f"has {len(data)} bytes for an image of shape {tuple(shape)}")
    return np.frombuffer(data, np.uint8).reshape(shape).transpose(1, 2, 0)


def decode_label(record: bytes) -> int:
    """The feature `label`; raises ValueError if there is none."""
    return _integers(_features(record), "label")[0]


def _features(record: bytes) -> Any:
    """What an Example maps its features' names to."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2  # here, because it takes half a second that others can spare

    message: Any = tf_example_pb2  # its classes are made at run time
    try:
        return message.Example.FromString(record).features.feature
    except DecodeError as error:
        raise ValueError(f"is no tf.train.Example: {error}") from error


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
