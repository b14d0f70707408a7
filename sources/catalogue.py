"""The published data sets by name, and the forms in which each can be read.

data.path    the original images: a folder, or a file of records
data.dir     images that --mode=prepare has converted from the authors' files, or that tensorflow-datasets has prepared
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from configs.default import Config
from sources.folder import load_folder
from sources.image_files import find_celeba
from sources.published import (
    CIFAR10,
    FASHION_MNIST,
    KMNIST,
    MNIST,
    SVHN,
    VARIANTS,
    Published,
    emnist,
    imagenet,
    prepare_published,
)
from sources.resizing import block_means, centre_140, centre_square, shorter_side
from sources.source import MemorySource, Source
from sources.splits import read_split
from sources.tfds_folders import TfdsSet, can_download, download_tfds, find_tfds, load_raw_records, load_tfds


@dataclasses.dataclass(frozen=True)
class Originals:
    """The original images of a data set, read from data.path."""

    content: str
    """A description of what data.path must point to."""
    load: Callable[[Config, str], Source]


@dataclasses.dataclass(frozen=True)
class Entry:
    """The forms in which a data set can be read. A form that does not exist is None."""

    files: Published | None = None
    tfds: TfdsSet | None = None
    originals: Originals | None = None


def _imagenet(data: Config) -> Entry:
    files = imagenet(data.variant, data.image_size)
    name = f"{VARIANTS[data.variant]}/{data.image_size}x{data.image_size}"
    return Entry(files, TfdsSet(name, test="validation"))


def _emnist(data: Config) -> Entry:
    return Entry(emnist(data.variant), TfdsSet(f"emnist/{data.variant}"))


def _celeba(data: Config) -> Entry:
    del data
    return Entry(
        tfds=TfdsSet("celeb_a", test="validation", framing=centre_140),
        originals=Originals("the folder with img_align_celeba and list_eval_partition.txt", _load_celeba),
    )


def _load_celeba(data: Config, split: str) -> Source:
    loaded = load_folder(
        Path(data.path), split, data.image_size, data.num_channels, Path(data.dir), centre_140, find_celeba
    )
    return MemorySource(*loaded)


def _lsun(data: Config) -> Entry:
    if not data.category:
        raise ValueError("data.category is empty; for LSUN it must be a scene, e.g. church_outdoor or bedroom")
    framing = shorter_side if data.image_size == 128 else centre_square
    return Entry(
        tfds=TfdsSet(f"lsun/{data.category}", test="validation", framing=framing),
        originals=Originals("a folder of its images, exported, in folders train and test", _load_lsun),
    )


def _load_lsun(data: Config, split: str) -> Source:
    path = Path(data.path)
    if next(path.rglob("data.mdb"), None) is not None:
        raise ValueError(
            f"{path} holds LSUN's lmdb; export its images with LSUN's data.py and set data.path to their folder"
        )
    framing = shorter_side if data.image_size == 128 else centre_square
    return MemorySource(*load_folder(path, split, data.image_size, data.num_channels, Path(data.dir), framing))


def _faces(tfds: Callable[[Config], TfdsSet | None]) -> Callable[[Config], Entry]:
    originals = Originals("its .tfrecords file of this size, as published, or a folder of its images", _load_faces)
    return lambda data: Entry(tfds=tfds(data), originals=originals)


def _load_faces(data: Config, split: str) -> Source:
    path = Path(data.path)
    if not path.is_dir():
        return load_raw_records(path, split)
    return MemorySource(*load_folder(path, split, data.image_size, data.num_channels, Path(data.dir), block_means))


CATALOGUE: dict[str, Callable[[Config], Entry]] = {
    "CIFAR10": lambda data: Entry(CIFAR10, TfdsSet("cifar10")),
    "MNIST": lambda data: Entry(MNIST, TfdsSet("mnist")),
    "FashionMNIST": lambda data: Entry(FASHION_MNIST, TfdsSet("fashion_mnist")),
    "KMNIST": lambda data: Entry(KMNIST, TfdsSet("kmnist")),
    "EMNIST": _emnist,
    "SVHN": lambda data: Entry(SVHN, TfdsSet("svhn_cropped")),
    "ImageNet": _imagenet,
    "CelebA": _celeba,
    "CELEBA": _celeba,
    "LSUN": _lsun,
    "CelebAHQ": _faces(lambda data: TfdsSet(f"celeb_a_hq/{data.image_size}", test=None)),
    "FFHQ": _faces(lambda data: None),
}
"""The forms of each data set, from config.data."""


def load_entry(data: Config, split: str) -> Source:
    """Opens a split of a published data set in the form that is available.

    Raises:
        FileNotFoundError: if no form is available. The message says what to supply.
        ValueError: if a file is damaged, or a field of `data` does not fit the data set.
    """
    entry = CATALOGUE[data.dataset](data)
    if data.path:
        if entry.originals is None:
            raise ValueError(
                f"data.path is {data.path!r}, but {data.dataset} is read from data.dir; leave it empty, or set "
                "data.dataset to npz or folder for images of your own"
            )
        return entry.originals.load(data, split)
    if entry.files is not None:
        stored = read_split(Path(data.dir) / entry.files.name, split)
        if stored is not None:
            return MemorySource(*stored)
    if entry.tfds is not None:
        folder = find_tfds(entry.tfds, Path(data.dir))
        if folder is not None:
            return load_tfds(folder, entry.tfds, split, data.image_size)
    title = data.dataset if entry.files is None else entry.files.title
    raise FileNotFoundError(f"{title} is not in {data.dir}: {_ways(entry)}")


def _ways(entry: Entry) -> str:
    """Returns text that says how to supply a data set."""
    ways = []
    if entry.files is not None:
        ways.append(
            f"get {', '.join(entry.files.sha256)}; then run the command once with --mode=prepare and "
            "--config.data.archive=PATH, the file or its folder"
        )
    if entry.originals is not None:
        ways.append(f"set data.path to {entry.originals.content}")
    if entry.tfds is not None:
        ways.append(
            f"set data.dir to the folder where tensorflow-datasets has prepared {entry.tfds.name}, or install "
            "requirements-prepare.txt and prepare it by --mode=prepare"
        )
    return "; or ".join(ways)


def prepare_entry(data: Config) -> str:
    """Converts the authors' files at `data.archive`; if it is empty, tensorflow-datasets downloads the data set.

    Returns:
        A line for people that says what was written.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is not the published one, the data set needs no preparation, or TensorFlow is missing.
    """
    if data.dataset not in CATALOGUE:
        raise ValueError(f"data.dataset is {data.dataset!r}; --mode=prepare prepares {', '.join(CATALOGUE)}")
    entry, data_dir = CATALOGUE[data.dataset](data), Path(data.dir)
    if data.archive:
        if entry.files is None:
            raise ValueError(f"data.archive is {data.archive!r}, but {data.dataset} does not use it: {_ways(entry)}")
        accepted = [digest.strip().lower() for digest in data.archive_sha256.split(",")]
        return prepare_published(entry.files, Path(data.archive), accepted, data_dir)
    if entry.tfds is not None and can_download():
        return download_tfds(entry.tfds, data_dir)
    if entry.files is not None:
        files = ", ".join(entry.files.sha256)
        raise ValueError(
            f"data.archive is empty; for {entry.files.title} set it to the file or the folder with {files}, or install "
            "requirements-prepare.txt to download them"
        )
    raise ValueError(f"Nothing to prepare {data.dataset} from: {_ways(entry)}")
