"""Published data sets: their files, and the conversion of these files to the form that training reads."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from sources import archives
from sources.splits import Split, write_splits

VARIANTS = {"old": "downsampled_imagenet", "new": "imagenet_resized"}
"""Versions of ImageNet: the papers use "old"; "new" has smoother images with fewer bits/dim."""

EMNIST_VARIANTS = {
    "balanced": (47, 0),
    "letters": (26, 1),
    "digits": (10, 0),
    "mnist": (10, 0),
    "byclass": (62, 0),
    "bymerge": (47, 0),
}
"""The number of classes and the first label of each variant of EMNIST."""


@dataclasses.dataclass(frozen=True)
class Published:
    """A data set as its authors distribute it."""

    name: str
    """The name of its folder."""
    title: str
    """Its name in the descriptions of its images."""
    sha256: Mapping[str, tuple[str, ...]]
    """The hashes that are accepted for each file."""
    read: Callable[[archives.Files], dict[str, Split]]


CIFAR10 = Published(
    name="CIFAR10",
    title="CIFAR10",
    sha256={"cifar-10-binary.tar.gz": ("c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",)},
    read=archives.read_cifar10,
)
MNIST = Published(
    name="MNIST",
    title="MNIST",
    sha256={
        "train-images-idx3-ubyte.gz": ("440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",),
        "train-labels-idx1-ubyte.gz": ("3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",),
        "t10k-images-idx3-ubyte.gz": ("8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",),
        "t10k-labels-idx1-ubyte.gz": ("f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",),
    },
    read=archives.read_mnist,
)
FASHION_MNIST = Published(
    name="FashionMNIST",
    title="FashionMNIST",
    # The authors' files first, then those of Debian's package dataset-fashion-mnist, which compresses them without
    # their names.
    sha256={
        "train-images-idx3-ubyte.gz": (
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
        ),
        "train-labels-idx1-ubyte.gz": (
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
        ),
        "t10k-images-idx3-ubyte.gz": (
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
        ),
        "t10k-labels-idx1-ubyte.gz": (
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
        ),
    },
    read=archives.read_mnist,
)
KMNIST = Published(
    name="KMNIST",
    title="KMNIST",
    sha256={
        "train-images-idx3-ubyte.gz": ("51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",),
        "train-labels-idx1-ubyte.gz": ("e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",),
        "t10k-images-idx3-ubyte.gz": ("edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",),
        "t10k-labels-idx1-ubyte.gz": ("20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",),
    },
    read=archives.read_mnist,
)
EMNIST_FILES = {"gzip.zip": ("fb9bb67e33772a9cc0b895e4ecf36d2cf35be8b709693c3564cea2a019fcda8e",)}
SVHN = Published(
    name="SVHN",
    title="SVHN (cropped)",
    sha256={
        "train_32x32.mat": ("435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",),
        "test_32x32.mat": ("cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",),
    },
    read=archives.read_svhn,
)
IMAGENET_FILES: dict[tuple[str, int], dict[str, tuple[str, ...]]] = {
    ("old", 32): {
        "train_32x32.tar": ("244a323d48f8d72f65ad8b54658c01fed68d2d7bdc77ccb43da58c11e94224e5",),
        "valid_32x32.tar": ("862e559462b24cf736212a19f6b0d47b55c2dc8ebdaa95ccecfe71260124c8f7",),
    },
    ("old", 64): {
        "train_64x64.tar": ("e2a2c1947a748d0d256e98e6d82800d855441dc9e4de2e71a773f1324c4524d7",),
        "valid_64x64.tar": ("eeac03ec4f585baf871d2b4cb9c974bfe345e74878a74e5820fe6eb1041629cd",),
    },
    ("new", 32): {
        "Imagenet32_train_npz.zip": ("94226337ecc1b0309d9fcd0167127aaadc931587035fbcb53925235edbaec4fc",),
        "Imagenet32_val_npz.zip": ("013990e6dec1237dcd1f9beadbab81ead6604cc119af5cacbfb59ae28148377a",),
    },
    ("new", 64): {
        "Imagenet64_train_part1_npz.zip": ("9422dc1dc5d092e9814a70a1cb7fc74880d2db5d88a0cb8a34ee363b12bde3f1",),
        "Imagenet64_train_part2_npz.zip": ("9fafc115afb7e6c301e66dc16b2d737152b427bd5dab26e1293487a6819c7f30",),
        "Imagenet64_val_npz.zip": ("e1e75133158a1924135a9c6f97a80d2d237b158945e0b34074e58e6c8430eeb8",),
    },
}


KNOWN_FILES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    **{published.name: published.sha256 for published in (CIFAR10, MNIST, FASHION_MNIST, KMNIST, SVHN)},
    "EMNIST": EMNIST_FILES,
    **{
        f"ImageNet with data.variant={variant} and data.image_size={size}": files
        for (variant, size), files in IMAGENET_FILES.items()
    },
}
"""The files of all published data sets, by the value of data.dataset that reads them."""


def imagenet(variant: str, size: int) -> Published:
    """Returns the files of one version of ImageNet. Raises ValueError for an unknown variant or size."""
    if variant not in VARIANTS:
        raise ValueError(
            f"data.variant is {variant!r}; it must be old (downsampled_imagenet, the one of the papers) or new "
            "(imagenet_resized), whose bits/dim are not comparable"
        )
    if (variant, size) not in IMAGENET_FILES:
        raise ValueError(f"data.image_size is {size}; for ImageNet it must be 32 or 64")
    read = archives.read_imagenet_old if variant == "old" else archives.read_imagenet_new
    return Published(
        name=f"ImageNet{size}_{variant}",
        title=f"ImageNet {size}x{size}, {variant} version ({VARIANTS[variant]})",
        sha256=IMAGENET_FILES[variant, size],
        read=functools.partial(read, size=size),
    )


def emnist(variant: str) -> Published:
    """Returns the file of EMNIST and the reader of one variant. Raises ValueError for an unknown variant."""
    if variant not in EMNIST_VARIANTS:
        raise ValueError(f"data.variant is {variant!r}; for EMNIST it must be one of {', '.join(EMNIST_VARIANTS)}")
    classes, first_label = EMNIST_VARIANTS[variant]
    return Published(
        name=f"EMNIST_{variant}",
        title=f"EMNIST {variant}",
        sha256=EMNIST_FILES,
        read=functools.partial(archives.read_emnist, variant=variant, classes=classes, first_label=first_label),
    )


def prepare_published(published: Published, archive: Path, accepted: Collection[str], data_dir: Path) -> str:
    """Checks the published files and converts them.

    Args:
        archive: the file, or the folder with the files.
        accepted: SHA-256 of files to accept besides the published ones.

    Returns:
        A line for people that says what was written.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged, or is not the published file.
    """
    files = find_files(published, archive)
    for name, path in files.items():
        check_file(path, published, name, accepted)
    try:
        splits = published.read(files)
    except Exception as error:  # For damaged bytes, the readers raise many kinds of errors.
        raise ValueError(f"{archive} is damaged, or not {published.title}: {error}") from error
    folder = data_dir / published.name
    write_splits(folder, published.title, splits)
    counts = " and ".join(f"{len(images):,} {split}" for split, (images, _) in splits.items())
    return f"{folder}: {published.title}, {counts} images of {'x'.join(map(str, splits['train'].images.shape[1:]))}"


def find_files(published: Published, archive: Path) -> dict[str, Path]:
    """Returns the path of each published file. A single file may have another name."""
    if not archive.exists():
        raise FileNotFoundError(
            f"data.archive is {str(archive)!r}, but there is no such file or folder; get {', '.join(published.sha256)} "
            f"from the authors of {published.title}"
        )
    if archive.is_file() and len(published.sha256) == 1:
        return dict.fromkeys(published.sha256, archive)
    folder = archive.parent if archive.is_file() else archive
    for name in published.sha256:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"data.archive is {str(archive)!r}, but there is no {name} in {folder}; get the file from the authors "
                f"of {published.title}"
            )
    return {name: folder / name for name in published.sha256}


def check_file(path: Path, published: Published, name: str, accepted: Collection[str] = ()) -> None:
    """Checks a file by its SHA-256.

    Raises:
        ValueError: if it is a file of another known data set, whether or not its hash is accepted, or if its hash is
            neither published nor accepted.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest in published.sha256[name]:
        return
    for dataset, files in KNOWN_FILES.items():
        for known_name, hashes in files.items():
            if digest in hashes:
                what = f"set data.dataset to {dataset}" if files != published.sha256 else "rename it"
                raise ValueError(f"{path} is {known_name} of {dataset}, not {name} of {published.title}; {what}")
    if digest not in accepted:
        raise ValueError(
            f"{path} is not the published file of {published.title}, or only a part of it: its SHA-256 is {digest}; to "
            "use it anyway, set data.archive_sha256 to that"
        )
