"""Readers of the files in which data sets are published; each gives the images and labels of both splits.

They take the paths by the names under which the files are published.
"""

import gzip
import io
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from infra.console import progress
from sources.splits import Levels, Split

Files = Mapping[str, Path]


def read_cifar10(files: Files) -> dict[str, Split]:
    """The binary version: records of a label and 3072 bytes, by channel, row and column."""
    (archive,) = files.values()
    batches = {
        name.stem: _cifar10_records(data, name) for name, data in _contents_of_tar(archive) if name.suffix == ".bin"
    }
    wanted = [f"data_batch_{number}" for number in range(1, 6)]
    missing = sorted({*wanted, "test_batch"} - batches.keys())
    if missing:
        raise ValueError(f"{archive} has no {missing[0]}.bin")
    train = np.concatenate([batches[name] for name in wanted])
    return {"train": _cifar10_split(train), "test": _cifar10_split(batches["test_batch"])}


def _cifar10_records(data: bytes, name: PurePosixPath) -> np.ndarray:
    if len(data) % 3073:
        raise ValueError(f"{name} has {len(data)} bytes, which is no multiple of 3073")
    return np.frombuffer(data, np.uint8).reshape(-1, 3073)


def _cifar10_split(records: np.ndarray) -> Split:
    return Split(_from_planes(records[:, 1:], 32), records[:, 0].astype(np.int64))


def _from_planes(rows: np.ndarray, size: int) -> Levels:
    """[n, 3 * size * size], by channel, row and column, as [n, size, size, 3]."""
    return np.ascontiguousarray(rows.reshape(-1, 3, size, size).transpose(0, 2, 3, 1))


def read_mnist(files: Files) -> dict[str, Split]:
    """Images and labels in the IDX format, compressed by gzip."""
    named = {"train": "train", "test": "t10k"}
    return {
        split: Split(
            _read_idx(files[f"{name}-images-idx3-ubyte.gz"], 3)[..., None],
            _read_idx(files[f"{name}-labels-idx1-ubyte.gz"], 1).astype(np.int64),
        )
        for split, name in named.items()
    }


def _read_idx(path: Path, axes: int) -> np.ndarray:
    with gzip.open(path) as file:
        data = file.read()
    if data[:4] != bytes([0, 0, 8, axes]):
        raise ValueError(f"{path} is no IDX file of unsigned bytes with {axes} axes")
    shape = np.frombuffer(data, ">u4", axes, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


def read_svhn(files: Files) -> dict[str, Split]:
    """MATLAB files with X, [32, 32, 3, n], and y, where 10 stands for the digit 0. The extra images are left out."""
    import scipy.io

    splits = {}
    for split in ("train", "test"):
        arrays = scipy.io.loadmat(str(files[f"{split}_32x32.mat"]))
        images = np.ascontiguousarray(np.moveaxis(arrays["X"], -1, 0))
        splits[split] = Split(images, arrays["y"].ravel().astype(np.int64) % 10)
    return splits


def read_imagenet_old(files: Files, size: int) -> dict[str, Split]:
    """One .tar of PNG images for each split, without labels; the validation images are the test images."""
    return {
        split: Split(_read_tar_of_images(files[f"{name}_{size}x{size}.tar"], size))
        for split, name in (("train", "train"), ("test", "valid"))
    }


def _read_tar_of_images(path: Path, size: int) -> Levels:
    images = bytearray()
    for name, data in _contents_of_tar(path):
        if name.suffix == ".png":
            images += _decode_rgb(data, size, f"{name} in {path}")
    return np.frombuffer(images, np.uint8).reshape(-1, size, size, 3)


def _contents_of_tar(path: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """The name and content of each file, one after another, however many there are."""
    with tarfile.open(path) as tar, progress(0, path.name, "file") as bar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:
                yield PurePosixPath(member.name), file.read()
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # else it keeps a million of them
            bar.update()


def _decode_rgb(data: bytes, size: int, name: str) -> bytes:
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from error
    if pixels.shape != (size, size, 3):
        raise ValueError(f"{name} is an image of {pixels.shape[1]}x{pixels.shape[0]}, not {size}x{size}")
    return pixels.tobytes()


def read_imagenet_new(files: Files, size: int) -> dict[str, Split]:
    """.zip files of .npz batches: data, [n, 3 * size * size] by channel, row and column, and labels from 1."""
    train = [path for name, path in files.items() if "_train_" in name]
    test = [path for name, path in files.items() if "_val_" in name]
    return {"train": _read_zips(train, size), "test": _read_zips(test, size)}


def _read_zips(paths: Sequence[Path], size: int) -> Split:
    """The batches in the order of their numbers; a single batch may have none."""
    batches: dict[int, tuple[Levels, np.ndarray]] = {}
    for path in paths:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".npz"):
                    digits = re.search(r"batch_(\d+)\.npz$", name)
                    with np.load(io.BytesIO(archive.read(name))) as batch:
                        labels = batch["labels"].astype(np.int64) - 1
                        batches[int(digits[1]) if digits else 0] = _from_planes(batch["data"], size), labels
    if not batches:
        raise ValueError(f"{paths[0]} holds no .npz batches")
    images, labels = zip(*(batches[number] for number in sorted(batches)), strict=True)
    return Split(np.concatenate(images), np.concatenate(labels))
