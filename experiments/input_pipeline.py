"""Prints how many images per second training can read from each form of storage, for 32x32 images in shuffled batches.

    python -m experiments.input_pipeline

The forms are an array in memory, the memory-mapped file of a prepared data set, the records of tensorflow-datasets,
whose PNG images are decoded at each read, and the records in which FFHQ is published. The files are in the machine's
cache when they are read. The last column says whether 2 and 4 hosts, which each read their own rows, get the same
batches as one host.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from datasets import MemorySource, Source, training_batches
from infra.console import text_table
from sources.splits import Split, read_split, write_splits
from sources.tfds_folders import TfdsSet, load_raw_records, load_tfds
from tests.tfds_folder import encoded, raw_example, write_tfds, write_tfrecords


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000, help="number of images")
    parser.add_argument("--records", type=int, default=10_000, help="number of these images in the records")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each row of the table")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[48, 128, 1024], help="batch sizes to try")
    arguments = parser.parse_args()
    images = np.random.default_rng(0).integers(0, 256, (arguments.images, 32, 32, 3), dtype=np.uint8)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kept, source in sources(images, images[: arguments.records], Path(folder)).items():
            same = "yes" if batches_are_the_same(source) else "NO"
            for batch_size in arguments.batch_sizes:
                rate = images_per_second(source, batch_size, arguments.seconds)
                rows.append((kept, f"{batch_size}", f"{rate:,.0f}", same))
    print(f"{arguments.images:,} images of 32x32x3, {os.cpu_count()} cores, possibly shared with other programs")
    print(text_table(("kept", "batch", "images per second", "same on 1, 2 and 4 hosts"), rows))


def sources(images: np.ndarray, recorded: np.ndarray, folder: Path) -> dict[str, Source]:
    """Returns the images in every form that training reads."""
    prepared = folder / "random" / "1.0.0"
    write_tfds(prepared, {"train": [encoded(image) for image in recorded]}, per_file=5000)
    write_tfrecords(folder / "raw.tfrecords", [raw_example(image) for image in recorded])
    return {
        "in memory": MemorySource(images, "random"),
        "mapped": mapped(images, folder / "mapped"),
        "array_record, PNG": load_tfds(prepared, TfdsSet("random"), "train", 32, in_memory=0),
        "TFRecord, raw": load_raw_records(folder / "raw.tfrecords", "train"),
    }


def mapped(images: np.ndarray, folder: Path) -> Source:
    """Writes the images as a prepared data set, and returns it."""
    write_splits(folder, "random", {"train": Split(images)})
    stored = read_split(folder, "train")
    assert stored is not None, "it was just written"
    return MemorySource(*stored)


def batches_are_the_same(source: Source) -> bool:
    """Returns whether the rows that 2 and 4 hosts read make up the batches of one host."""
    one = global_batches(source, 1)
    return all(np.array_equal(one, global_batches(source, hosts)) for hosts in (2, 4))


def global_batches(source: Source, hosts: int) -> np.ndarray:
    """Returns the first global batches, joined from the rows that each host reads."""
    parts = []
    for host in range(hosts):
        with (
            mock.patch.object(jax, "process_count", return_value=hosts),
            mock.patch.object(jax, "process_index", return_value=host),
        ):
            parts.append(np.stack(list(training_batches(source, 128, seed=0, first_step=0, num_steps=8))))
    return np.concatenate(parts, axis=1)


def images_per_second(source: Source, batch_size: int, seconds: float) -> float:
    """Returns the speed after a first batch, which starts the threads."""
    batches = training_batches(source, batch_size, seed=0, first_step=0, num_steps=2**40)
    next(batches)
    started, count = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        next(batches)
        count += 1
    return count * batch_size / (time.monotonic() - started)


if __name__ == "__main__":
    main()
