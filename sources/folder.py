"""Folders of PNG and JPEG images, decoded to arrays of one size."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from records import progress
from sources.splits import SPLITS, Levels, Split, StoredSplit, is_test, read_split, write_splits

EXTENSIONS = (".png", ".jpg", ".jpeg")
CHANNELS = {1: "L", 3: "RGB"}
"""Pillow's mode for each number of channels."""
EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def load_folder(folder: Path, split: str, image_size: int, num_channels: int, cache_dir: Path) -> StoredSplit:
    """The images under a folder, in the order of their names.

    Test images are those under folder/test, if it has train and test; else those whose names' hashes say so, about one
    in ten, which stays so when images are added.

    Of an image of another size the shorter side is brought to `image_size` by Pillow's bilinear filter, which averages
    over what it leaves out; then the centre is cut out. Alpha is dropped. The decoded images are kept in `cache_dir`
    for as long as the names, sizes and times of the files stay the same.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: naming the file that is no image with 8 bits per channel, or if a split has no images.
    """
    if num_channels not in CHANNELS:
        raise ValueError(f"data.num_channels is {num_channels}; for a folder of images it must be 1 or 3")
    paths = split_paths(folder)
    files = [path for split in SPLITS for path in paths[split]]
    cache = cache_dir / f"folder_{_listing_digest(files, image_size, num_channels)}"
    stored = read_split(cache, split)
    if stored is None:
        decoded = {split: Split(decode_images(paths[split], image_size, num_channels)) for split in SPLITS}
        write_splits(cache, f"folder {folder.resolve().name}", decoded)
        stored = read_split(cache, split)
        assert stored is not None, "it was just written"
    return stored


def split_paths(folder: Path) -> dict[str, list[Path]]:
    """The images of each split, sorted by name."""
    if not folder.is_dir():
        raise FileNotFoundError(f"data.path is {str(folder)!r}, which is no folder")
    if all((folder / split).is_dir() for split in SPLITS):
        paths = {split: _images_under(folder / split) for split in SPLITS}
    else:
        files = _images_under(folder)
        testing = [is_test(os.fsencode(path.relative_to(folder))) for path in files]
        paths = {
            "train": [path for path, test in zip(files, testing, strict=True) if not test],
            "test": [path for path, test in zip(files, testing, strict=True) if test],
        }
    for split in SPLITS:
        if not paths[split]:
            raise ValueError(
                f"{folder} has no {split} images ({', '.join(EXTENSIONS)}); without the folders train and test in it, "
                "about one image in ten is for testing"
            )
    return paths


def _images_under(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())


def _listing_digest(paths: Sequence[Path], *settings: int) -> str:
    """Identifies what a folder holds without reading it."""
    digest = hashlib.sha256(repr(settings).encode())
    for path in paths:
        status = path.stat()
        digest.update(os.fsencode(path.resolve()) + f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def decode_images(paths: Sequence[Path], image_size: int, num_channels: int) -> Levels:
    """Decodes in threads; raises ValueError naming the first file that cannot be decoded."""
    images = np.empty((len(paths), image_size, image_size, num_channels), np.uint8)
    with ThreadPoolExecutor() as pool, progress(len(paths), "decoding", "image") as bar:
        decoded = pool.map(lambda path: decode_image(path, image_size, num_channels), paths)
        for number, image in enumerate(decoded):
            images[number] = image
            bar.update()
    return images


def decode_image(path: Path, image_size: int, num_channels: int) -> UInt8[np.ndarray, "size size channel"]:
    """See `load_folder`."""
    try:
        with Image.open(path) as image:
            mode = image.mode
            image.load()
            if mode in EIGHT_BIT:
                image = image.convert(CHANNELS[num_channels])
                levels = np.asarray(_centre(image, image_size))
                return levels.reshape(image_size, image_size, num_channels)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    raise ValueError(f"{path} has pixels of Pillow's mode {mode}; known are {', '.join(EIGHT_BIT)}")


def _centre(image: Image.Image, size: int) -> Image.Image:
    if min(image.size) != size:
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))
