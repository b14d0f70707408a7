"""Finds the image files under a folder and assigns them to the splits train and test."""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sources.resizing import extensions
from sources.splits import SPLITS, is_test

SYSTEM_FOLDERS = ("__MACOSX", "@eaDir")
"""Folders that archive programs and storage devices create, with files that look like images of the data set."""

TRAIN_NAMES = ("train", "training")
TEST_NAMES = (("test",), ("val", "valid", "validation"))
"""Names of split folders, in lower or upper case. A folder `test` has precedence over one for validation."""

TRAIN_LIKE = re.compile(r"train(ing|set)?([^a-z].*)?", re.IGNORECASE)
TEST_LIKE = re.compile(r"(test(ing|set)?|val(id(ation)?)?|dev|eval(uation)?|holdout)([^a-z].*)?", re.IGNORECASE)
"""Names that look like splits, e.g. train2017 and val2017. Together they are an error, unless both are known."""

NAMED_FILES = 5
"""The number of skipped files that a summary names."""


@dataclasses.dataclass
class Skipped:
    """The files and folders that were not read."""

    hidden: int = 0
    others: list[str] = dataclasses.field(default_factory=list)
    """Files that are not images by their extension."""
    links: list[str] = dataclasses.field(default_factory=list)
    """Symbolic links that lead nowhere, or to a folder that is read already."""
    folders: list[str] = dataclasses.field(default_factory=list)
    """Top-level folders beside the two splits."""

    def __str__(self) -> str:
        parts = []
        if self.hidden:
            parts.append(f"{self.hidden} hidden")
        if self.others:
            parts.append(f"{len(self.others)} not images ({_listed(self.others)})")
        if self.links:
            parts.append(f"{len(self.links)} links to folders read already or to nothing ({_listed(self.links)})")
        if self.folders:
            parts.append(f"outside the two splits ({_listed(self.folders)})")
        return ", ".join(parts) or "nothing"


def _listed(names: list[str]) -> str:
    rest = len(names) - NAMED_FILES
    return ", ".join(names[:NAMED_FILES]) + (f" and {rest} more" if rest > 0 else "")


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """The image files of both splits, sorted by name."""

    paths: dict[str, list[Path]]
    splits_from: str
    """How the images were assigned to the splits, as text for the log."""
    skipped: Skipped = dataclasses.field(default_factory=Skipped)


class Walk:
    """Collects the image files under folders and reads no folder twice, so that symbolic links cannot make loops.

    Folders reached without links come first: a link never takes the place of a folder's own name.
    """

    def __init__(self, root: Path):
        self.root = root
        self.skipped = Skipped()
        self._seen: set[tuple[int, int]] = set()

    def images(self, *folders: Path) -> list[list[Path]]:
        """Returns the images under each folder, sorted by name."""
        found: list[list[Path]] = [[] for _ in folders]
        links: list[list[Path]] = [[] for _ in folders]
        for folder, images, linked in zip(folders, found, links, strict=True):
            self._collect(folder, images, linked)
        self._seen.add(_identity(self.root))
        for images, linked in zip(found, links, strict=True):
            while linked:
                # Without sorting, the order would depend on the file system.
                linked.sort(reverse=True)
                link = linked.pop()
                if _identity(link) in self._seen:
                    self.skipped.links.append(self._name(link))
                else:
                    self._collect(link, images, linked)
        for names in (self.skipped.others, self.skipped.links):
            names.sort()
        return [sorted(images) for images in found]

    def _collect(self, top: Path, images: list[Path], links: list[Path]) -> None:
        folders = [top]
        while folders:
            folder = folders.pop()
            if folder != top and _identity(folder) in self._seen:
                self.skipped.links.append(self._name(folder))
                continue
            self._seen.add(_identity(folder))
            for entry in visible(folder, self.skipped):
                path = folder / entry.name
                is_link = entry.is_symlink()
                # For a link that leads to itself, Path.is_dir returns False, but DirEntry.is_dir raises an error.
                if path.is_dir() if is_link else entry.is_dir():
                    (links if is_link else folders).append(path)
                elif is_link and not path.is_file():
                    self.skipped.links.append(self._name(path))
                elif path.suffix.lower() in extensions():
                    images.append(path)
                else:
                    self.skipped.others.append(self._name(path))

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.root))


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def visible(folder: Path, skipped: Skipped | None = None) -> Iterator[os.DirEntry[str]]:
    """Yields the entries of a folder, without hidden ones and folders of the system; counts those in `skipped`."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name in SYSTEM_FOLDERS:
                if skipped is not None:
                    skipped.hidden += 1
            else:
                yield entry


def find_images(folder: Path) -> ImageFiles:
    """Finds the images of each split under a folder.

    Folders such as train and test, or Training and val, are the splits. In other folders the hash of an image's name
    decides, which gives about one test image in ten and does not change when images are added.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if its folders look like splits, but their meaning is not certain, or if a split has no images.
    """
    check_folder(folder)
    entries = sorted(entry.name for entry in visible(folder))
    subfolders = [name for name in entries if (folder / name).is_dir()]
    chosen = split_folders(folder, subfolders)
    walk = Walk(folder)
    if chosen is not None:
        train, test = walk.images(folder / chosen["train"], folder / chosen["test"])
        paths = {"train": train, "test": test}
        walk.skipped.folders = [name for name in entries if name not in chosen.values()]
        splits_from = f"its folders {chosen['train']} (train) and {chosen['test']} (test)"
    else:
        (files,) = walk.images(folder)
        _check_nested(folder, files)
        testing = [is_test(os.fsencode(path.relative_to(folder))) for path in files]
        paths = {
            "train": [path for path, test in zip(files, testing, strict=True) if not test],
            "test": [path for path, test in zip(files, testing, strict=True) if test],
        }
        splits_from = "the hashes of the images' names"
    for split in SPLITS:
        if not paths[split]:
            raise ValueError(
                f"{folder} has no {split} images (skipped: {walk.skipped}); without the folders train and test in it, "
                "about one image in ten is a test image"
            )
    return ImageFiles(paths, splits_from, walk.skipped)


def split_folders(folder: Path, subfolders: list[str]) -> dict[str, str] | None:
    """Returns the names of the folders with the images of each split; None if no folder is a split.

    Raises:
        ValueError: if the folders look like splits, but their meaning is not certain.
    """
    known = {names: [name for name in subfolders if name.lower() in names] for names in (TRAIN_NAMES, *TEST_NAMES)}
    for names in known.values():
        if len(names) > 1:
            raise _ambiguous(folder, names, "which mean the same split")
    train = next(iter(known[TRAIN_NAMES]), None)
    test = next((name for names in TEST_NAMES for name in known[names]), None)
    if train is not None and test is not None:
        return {"train": train, "test": test}
    if train is None and test is None:
        alike = {True: [], False: []}
        for name in subfolders:
            if TRAIN_LIKE.fullmatch(name) or TEST_LIKE.fullmatch(name):
                alike[bool(TRAIN_LIKE.fullmatch(name))].append(name)
        if alike[True] and alike[False]:
            raise _ambiguous(folder, alike[True] + alike[False], "which look like splits")
        return None
    if train is None:
        raise _ambiguous(folder, subfolders, f"of which {test} looks like a split, without a folder train")
    if len(subfolders) > 1:
        raise _ambiguous(folder, subfolders, f"of which {train} looks like a split, without a folder test")
    return None  # There is only a folder train, whose images are divided by their hashes.


def _check_nested(folder: Path, files: list[Path]) -> None:
    """Raises ValueError for folders of splits deeper down, whose test images would be used for training."""
    children: dict[Path, set[str]] = {}
    for parent in {path.parent for path in files}:
        while parent != folder:
            children.setdefault(parent.parent, set()).add(parent.name)
            parent = parent.parent
    for parent, names in sorted(children.items()):
        train = sorted(name for name in names if TRAIN_LIKE.fullmatch(name))
        test = sorted(name for name in names if TEST_LIKE.fullmatch(name))
        if parent != folder and train and test:
            raise ValueError(
                f"{parent} has folders {_listed([*train, *test])}, which look like splits; set data.path to it, or "
                f"arrange the images in folders train and test in {folder}"
            )


def _ambiguous(folder: Path, names: list[str], why: str) -> ValueError:
    return ValueError(
        f"{folder} has folders {_listed(names)}, {why}; name the two splits train and test, or, if these are classes, "
        "move them into one new folder there"
    )


def find_celeba(folder: Path) -> ImageFiles:
    """Finds CelebA's images by its list_eval_partition.txt. The images for validation are the test images.

    Raises:
        FileNotFoundError: if the list, or an image in it, is not under the folder.
        ValueError: if a line of the list is not a name and a part, or a name is listed twice.
    """
    check_folder(folder)
    partition = next(folder.rglob("list_eval_partition.txt"), None)
    if partition is None:
        raise FileNotFoundError(f"no list_eval_partition.txt under {folder}; get it with CelebA's images")
    # The folder img_celeba beside it has images of the same names that are not aligned.
    aligned = next((path for path in sorted(folder.rglob("img_align_celeba")) if path.is_dir()), folder)
    walk = Walk(aligned)
    images = {path.name: path for path in walk.images(aligned)[0]}
    paths: dict[str, list[Path]] = {split: [] for split in SPLITS}
    listed: Counter[str] = Counter()
    for line in partition.read_text().splitlines():
        listed.update(line.split()[:1])
        match line.split():
            case [name, "0" | "1" as part] if name in images:
                paths[SPLITS[int(part)]].append(images[name])
            case [_, "2"] | []:
                continue
            case [name, "0" | "1"]:
                raise FileNotFoundError(f"no {name} under {folder}, but {partition} names it; copy all of the images")
            case _:
                raise ValueError(f"{partition} has the line {line!r}; it must be a name and 0, 1 or 2")
    (name, times), *_ = listed.most_common(1) or [("", 0)]
    if times > 1:
        raise ValueError(f"{partition} names {name} {times} times; each image must be in one split")
    for split in SPLITS:
        if not paths[split]:
            raise ValueError(f"{partition} has no {split} images")
    return ImageFiles(paths, partition.name, walk.skipped)


def check_folder(folder: Path) -> None:
    """Raises FileNotFoundError if there is no such folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"data.path is {str(folder)!r}, which is not a folder; set it to the folder of images")
