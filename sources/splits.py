"""The images of a data set in two splits, for training and for testing, and their form on disk.

A data set is stored as a folder with one .npy file for the images, and one for the labels, of each split, and
about.json, which is written last: without it the folder is not there. Images are mapped into memory, not read.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from infra.files import write_atomic

SPLITS = ("train", "test")
TEST_SHARE = 0.1
"""Of the images that are test images in data that come without a split of their own."""

Levels = UInt8[np.ndarray, "batch height width channel"]


class Split(NamedTuple):
    """Images, and their class labels where there are any."""

    images: Levels
    labels: np.ndarray | None = None


class StoredSplit(NamedTuple):
    """A split, mapped into memory, and what identifies its images."""

    images: Levels
    description: str
    labels: np.ndarray | None = None


def is_test(identity: bytes) -> bool:
    """Whether an image is for testing: decided by the hash of its name or content, whatever other images there are."""
    return int.from_bytes(hashlib.sha256(identity).digest()[:8], "big") < TEST_SHARE * 2**64


def content_digest(images: Levels) -> str:
    """The first digits of the SHA-256 of the images and their shape."""
    digest = hashlib.sha256(str(images.shape).encode())
    for block in np.array_split(images, max(1, images.nbytes // 2**24)):
        digest.update(block.tobytes())
    return digest.hexdigest()[:12]


def write_splits(folder: Path, name: str, splits: Mapping[str, Split]) -> None:
    """Stores a data set; its descriptions are made of `name`, the split and a hash of the images."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "about.json").unlink(missing_ok=True)
    descriptions = {}
    for split, (images, labels) in splits.items():
        _write_array(folder / f"{split}_images.npy", images)
        if labels is None:
            (folder / f"{split}_labels.npy").unlink(missing_ok=True)
        else:
            _write_array(folder / f"{split}_labels.npy", labels)
        descriptions[split] = describe(name, split, images)
    write_atomic(folder / "about.json", json.dumps(descriptions, indent=1))


def describe(name: str, split: str, images: Levels) -> str:
    """What identifies the images of a split in results and in files made from them."""
    return f"{name}, {split}, images {content_digest(images)}"


def read_split(folder: Path, split: str) -> StoredSplit | None:
    """One split of a stored data set; None if there is none.

    Raises:
        ValueError: if a file is damaged.
    """
    if not (folder / "about.json").exists():
        return None
    try:
        description = json.loads((folder / "about.json").read_text())[split]
        images = np.load(folder / f"{split}_images.npy", mmap_mode="r")
        labels_path = folder / f"{split}_labels.npy"
        labels = np.load(labels_path) if labels_path.exists() else None
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{folder} is damaged ({error}); delete it and prepare the data again") from error
    return StoredSplit(images, description, labels)


def _write_array(path: Path, array: np.ndarray) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
