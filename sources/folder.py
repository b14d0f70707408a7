"""Folders of PNG, JPEG and WebP images, decoded to arrays of one size."""

import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from infra.console import progress
from sources.resizing import CHANNELS, Framing, decode_image, shorter_side
from sources.source import ImageLevels
from sources.splits import SPLITS, Levels, Split, StoredSplit, is_test, read_split, write_splits

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
"""WebP is what LSUN's own script exports."""


def load_folder(
    folder: Path,
    split: str,
    image_size: int,
    num_channels: int,
    cache_dir: Path,
    framing: Framing = shorter_side,
    find: Callable[[Path], Mapping[str, list[Path]]] | None = None,
) -> StoredSplit:
    """The images under a folder, in the order of their names.

    Test images are those under folder/test, if it has train and test; else those whose names' hashes say so, about one
    in ten, which stays so when images are added. `find` gives the images of each split, if it is not to be so.

    `framing` makes squares of images of another size. Alpha is dropped. The decoded images are kept in `cache_dir` for
    as long as the names, sizes and times of the files stay the same.

    Raises:
        FileNotFoundError: if there is no such folder.
        OSError: if there is too little space for the decoded images.
        ValueError: naming the file that is no image with 8 bits per channel, or if a split has no images.
    """
    if num_channels not in CHANNELS:
        raise ValueError(f"data.num_channels is {num_channels}; for a folder of images it must be 1 or 3")
    paths = (find or split_paths)(folder)
    files = [path for split in SPLITS for path in paths[split]]
    settings = (image_size, num_channels, framing.__name__, len(paths["train"]))
    cache = cache_dir / f"folder_{_listing_digest(files, settings)}"
    stored = read_split(cache, split)
    if stored is None:
        decode = functools.partial(decode_images, framing=framing, size=image_size, num_channels=num_channels)
        needed = 2 * len(files) * image_size**2 * num_channels  # as they are decoded, and as they are stored
        _decode_into(cache, f"folder {folder.resolve().name}", paths, decode, needed)
        stored = read_split(cache, split)
        assert stored is not None, "it was just written"
    return stored


def _decode_into(
    cache: Path, name: str, paths: Mapping[str, list[Path]], decode: Callable[[list[Path], Path], Levels], needed: int
) -> None:
    """Stores the decoded images as a whole, or not at all: other hosts may be doing the same.

    Raises:
        OSError: if fewer than `needed` bytes are free there: a file mapped into memory would end the process later.
    """
    cache.parent.mkdir(parents=True, exist_ok=True)
    _check_space(cache.parent, needed)
    with tempfile.TemporaryDirectory(dir=cache.parent, prefix="decoding_") as scratch:
        decoded = {split: Split(decode(paths[split], Path(scratch) / f"{split}.npy")) for split in SPLITS}
        write_splits(Path(scratch) / "whole", name, decoded)
        try:
            (Path(scratch) / "whole").rename(cache)
        except OSError:
            if not cache.exists():  # else another host was first
                raise


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder} has {free / 1e9:.1f} GB free, but decoding the images takes {needed / 1e9:.1f} GB, half of it "
            "for a while; set data.dir to a larger disk"
        )


def split_paths(folder: Path) -> dict[str, list[Path]]:
    """The images of each split, sorted by name."""
    _check_folder(folder)
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


def celeba_paths(folder: Path) -> dict[str, list[Path]]:
    """CelebA's images for training and, as published, those for validation, by its list_eval_partition.txt.

    Raises:
        FileNotFoundError: if the list, or an image in it, is not under the folder.
        ValueError: if a line of it is not a name and a part.
    """
    _check_folder(folder)
    partition = next(folder.rglob("list_eval_partition.txt"), None)
    if partition is None:
        raise FileNotFoundError(f"there is no list_eval_partition.txt under {folder}; it comes with CelebA's images")
    # beside it there may be img_celeba, whose images have the same names, but are not aligned
    aligned = next((path for path in folder.rglob("img_align_celeba") if path.is_dir()), folder)
    images = {path.name: path for path in _images_under(aligned)}
    paths: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for line in partition.read_text().splitlines():
        match line.split():
            case [name, "0" | "1" as part] if name in images:
                paths[SPLITS[int(part)]].append(images[name])
            case [_, "2"] | []:
                continue
            case [name, "0" | "1"]:
                raise FileNotFoundError(f"there is no {name} under {folder}, but {partition} names it")
            case _:
                raise ValueError(f"{partition} has a line {line!r}, not a name and 0, 1 or 2")
    for split in SPLITS:
        if not paths[split]:
            raise ValueError(f"{partition} has no {split} images")
    return paths


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"data.path is {str(folder)!r}, which is no folder")


def _images_under(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())


def _listing_digest(paths: Sequence[Path], settings: object) -> str:
    """Identifies what a folder holds without reading it."""
    digest = hashlib.sha256(repr(settings).encode())
    for path in paths:
        status = path.stat()
        name = os.path.abspath(path)  # not resolved, which takes a minute or two for a million images
        digest.update(os.fsencode(name) + f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def decode_images(paths: Sequence[Path], mapped: Path, framing: Framing, size: int, num_channels: int) -> Levels:
    """Decodes in threads, into the new file `mapped`, for they may be more than fit into memory.

    Raises:
        ValueError: naming the first file that cannot be decoded.
    """
    images = np.lib.format.open_memmap(mapped, "w+", np.uint8, (len(paths), size, size, num_channels))
    with ThreadPoolExecutor() as pool, progress(len(paths), "decoding", "image") as bar:
        decoded = pool.map(lambda path: _decode(path, framing, size, num_channels), paths)
        for number, image in enumerate(decoded):
            images[number] = image
            bar.update()
    return images


def _decode(path: Path, framing: Framing, size: int, num_channels: int) -> ImageLevels:
    try:
        return decode_image(path, framing, size, num_channels)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
