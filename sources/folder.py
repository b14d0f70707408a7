"""Folders of images, decoded to arrays of one size.

The decoded images are cached on disk. If some files cannot be decoded, or decoding is interrupted, the images decoded
so far are kept, and the next run decodes only the others.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import logging
from PIL import Image

from infra import stop
from infra.console import progress
from sources.image_files import ImageFiles, find_images
from sources.resizing import CHANNELS, Framing, decode_image, shorter_side
from sources.splits import SPLITS, ImageArray, Split, StoredSplit, read_split, stored_decoding, write_splits

DECODING = 1
"""The version of the rules that turn a file into levels. Images stored under other rules are decoded again.

0: EXIF orientation was ignored, 16-bit images were refused.
1: EXIF orientation is applied, 16-bit images are reduced to 8 bits.
"""

SCRATCH, IN_USE = "decoding_", "in_use"
"""The beginning of the names of temporary folders, and the file in each that its process locks."""

YOUNG_SECONDS = 60.0
"""A temporary folder may be younger than this without a lock, because it is locked after it is created."""

NAMED_UNREADABLE = 20
"""The number of unreadable files that an error names."""


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Decodes image files. Several threads may call it at the same time."""

    framing: Framing
    image_size: int
    num_channels: int
    enlarged: list[Path] = dataclasses.field(default_factory=list, compare=False, repr=False)
    """The decoded files with fewer pixels than `image_size`."""
    grey: list[Path] = dataclasses.field(default_factory=list, compare=False, repr=False)
    """The decoded files whose three channels are equal."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.image_size, self.image_size, self.num_channels

    @property
    def settings(self) -> tuple[object, ...]:
        """The settings that are part of the names of caches."""
        return self.image_size, self.num_channels, self.framing.__name__

    def __call__(self, path: Path) -> np.ndarray | str:
        """Returns the image, or, if it cannot be decoded, the reason."""

        def framing(image: Image.Image, size: int) -> Image.Image:
            if min(image.size) < size:
                self.enlarged.append(path)
            return self.framing(image, size)

        try:
            image = decode_image(path, framing, self.image_size, self.num_channels, turn=True)
        except ValueError as error:
            return str(error)
        if self.num_channels == 3 and np.all(image == image[..., :1]):
            self.grey.append(path)
        return image


def load_folder(
    folder: Path,
    split: str,
    image_size: int,
    num_channels: int,
    cache_dir: Path,
    framing: Framing = shorter_side,
    find: Callable[[Path], ImageFiles] = find_images,
) -> StoredSplit:
    """Loads the images under a folder, in the order of their names; logs a summary of what was read and skipped.

    The decoded images are cached in `cache_dir` and used again while the names, sizes and times of the files stay the
    same.

    Args:
        framing: makes squares of images of another size.
        find: finds the images of each split.

    Raises:
        FileNotFoundError: if there is no such folder.
        OSError: if there is too little space for the decoded images.
        ValueError: naming the files that cannot be decoded, or if a split has no images.
    """
    if num_channels not in CHANNELS:
        raise ValueError(f"data.num_channels is {num_channels}; for a folder of images it must be 1 or 3")
    decoder = Decoder(framing, image_size, num_channels)
    files = find(folder)
    stored = _decoded(folder, files.paths, split, cache_dir, decoder)
    others = ", ".join(f"{len(files.paths[other])} {other} images" for other in SPLITS if other != split)
    logging.info(
        "Read %d %s images from %s (there are %s); splits by %s; skipped: %s",
        len(stored.images),
        split,
        folder,
        others,
        files.splits_from,
        files.skipped,
    )
    if decoder.enlarged or decoder.grey:  # Stored images were decoded by an earlier run, which logged this.
        logging.info(
            "Decoded both splits: %d images enlarged to %d pixels, %d grey images given 3 equal channels",
            len(decoder.enlarged),
            image_size,
            len(decoder.grey),
        )
    return stored


def _decoded(
    folder: Path, paths: Mapping[str, Sequence[Path]], split: str, cache_dir: Path, decoder: Decoder
) -> StoredSplit:
    files = [path for split in SPLITS for path in paths[split]]
    keys = [file_key(path) for path in files]
    num_train = len(paths["train"])
    cache = cache_dir / f"folder_{_digest((*decoder.settings, num_train), *keys)}"
    stored, version = read_split(cache, split), stored_decoding(cache)
    if stored is not None and version == DECODING:
        return stored
    if stored is not None:
        logging.warning(
            "%s holds images decoded by an earlier version of this program, which ignored their EXIF orientation; "
            "decoding %s again",
            cache,
            folder,
        )
    partial = cache_dir / f"partial_{_digest((*decoder.settings, DECODING), os.fsencode(os.path.abspath(folder)))}"
    _decode_into(cache, partial, f"folder {folder.resolve().name}", files, keys, num_train, decoder)
    stored = read_split(cache, split)
    assert stored is not None, "it was just written"
    return stored


def _decode_into(
    cache: Path,
    partial: Path,
    name: str,
    files: Sequence[Path],
    keys: Sequence[bytes],
    num_train: int,
    decoder: Decoder,
) -> None:
    """Stores the decoded images in `cache` if all were decoded, otherwise the decoded ones in `partial`.

    Raises:
        OSError: if there is too little space. Without this check, writing to a file mapped into memory would end the
            process when the disk is full.
        ValueError: naming the files that cannot be decoded.
    """
    cache.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(cache.parent)
    _check_space(cache.parent, 2 * len(files) * math.prod(decoder.shape))  # decoded images and their stored copy
    with (
        tempfile.TemporaryDirectory(dir=cache.parent, prefix=SCRATCH) as scratch,
        (Path(scratch) / IN_USE).open("w") as in_use,
    ):
        with contextlib.suppress(OSError):  # Some file systems have no locks.
            fcntl.flock(in_use, fcntl.LOCK_EX)
        rows, whole, replaced = (Path(scratch) / part for part in ("rows", "whole", "replaced"))
        rows.mkdir()
        problems: list[str] = []
        complete = False
        try:
            images = _decode_files(files, keys, decoder, rows, partial, problems)
            complete = not problems
        finally:  # After Ctrl-C, too, the decoded images are kept.
            if not complete and len(problems) < len(files):
                _replace(rows, partial, replaced)
        if problems:
            raise ValueError(_problems_text(problems, len(files)))
        write_splits(whole, name, {"train": Split(images[:num_train]), "test": Split(images[num_train:])}, DECODING)
        if stored_decoding(cache) != DECODING:  # Another host may have been faster.
            _replace(whole, cache, replaced)
        shutil.rmtree(partial, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Removes what decodings have left that were killed. They no longer lock their file."""
    for path in folder.glob(f"{SCRATCH}*/{IN_USE}"):
        with contextlib.suppress(OSError), path.open("a") as in_use:  # in use, or removed by another host
            if time.time() - path.stat().st_mtime > YOUNG_SECONDS:
                fcntl.flock(in_use, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path.parent, ignore_errors=True)


def _replace(new: Path, target: Path, replaced: Path) -> None:
    """Moves the folder `new` to `target`, and an older `target` to `replaced`, while other hosts may do the same."""
    try:
        if target.exists():
            target.rename(replaced)
        new.rename(target)
    except OSError:
        if not target.exists():  # Another host may have been faster.
            raise


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder} has {free / 1e9:.1f} GB free, but decoding the images takes {needed / 1e9:.1f} GB, half of it "
            "temporarily; set data.dir to a larger disk"
        )


def _problems_text(problems: Sequence[str], num_files: int) -> str:
    if len(problems) == num_files:
        return f"{problems[0]}; none of the {num_files} images can be used"
    more = len(problems) - NAMED_UNREADABLE
    rest = f"; and {more} more" if more > 0 else ""
    advice = f"remove or replace {'them' if len(problems) > 1 else 'it'}; the other images stay in the cache"
    return f"{'; '.join(problems[:NAMED_UNREADABLE])}{rest}; {advice}"


def file_key(path: Path) -> bytes:
    """Returns the name, size and time of a file, which identify its content without reading it."""
    status = path.stat()
    name = os.path.abspath(path)  # Resolving links would take minutes for a million images.
    return os.fsencode(name) + f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode()


def _digest(settings: object, *parts: bytes) -> str:
    digest = hashlib.sha256(repr(settings).encode())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _decode_files(
    files: Sequence[Path], keys: Sequence[bytes], decoder: Decoder, rows: Path, partial: Path, problems: list[str]
) -> ImageArray:
    """Decodes files in threads into an array in the folder `rows`, mapped into memory because it may be larger.

    Images found in the folder `partial` are copied. The hashes of the decoded files' keys are stored beside the images,
    so that `rows` can be the next run's `partial`.

    Args:
        problems: receives a text for each file that cannot be decoded.
    """
    images = np.lib.format.open_memmap(rows / "images.npy", "w+", np.uint8, (len(files), *decoder.shape))
    hashes = np.array([np.frombuffer(hashlib.sha256(key).digest(), np.uint8) for key in keys])
    done = _copy_partial(partial, hashes, images)
    waiting = np.flatnonzero(~done).tolist()
    pool = ThreadPoolExecutor()
    try:
        with progress(len(files), "decoding", "image", initial=int(done.sum())) as bar:
            for row, image in zip(waiting, pool.map(decoder, [files[row] for row in waiting]), strict=True):
                if isinstance(image, str):
                    problems.append(f"{files[row]} {image}")
                else:
                    images[row], done[row] = image, True
                bar.update()
                stop.check()
    finally:
        pool.shutdown(cancel_futures=True)
        np.save(rows / "hashes.npy", hashes * done[:, None])
    return images


def _copy_partial(partial: Path, hashes: np.ndarray, images: ImageArray) -> np.ndarray:
    """Copies the images that an earlier run has decoded; returns a mask of their rows."""
    done = np.zeros(len(hashes), bool)
    try:
        kept, kept_hashes = (np.load(partial / f"{name}.npy", mmap_mode="r") for name in ("images", "hashes"))
    except (
        OSError,
        ValueError,
        EOFError,
    ):  # No images were kept, or they were removed or damaged.
        return done
    row_of = {row_hash.tobytes(): row for row, row_hash in enumerate(hashes)}
    for kept_hash, image in zip(kept_hashes, kept, strict=True):
        row = row_of.get(kept_hash.tobytes())
        if row is not None:
            images[row], done[row] = image, True
    return done
