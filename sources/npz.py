"""Images in an .npz file of the user's own."""

import zipfile
from pathlib import Path

import numpy as np

from sources.source import MemorySource
from sources.splits import TEST_SHARE, Split, describe, is_test


def load_npz(path: Path, split: str) -> MemorySource:
    """Loads one split from an .npz file.

    The file has the arrays x_train and x_test, or one array `images`, of which a hash of each image's content makes
    about one in ten a test image. Images are unsigned bytes, [n, height, width, channels] or [n, height, width].
    Labels, if there are any, are integers: y_train and y_test, or `labels`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or not an .npz file, lacks these arrays, or has no images of this split.
    """
    arrays, names = _read_arrays(path, ("images", "labels", f"x_{split}", f"y_{split}"))
    if "images" not in names and f"x_{split}" not in names:
        raise ValueError(
            f"{path} has the arrays {', '.join(names) or '(none)'}, but neither images nor x_{split}; save it with "
            "np.savez(path, x_train=..., x_test=...) or np.savez(path, images=...)"
        )
    images, labels = _split_of(arrays, path, split)
    return MemorySource(images, describe(f"npz {path.name}", split, images), labels)


def _read_arrays(path: Path, wanted: tuple[str, ...]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the wanted arrays that are in the file, and the names of all."""
    if not path.is_file():
        raise FileNotFoundError(f"data.path is {str(path)!r}, which is not a file; set it to the .npz file")
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError(_kind_of(path))
            file.seek(0)
            with np.load(file) as archive:
                names = list(archive)
                arrays = {name: archive[name] for name in names if name in wanted}
    except Exception as error:  # For damaged bytes, NumPy, zipfile and zlib raise many kinds of errors.
        raise ValueError(f"Cannot read {path} as an .npz file: {error}") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # NumPy returns the bytes of a part that is not .npy.
            raise ValueError(f"Cannot read {path} as an .npz file: its part {name!r} is not an array")
    return arrays, names


def _kind_of(path: Path) -> str:
    """Says what a file is that is not a zip archive."""
    with path.open("rb") as file:
        start = file.read(6)
    if start != b"\x93NUMPY":
        return "it is empty" if not start else "it is not a zip archive, or cut short"
    array = np.load(path, mmap_mode="r")
    return (
        f"it is a single .npy array, {array.dtype} of shape {array.shape}; convert it by "
        "np.savez('images.npz', images=np.load(path)) and set data.path to the new file"
    )


def _split_of(arrays: dict[str, np.ndarray], path: Path, split: str) -> Split:
    whole = "images" in arrays
    name, labels_name = ("images", "labels") if whole else (f"x_{split}", f"y_{split}")
    images, labels = arrays[name], arrays.get(labels_name)
    _check_images(images, name, path)
    if labels is not None:
        labels = _checked_labels(labels, labels_name, len(images), name, path)
    if whole:
        chosen = np.array([is_test(image.tobytes()) == (split == "test") for image in images], bool)
        images, labels = images[chosen], None if labels is None else labels[chosen]
    if not len(images):
        share = f"; about {TEST_SHARE:.0%} of the array images are test images" if whole else f"; {name} is empty"
        raise ValueError(f"{path} has no {split} images{share}")
    return Split(images if images.ndim == 4 else images[..., None], labels)


def _check_images(images: np.ndarray, name: str, path: Path) -> None:
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(
            f"{name} in {path} is {images.dtype} of shape {images.shape}; it must be uint8 of 3 or 4 axes, "
            "[n, height, width] or [n, height, width, channels]"
        )
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
        raise ValueError(
            f"{name} in {path} has shape {images.shape}, with channels before height and width; channels come last, so "
            f"save {name}.transpose(0, 2, 3, 1)"
        )


def _checked_labels(labels: np.ndarray, name: str, count: int, images_name: str, path: Path) -> np.ndarray:
    whole_numbers = labels.dtype.kind in "biu" or (labels.dtype.kind == "f" and np.all(labels == np.rint(labels)))
    if not whole_numbers:
        raise ValueError(f"{name} in {path} is {labels.dtype}; labels must be integers")
    if labels.ndim == 0 or labels.size != len(labels):
        raise ValueError(f"{name} in {path} has shape {labels.shape}; it must be [n], one label per image")
    if len(labels) != count:
        raise ValueError(f"{path} has {count} images in {images_name}, but {len(labels)} labels in {name}")
    return labels.ravel().astype(np.int64)
