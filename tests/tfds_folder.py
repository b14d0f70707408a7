"""Writes small data sets with the writer of tensorflow-datasets, which needs no TensorFlow for encoded images."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorboardX.record_writer import RecordWriter
from tensorflow_datasets.proto import tf_example_pb2


def encoded(image: np.ndarray, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze()).save(buffer, kind)
    return buffer.getvalue()


def write_tfds(
    folder: Path,
    splits: Mapping[str, Sequence[bytes]],
    labels: Mapping[str, Sequence[int]] | None = None,
    channels: int = 3,
    per_file: int = 4,
) -> None:
    """Writes encoded images as a prepared data set in array_record files.

    Args:
        folder: the folder of the version, inside the folder of the data set.
        per_file: the largest number of records in a file.
    """
    folder.mkdir(parents=True)
    features = {"id": tfds.features.Text(), "image": tfds.features.Image(shape=(None, None, channels))}
    if labels is not None:
        features["label"] = tfds.features.ClassLabel(num_classes=10)
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name=folder.parent.name, version=tfds.core.Version(folder.name), data_dir=str(folder), module_name=""
        ),
        features=tfds.features.FeaturesDict(features),
    )
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=per_file, file_format="array_record")
    writer.initialize_splits(list(splits))
    for split, images in splits.items():
        examples: list[dict[str, Any]] = [{"id": f"{split}_{n}", "image": image} for n, image in enumerate(images)]
        if labels is not None:
            examples = [example | {"label": label} for example, label in zip(examples, labels[split], strict=True)]
        writer.add_examples({split: examples})
    writer.close_all()


def write_tfrecords(path: Path, records: Sequence[bytes]) -> None:
    writer = RecordWriter(str(path))
    for record in records:
        writer.write(record)
    writer.close()


def raw_example(image: np.ndarray) -> bytes:
    """Returns the record of an image in the format of FFHQ and CelebA-HQ: its levels by channel, row and column."""
    messages: Any = tf_example_pb2  # The classes of this module are created at run time.
    example = messages.Example()
    example.features.feature["shape"].int64_list.value.extend(image.transpose(2, 0, 1).shape)
    example.features.feature["data"].bytes_list.value.append(image.transpose(2, 0, 1).tobytes())
    return example.SerializeToString()
