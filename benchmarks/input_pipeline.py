"""Images per second that training can read, by how they are kept: 32x32 colour images, in shuffled batches.

    python -m benchmarks.input_pipeline

In memory is an array; mapped is a file, as prepared data sets are kept, read while in the machine's cache.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from datasets import MemorySource, Source, training_batches
from sources.splits import Split, read_split, write_splits
from tables import text_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row of the table")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[48, 128, 1024])
    arguments = parser.parse_args()
    images = np.random.default_rng(0).integers(0, 256, (arguments.images, 32, 32, 3), dtype=np.uint8)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sources = {"in memory": MemorySource(images, "random"), "mapped": mapped(images, Path(folder))}
        for kept, source in sources.items():
            for batch_size in arguments.batch_sizes:
                rate = images_per_second(source, batch_size, arguments.seconds)
                rows.append((kept, f"{batch_size}", f"{rate:,.0f}"))
    print(f"{arguments.images:,} images of 32x32x3, {os.cpu_count()} cores, shared with whatever else runs")
    print(text_table(("kept", "batch", "images per second"), rows))


def mapped(images: np.ndarray, folder: Path) -> Source:
    """The images as a prepared data set."""
    write_splits(folder, "random", {"train": Split(images)})
    stored = read_split(folder, "train")
    assert stored is not None, "it was just written"
    return MemorySource(*stored)


def images_per_second(source: Source, batch_size: int, seconds: float) -> float:
    """After a first batch, which starts the threads."""
    batches = training_batches(source, batch_size, seed=0, first_step=0, num_steps=2**40)
    next(batches)
    started, count = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        next(batches)
        count += 1
    return count * batch_size / (time.monotonic() - started)


if __name__ == "__main__":
    main()
