"""Published data sets: the files they come as, and their conversion, once, to the form that training reads."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from sources.archives import Files, read_cifar10, read_imagenet_new, read_imagenet_old, read_mnist, read_svhn
from sources.splits import Split, write_splits

VARIANTS = {"old": "downsampled_imagenet", "new": "imagenet_resized"}
"""Of ImageNet: the one of the papers, and the one that replaced it, which is smoother: fewer bits/dim."""


@dataclasses.dataclass(frozen=True)
class Published:
    """A data set as its authors distribute it."""

    name: str
    """Of its folder."""
    title: str
    """In the descriptions of its images."""
    sha256: Mapping[str, str]
    """Of each file."""
    read: Callable[[Files], dict[str, Split]]


CIFAR10 = Published(
    name="CIFAR10",
    title="CIFAR10",
    sha256={"cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
    read=read_cifar10,
)
MNIST = Published(
    name="MNIST",
    title="MNIST",
    sha256={
        "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    },
    read=read_mnist,
)
SVHN = Published(
    name="SVHN",
    title="SVHN (cropped)",
    sha256={
        "train_32x32.mat": "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
        "test_32x32.mat": "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
    },
    read=read_svhn,
)
IMAGENET_FILES: dict[tuple[str, int], dict[str, str]] = {
    ("old", 32): {
        "train_32x32.tar": "244a323d48f8d72f65ad8b54658c01fed68d2d7bdc77ccb43da58c11e94224e5",
        "valid_32x32.tar": "862e559462b24cf736212a19f6b0d47b55c2dc8ebdaa95ccecfe71260124c8f7",
    },
    ("old", 64): {
        "train_64x64.tar": "e2a2c1947a748d0d256e98e6d82800d855441dc9e4de2e71a773f1324c4524d7",
        "valid_64x64.tar": "eeac03ec4f585baf871d2b4cb9c974bfe345e74878a74e5820fe6eb1041629cd",
    },
    ("new", 32): {
        "Imagenet32_train_npz.zip": "94226337ecc1b0309d9fcd0167127aaadc931587035fbcb53925235edbaec4fc",
        "Imagenet32_val_npz.zip": "013990e6dec1237dcd1f9beadbab81ead6604cc119af5cacbfb59ae28148377a",
    },
    ("new", 64): {
        "Imagenet64_train_part1_npz.zip": "9422dc1dc5d092e9814a70a1cb7fc74880d2db5d88a0cb8a34ee363b12bde3f1",
        "Imagenet64_train_part2_npz.zip": "9fafc115afb7e6c301e66dc16b2d737152b427bd5dab26e1293487a6819c7f30",
        "Imagenet64_val_npz.zip": "e1e75133158a1924135a9c6f97a80d2d237b158945e0b34074e58e6c8430eeb8",
    },
}


def imagenet(variant: str, size: int) -> Published:
    """Raises ValueError for an unknown variant or size."""
    if variant not in VARIANTS:
        raise ValueError(
            f"data.variant is {variant!r}; it must be old (downsampled_imagenet, the one of the papers) or new "
            "(imagenet_resized), whose bits/dim are not comparable"
        )
    if (variant, size) not in IMAGENET_FILES:
        raise ValueError(f"data.image_size is {size}; of ImageNet it must be 32 or 64")
    return Published(
        name=f"ImageNet{size}_{variant}",
        title=f"ImageNet {size}x{size}, {variant} version ({VARIANTS[variant]})",
        sha256=IMAGENET_FILES[variant, size],
        read=functools.partial(read_imagenet_old if variant == "old" else read_imagenet_new, size=size),
    )


def prepare_published(published: Published, archive: Path, accepted: Collection[str], data_dir: Path) -> str:
    """Checks the published files and converts them.

    Args:
        archive: the file, or the folder with the files.
        accepted: SHA-256 of files to accept besides the published ones.

    Returns:
        what was written, for people.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if one is not the published file, or damaged.
    """
    files = find_files(published, archive)
    for name, path in files.items():
        check_file(path, {published.sha256[name], *accepted})
    try:
        splits = published.read(files)
    except Exception as error:  # damaged bytes make the readers raise a dozen kinds
        raise ValueError(f"{archive} is damaged, or not {published.title}: {error}") from error
    folder = data_dir / published.name
    write_splits(folder, published.title, splits)
    counts = " and ".join(f"{len(images):,} {split}" for split, (images, _) in splits.items())
    return f"{folder}: {published.title}, {counts} images of {'x'.join(map(str, splits['train'].images.shape[1:]))}"


def find_files(published: Published, archive: Path) -> dict[str, Path]:
    """The path of each published file. A single file may have another name."""
    if archive.is_file() and len(published.sha256) == 1:
        return dict.fromkeys(published.sha256, archive)
    folder = archive.parent if archive.is_file() else archive
    for name in published.sha256:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"data.archive is {str(archive)!r}, but there is no {name} in {folder}")
    return {name: folder / name for name in published.sha256}


def check_file(path: Path, accepted: Collection[str]) -> None:
    """Raises ValueError if the file's SHA-256 is not among those accepted."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest not in accepted:
        raise ValueError(
            f"{path} is not the published file, perhaps a part of it: its SHA-256 is {digest}; to use it all the same, "
            "set data.archive_sha256 to that"
        )
