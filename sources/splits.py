"""The images of a data set in two splits, train and test, and their storage on disk.

A stored data set is a folder. It has one .npy file with the images of each split, one with the labels if there are
any, and about.json. about.json is written last, so a folder without it is incomplete and is ignored. Images are mapped
into memory when they are read.
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
"""The share of test images in data that have no split of their own."""

ImageArray = UInt8[np.ndarray, "batch height width channel"]
"""Images with integer levels."""


class Split(NamedTuple):
    """Images, and their class labels if there are any."""

    images: ImageArray
    labels: np.ndarray | None = None


class StoredSplit(NamedTuple):
    """A split whose images are mapped into memory, with the description that identifies them."""

    images: ImageArray
    description: str
    labels: np.ndarray | None = None


def is_test(identity: bytes) -> bool:
    """Returns whether an image is a test image.

    The hash of its name or content decides, so that the answer does not depend on which other images there are.
    """
    return int.from_bytes(hashlib.sha256(identity).digest()[:8], "big") < TEST_SHARE * 2**64


def content_digest(images: ImageArray) -> str:
    """Returns the first digits of the SHA-256 of the images and their shape."""
    digest = hashlib.sha256(str(images.shape).encode())
    for block in np.array_split(images, max(1, images.nbytes // 2**24)):
        digest.update(block.tobytes())
    return digest.hexdigest()[:12]


def write_splits(folder: Path, name: str, splits: Mapping[str, Split], decoding: int = 0) -> None:
    """Stores a data set.

    Args:
        name: the start of the descriptions. The split and a hash of the images follow it.
        decoding: the version of the rules by which images were decoded; see `stored_decoding`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "about.json").unlink(missing_ok=True)
    about: dict[str, str | int] = {}
    for split, (images, labels) in splits.items():
        _write_array(folder / f"{split}_images.npy", images)
        if labels is None:
            (folder / f"{split}_labels.npy").unlink(missing_ok=True)
        else:
            _write_array(folder / f"{split}_labels.npy", labels)
        about[split] = describe(name, split, images)
    if decoding:
        about["decoding"] = decoding
    write_atomic(folder / "about.json", json.dumps(about, indent=1))


def describe(name: str, split: str, images: ImageArray) -> str:
    """Returns the text that identifies the images of a split in results and in files made from them."""
    return f"{name}, {split}, images {content_digest(images)}"


def stored_decoding(folder: Path) -> int | None:
    """Returns the `decoding` of a stored data set: 0 if it was stored without one, None if there is no data set.

    Raises:
        ValueError: if about.json is damaged.
    """
    about = _read_about(folder)
    return None if about is None else int(about.get("decoding", 0))


def read_split(folder: Path, split: str) -> StoredSplit | None:
    """Reads one split of a stored data set; returns None if there is no data set.

    Raises:
        ValueError: if a file is damaged.
    """
    about = _read_about(folder)
    if about is None:
        return None
    try:
        description = about[split]
        images = np.load(folder / f"{split}_images.npy", mmap_mode="r")
        labels_path = folder / f"{split}_labels.npy"
        labels = np.load(labels_path) if labels_path.exists() else None
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise _damaged(folder, error) from error
    if images.dtype != np.uint8 or images.ndim != 4 or (labels is not None and len(labels) != len(images)):
        raise _damaged(folder, ValueError(f"the {split} images are {images.dtype} of shape {images.shape}"))
    return StoredSplit(images, description, labels)


def _read_about(folder: Path) -> dict[str, str] | None:
    if not (folder / "about.json").exists():
        return None
    try:
        about = json.loads((folder / "about.json").read_text())
        return dict(about)
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> ValueError:
    return ValueError(f"{folder} is damaged ({error}); delete it and prepare the data again")


def _write_array(path: Path, array: np.ndarray) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
