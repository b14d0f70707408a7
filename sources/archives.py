"""Reads the files in which data sets are published. Each reader returns the images and labels of both splits.

Readers take the paths by the names under which the files are published. They check what a file claims to hold, and
raise a ValueError that names the file and the reason.
"""

import gzip
import io
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from infra import stop
from infra.console import progress
from sources.splits import ImageArray, Split

Files = Mapping[str, Path]

MNIST_SIZE = 28
IDX_KINDS = {"images-idx3": 3, "labels-idx1": 1}
"""The number of axes of the arrays in both kinds of IDX files."""


def read_cifar10(files: Files) -> dict[str, Split]:
    """Reads the binary version: records of a label and 3072 bytes, by channel, row and column."""
    (archive,) = files.values()
    batches = {
        name.stem: _cifar10_records(data, f"{name} in {archive}")
        for name, data in _contents_of_tar(archive)
        if name.suffix == ".bin"
    }
    wanted = [f"data_batch_{number}" for number in range(1, 6)]
    missing = sorted({*wanted, "test_batch"} - batches.keys())
    if missing:
        raise ValueError(f"{archive} has no {missing[0]}.bin")
    train = np.concatenate([batches[name] for name in wanted])
    return {"train": _cifar10_split(train), "test": _cifar10_split(batches["test_batch"])}


def _cifar10_records(data: bytes, name: str) -> np.ndarray:
    if not data or len(data) % 3073:
        raise ValueError(f"{name} has {len(data)} bytes, not a multiple of 3073")
    records = np.frombuffer(data, np.uint8).reshape(-1, 3073)
    _check_labels(records[:, 0], len(records), 10, name)
    return records


def _cifar10_split(records: np.ndarray) -> Split:
    return Split(_from_planes(records[:, 1:], 32), records[:, 0].astype(np.int64))


def _from_planes(rows: np.ndarray, size: int) -> ImageArray:
    """Turns [n, 3 * size * size], by channel, row and column, into [n, size, size, 3]."""
    return np.ascontiguousarray(rows.reshape(-1, 3, size, size).transpose(0, 2, 3, 1))


def _check_labels(labels: np.ndarray, count: int, classes: int, name: str) -> None:
    if labels.size != count:
        raise ValueError(f"{name} has {count} images, but {labels.size} labels")
    if count and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"{name} has labels from {labels.min()} to {labels.max()}, not from 0 to {classes - 1}")


def read_mnist(files: Files, classes: int = 10) -> dict[str, Split]:
    """Reads MNIST and the data sets published like it: images and labels in the IDX format, compressed by gzip."""
    splits = {}
    for split, name in (("train", "train"), ("test", "t10k")):
        path = files[f"{name}-images-idx3-ubyte.gz"]
        images, labels = (_read_idx_file(files[f"{name}-{kind}-ubyte.gz"], axes) for kind, axes in IDX_KINDS.items())
        splits[split] = _mnist_split(images, labels.astype(np.int64), classes, str(path))
    return splits


def read_emnist(files: Files, variant: str, classes: int, first_label: int) -> dict[str, Split]:
    """Reads one variant from the .zip of EMNIST: IDX files like MNIST's.

    Images stay as published, with rows and columns exchanged. Labels count from 0.
    """
    (archive,) = files.values()
    splits = {}
    with _open_zip(archive) as zipped:
        members = {PurePosixPath(name).name: name for name in zipped.namelist() if "__MACOSX" not in name}
        for split in ("train", "test"):
            arrays = []
            for kind, axes in IDX_KINDS.items():
                name = f"emnist-{variant}-{split}-{kind}-ubyte.gz"
                if name not in members:
                    raise ValueError(f"{archive} has no {name}")
                with zipped.open(members[name]) as file:
                    arrays.append(_read_idx(file.read(), axes, f"{name} in {archive}"))
            images, labels = arrays
            splits[split] = _mnist_split(images, labels.astype(np.int64) - first_label, classes, str(archive))
    return splits


def _mnist_split(images: np.ndarray, labels: np.ndarray, classes: int, name: str) -> Split:
    if not len(images) or images.shape[1:] != (MNIST_SIZE, MNIST_SIZE):
        raise ValueError(f"{name} has images of shape {images.shape}, not (n, {MNIST_SIZE}, {MNIST_SIZE})")
    _check_labels(labels, len(images), classes, name)
    return Split(images[..., None], labels)


def _read_idx_file(path: Path, axes: int) -> np.ndarray:
    return _read_idx(path.read_bytes(), axes, str(path))


def _read_idx(compressed: bytes, axes: int, name: str) -> np.ndarray:
    """Reads an array in the IDX format: two zero bytes, its type (8 is uint8), its axes, its shape, and its bytes."""
    try:
        data = gzip.decompress(compressed)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"Cannot read {name} as a .gz file: {error}") from error
    if data[:4] != bytes([0, 0, 8, axes]) or len(data) < 4 + 4 * axes:
        raise ValueError(f"{name} is not an IDX file of unsigned bytes with {axes} axes")
    shape = tuple(np.frombuffer(data, ">u4", axes, offset=4).tolist())
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * axes)
    expected = np.prod(shape, dtype=object)  # Python's integers, which cannot overflow
    if len(values) != expected:
        raise ValueError(f"{name} has {len(values)} bytes for an array of shape {shape}, which needs {expected}")
    return values.reshape(shape)


def read_svhn(files: Files) -> dict[str, Split]:
    """Reads MATLAB files with X, [32, 32, 3, n], and y, where 10 stands for the digit 0; skips the extra images."""
    import scipy.io  # Imported here, because it is slow, and other data sets do not need it.

    splits = {}
    for split in ("train", "test"):
        path = files[f"{split}_32x32.mat"]
        try:
            arrays = scipy.io.loadmat(str(path))
        except Exception as error:  # For damaged bytes, SciPy raises many kinds of errors.
            raise ValueError(f"Cannot read {path} as a MATLAB file: {error}") from error
        if missing := {"X", "y"} - arrays.keys():
            raise ValueError(f"{path} has no array {min(missing)}")
        images, labels = arrays["X"], arrays["y"].ravel().astype(np.int64)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3):
            raise ValueError(f"X in {path} is {images.dtype} of shape {images.shape}, not uint8 of (32, 32, 3, n)")
        _check_labels(labels, images.shape[3], 11, str(path))
        splits[split] = Split(np.ascontiguousarray(np.moveaxis(images, -1, 0)), labels % 10)
    return splits


def read_imagenet_old(files: Files, size: int) -> dict[str, Split]:
    """Reads one .tar of PNG images for each split, without labels; the validation images are the test images."""
    return {
        split: Split(_read_tar_of_images(files[f"{name}_{size}x{size}.tar"], size))
        for split, name in (("train", "train"), ("test", "valid"))
    }


def _read_tar_of_images(path: Path, size: int) -> ImageArray:
    images = bytearray()
    for name, data in _contents_of_tar(path):
        if name.suffix == ".png" and not name.name.startswith("."):
            images += _decode_rgb(data, size, f"{name} in {path}")
    if not images:
        raise ValueError(f"{path} has no .png images")
    return np.frombuffer(images, np.uint8).reshape(-1, size, size, 3)


def _contents_of_tar(path: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Yields the name and content of each file, one at a time, because together they may not fit into memory."""
    try:
        with tarfile.open(path) as tar, progress(0, path.name, "file") as bar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None:
                    yield PurePosixPath(member.name), file.read()
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # else it keeps a million of them
                bar.update()
                stop.check()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"Cannot read {path} as a .tar file: {error}") from error


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
    """Reads .zip files of .npz batches: data, [n, 3 * size * size] by channel, row and column, and labels from 1."""
    train = [path for name, path in files.items() if "_train_" in name]
    test = [path for name, path in files.items() if "_val_" in name]
    return {"train": _read_zips(train, size), "test": _read_zips(test, size)}


def _read_zips(paths: Sequence[Path], size: int) -> Split:
    """Reads batches in the order of their numbers; a single batch may have no number."""
    batches: dict[int, tuple[ImageArray, np.ndarray]] = {}
    for path in paths:
        with _open_zip(path) as archive:
            for name in archive.namelist():
                stop.check()
                if name.endswith(".npz"):
                    digits = re.search(r"batch_(\d+)\.npz$", name)
                    number = int(digits[1]) if digits else 0
                    if number in batches:
                        raise ValueError(f"{path} has batch {number} twice")
                    batches[number] = _read_batch(archive, name, size, f"{name} in {path}")
    if not batches:
        raise ValueError(f"{paths[0]} has no .npz batches")
    numbers = sorted(batches)
    missing = sorted(set(range(1, numbers[-1] + 1)) - set(numbers))
    if missing:
        raise ValueError(f"{paths[-1]} has no batch {missing[0]}, but batch {numbers[-1]}")
    images, labels = zip(*(batches[number] for number in numbers), strict=True)
    return Split(np.concatenate(images), np.concatenate(labels))


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"Cannot read {path} as a .zip file: {error}") from error


def _read_batch(archive: zipfile.ZipFile, member: str, size: int, name: str) -> tuple[ImageArray, np.ndarray]:
    try:
        with np.load(io.BytesIO(archive.read(member))) as batch:
            data, labels = batch["data"], batch["labels"]
    except Exception as error:  # For damaged bytes, NumPy, zipfile and zlib raise many kinds of errors.
        raise ValueError(f"Cannot read {name} as a batch of images: {error}") from error
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * size * size:
        raise ValueError(f"data of {name} is {data.dtype} of shape {data.shape}, not uint8 of (n, {3 * size * size})")
    labels = labels.astype(np.int64) - 1
    _check_labels(labels, len(data), 1000, name)
    return _from_planes(data, size), labels
