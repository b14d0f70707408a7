"""Small files in the published formats are prepared and read back image by image."""

import gzip
import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from configs.default import get_config
from configs.vp.imagenet32_ddpmpp_continuous import get_config as imagenet_config
from sources import MemorySource, prepare, source_from_config
from sources.published import CIFAR10, check_file

RNG = np.random.default_rng(0)
SPLITS = ("train", "test")
CLASSES = b"airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n"


def random_images(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def planes(images):
    """Returns the images by channel, row and column."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def sha256(*paths):
    return ",".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)


def tar_file(path, contents, mode):
    with tarfile.open(path, mode) as tar:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def cifar10_archive(path, per_batch=3):
    """Writes a small archive in the published layout and returns the images and labels of each split."""
    images, labels = random_images(6 * per_batch, 32, 32, 3), RNG.integers(0, 10, 6 * per_batch, dtype=np.uint8)
    records = np.concatenate([labels[:, None], planes(images)], axis=1)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    batches = dict(zip(names, np.split(records, 6), strict=True))
    order = ["data_batch_3", "data_batch_1", "test_batch", "data_batch_5", "data_batch_2", "data_batch_4"]
    contents = {f"cifar-10-batches-bin/{name}.bin": batches[name].tobytes() for name in order}
    contents |= {"cifar-10-batches-bin/readme.html": b"<html>", "cifar-10-batches-bin/batches.meta.txt": CLASSES}
    tar_file(path, contents, "w:gz")
    cut = 5 * per_batch
    return {"train": (images[:cut], labels[:cut]), "test": (images[cut:], labels[cut:])}


def prepared(config):
    prepare(config)
    sources = {}
    for split in SPLITS:
        source = source_from_config(config, split)
        assert isinstance(source, MemorySource)
        sources[split] = source
    return sources


def config_for(dataset, tmp_path, archive, *files, **fields):
    config = get_config()
    accepted = sha256(*(files or [archive]))
    data = {"dataset": dataset, "dir": str(tmp_path / "data"), "archive": str(archive), "archive_sha256": accepted}
    config.data.update(data, **fields)
    return config


def check(source, images, labels=None):
    np.testing.assert_array_equal(source.images(np.arange(len(source))), images)
    if labels is None:
        assert source.labels is None
    else:
        np.testing.assert_array_equal(source.labels, labels)


def test_cifar10(tmp_path):
    archive = tmp_path / "mine.tar.gz"
    expected = cifar10_archive(archive)
    config = config_for("CIFAR10", tmp_path, archive)
    for split, source in prepared(config).items():
        check(source, *expected[split])
        assert source.description.startswith(f"CIFAR10, {split}, images ")
    # Other images under the same name have another description.
    before = source_from_config(config, "test").description
    cifar10_archive(archive)
    config.data.archive_sha256 = sha256(archive)
    assert prepared(config)["test"].description != before


def idx(array):
    """Returns the content of a compressed IDX file."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return gzip.compress(header + array.tobytes(), mtime=0)


def mnist_files(folder):
    """Writes small files in the published layout; returns their paths, and the images and labels of each split."""
    files, expected = [], {}
    for split, name, count in (("train", "train", 5), ("test", "t10k", 3)):
        images, labels = random_images(count, 28, 28), RNG.integers(0, 10, count, dtype=np.uint8)
        expected[split] = images[..., None], labels
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            files.append(folder / f"{name}-{kind}-ubyte.gz")
            files[-1].write_bytes(idx(array))
    return files, expected


@pytest.mark.parametrize("dataset", ["MNIST", "FashionMNIST", "KMNIST"])
def test_mnist_and_those_like_it(tmp_path, dataset):
    files, expected = mnist_files(tmp_path)
    config = config_for(dataset, tmp_path, tmp_path, *files, image_size=28, num_channels=1)
    for split, source in prepared(config).items():
        check(source, *expected[split])
        assert source.description.startswith(f"{dataset}, {split}, images ")


@pytest.mark.parametrize(("variant", "first", "classes"), [("balanced", 0, 47), ("letters", 1, 26)])
def test_emnist(tmp_path, variant, first, classes):
    archive, expected = tmp_path / "gzip.zip", {}
    with zipfile.ZipFile(archive, "w") as zipped:
        for split, count in (("train", 60), ("test", 50)):
            images, labels = random_images(count, 28, 28), (np.arange(count) % classes).astype(np.uint8)
            expected[split] = images[..., None], labels
            for kind, array in (("images-idx3", images), ("labels-idx1", labels + first)):
                zipped.writestr(f"gzip/emnist-{variant}-{split}-{kind}-ubyte.gz", idx(array.astype(np.uint8)))
                zipped.writestr(f"__MACOSX/gzip/emnist-{variant}-{split}-{kind}-ubyte.gz", b"")
    config = config_for("EMNIST", tmp_path, archive, image_size=28, num_channels=1, variant=variant)
    for split, source in prepared(config).items():
        check(source, *expected[split])
        assert source.description.startswith(f"EMNIST {variant}, {split}, images ")
    config.data.variant = "digits"
    with pytest.raises(ValueError, match=r"gzip.zip has no emnist-digits-train-images-idx3-ubyte.gz"):
        prepare(config)
    config.data.variant = ""
    with pytest.raises(ValueError, match=r"data.variant is ''; for EMNIST it must be one of balanced, letters"):
        prepare(config)


@pytest.mark.parametrize(
    ("number", "content", "message"),
    [
        (0, b"no gzip", "Cannot read .*train-images-idx3-ubyte.gz as a .gz file"),
        (0, idx(random_images(5, 28, 28))[:-300], "Cannot read .*train-images-idx3-ubyte.gz as a .gz file"),
        (0, idx(random_images(5, 32, 32)), r"train-images-idx3-ubyte.gz has images of shape \(5, 32, 32\), not"),
        (0, idx(random_images(5)), "train-images-idx3-ubyte.gz is not an IDX file of unsigned bytes with 3 axes"),
        (0, idx(random_images(0, 28, 28)), r"has images of shape \(0, 28, 28\)"),
        (0, gzip.compress(bytes([0, 0, 8, 3, 0, 0]), mtime=0), "train-images-idx3-ubyte.gz is not an IDX file"),
        (1, idx(np.zeros(4, np.uint8)), "train-images-idx3-ubyte.gz has 5 images, but 4 labels"),
        (1, idx(np.full(5, 10, np.uint8)), "has labels from 10 to 10, not from 0 to 9"),
        (
            3,
            gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 3, 1]), mtime=0),
            r"t10k-labels-idx1-ubyte.gz has 1 bytes for an array of shape \(3,\), which needs 3",
        ),
    ],
    ids=range(9),
)
def test_idx_files_are_checked(tmp_path, number, content, message):
    files, _ = mnist_files(tmp_path)
    files[number].write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare(config_for("MNIST", tmp_path, tmp_path, *files, image_size=28, num_channels=1))
    assert not (tmp_path / "data").exists()


PACKAGE = Path("/usr/share/datasets/fashion-mnist")
"""The folder of Debian's package dataset-fashion-mnist."""


@pytest.mark.skipif(not PACKAGE.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_fashion_mnist_from_debian(tmp_path):
    config = config_for("FashionMNIST", tmp_path, PACKAGE, *PACKAGE.iterdir(), image_size=28, num_channels=1)
    config.data.archive_sha256 = ""
    train, test = prepared(config).values()
    assert (len(train), len(test)) == (60_000, 10_000)
    assert set(np.bincount(train.labels)) == {6000}
    config.data.update(dataset="MNIST", archive_sha256=sha256(*PACKAGE.iterdir()))
    with pytest.raises(ValueError, match=r"is train-images-idx3-ubyte.gz of FashionMNIST, .*; set data.dataset to F"):
        prepare(config)


def test_a_known_file_of_another_data_set_is_refused(tmp_path, monkeypatch):
    """Accepting its hash does not help: the images would get the name of the other data set."""
    files, _ = mnist_files(tmp_path)
    for dataset, wrong in (("KMNIST", "MNIST"), ("MNIST", "FashionMNIST")):
        known = {path.name: (sha256(path),) for path in files}
        monkeypatch.setattr("sources.published.KNOWN_FILES", {dataset: known})
        config = config_for(wrong, tmp_path, tmp_path, *files, image_size=28, num_channels=1)
        with pytest.raises(ValueError, match=f"of {dataset}, not .* of {wrong}; set data.dataset to {dataset}"):
            prepare(config)


def test_svhn_files_are_checked(tmp_path):
    paths = [tmp_path / f"{split}_32x32.mat" for split in SPLITS]
    good = {"X": random_images(32, 32, 3, 4), "y": np.ones((4, 1), np.uint8)}
    for bad, message in (
        ({"X": good["X"]}, "train_32x32.mat has no array y"),
        (good | {"X": good["X"].astype(float)}, r"X in .*train_32x32.mat is float64 of shape \(32, 32, 3, 4\)"),
        (good | {"y": np.ones((3, 1), np.uint8)}, "train_32x32.mat has 4 images, but 3 labels"),
        (good | {"y": np.full((4, 1), 11)}, "train_32x32.mat has labels from 11 to 11"),
    ):
        for path, arrays in zip(paths, (bad, good), strict=True):
            scipy.io.savemat(str(path), arrays)
        with pytest.raises(ValueError, match=message):
            prepare(config_for("SVHN", tmp_path, tmp_path, *paths))
    paths[0].write_bytes(b"no file of MATLAB's")
    with pytest.raises(ValueError, match=r"Cannot read .*train_32x32.mat as a MATLAB file"):
        prepare(config_for("SVHN", tmp_path, tmp_path, *paths))


def test_batches_of_imagenet_are_checked(tmp_path):
    paths = [tmp_path / "Imagenet32_train_npz.zip", tmp_path / "Imagenet32_val_npz.zip"]
    good = {"data": random_images(2, 3072), "labels": np.array([1, 1000])}
    for bad, name, message in (
        (
            good | {"data": random_images(2, 3000)},
            "train_data_batch_1",
            r"npz in .* is uint8 of shape \(2, 3000\)",
        ),
        (good | {"data": good["data"] / 255}, "train_data_batch_1", "batch_1.npz in .*train_npz.zip is float64"),
        (good | {"labels": np.array([1])}, "train_data_batch_1", "batch_1.npz in .* has 2 images, but 1 labels"),
        (good | {"labels": np.array([0, 1])}, "train_data_batch_1", "has labels from -1 to 0"),
        ({"pictures": good["data"]}, "train_data_batch_1", "Cannot read train_data_batch_1.npz in"),
        (good, "train_data_batch_2", "train_npz.zip has no batch 1, but batch 2"),
    ):
        for path, member, arrays in zip(paths, (name, "val_data"), (bad, good), strict=True):
            with zipfile.ZipFile(path, "w") as archive:
                buffer = io.BytesIO()
                np.savez(buffer, allow_pickle=False, **arrays)
                archive.writestr(f"{member}.npz", buffer.getvalue())
        with pytest.raises(ValueError, match=message):
            prepare(imagenet_for(tmp_path, "new", *paths))
    paths[0].write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"Cannot read .*train_npz.zip as a .zip file"):
        prepare(imagenet_for(tmp_path, "new", *paths))


def test_svhn(tmp_path):
    files, expected = [], {}
    for split, count in (("train", 5), ("test", 3)):
        images, labels = random_images(count, 32, 32, 3), np.arange(1, 11, dtype=np.uint8)[-count:]
        expected[split] = images, labels % 10
        path = tmp_path / f"{split}_32x32.mat"
        scipy.io.savemat(str(path), {"X": images.transpose(1, 2, 3, 0), "y": labels[:, None]})
        files.append(path)
    for split, source in prepared(config_for("SVHN", tmp_path, tmp_path, *files)).items():
        check(source, *expected[split])


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def imagenet_for(tmp_path, variant, *files):
    return config_for("ImageNet", tmp_path, tmp_path, *files, variant=variant)


def old_imagenet(tmp_path, spoil=None):
    files, expected = [], {}
    for split, name, count in (("train", "train", 5), ("test", "valid", 3)):
        images = random_images(count, 32, 32, 3)
        expected[split] = images
        contents = {f"{name}_32x32/{number:04d}.png": png(image) for number, image in enumerate(images)}
        if spoil and split == "train":
            contents["train_32x32/0002.png"] = spoil
        files.append(tar_file(tmp_path / f"{name}_32x32.tar", contents, "w"))
    return files, expected


def test_both_versions_of_imagenet(tmp_path):
    files, expected = old_imagenet(tmp_path)
    old = prepared(imagenet_for(tmp_path, "old", *files))
    for split in SPLITS:
        check(old[split], expected[split])
        assert old[split].description.startswith(f"ImageNet 32x32, old version (downsampled_imagenet), {split}")

    files = [tmp_path / "Imagenet32_train_npz.zip", tmp_path / "Imagenet32_val_npz.zip"]
    images, labels = random_images(24, 32, 32, 3), np.arange(24)
    names = [*(f"train_data_batch_{number}.npz" for number in range(1, 12)), "val_data.npz"]
    for path, held in zip(files, (sorted(names[:-1]), names[-1:]), strict=True):
        with zipfile.ZipFile(path, "w") as archive:
            for name in held:
                rows = slice(2 * names.index(name), 2 * names.index(name) + 2)
                buffer = io.BytesIO()
                np.savez(buffer, data=planes(images[rows]), labels=labels[rows] + 1, mean=np.zeros(3072))
                archive.writestr(name, buffer.getvalue())
    new = prepared(imagenet_for(tmp_path, "new", *files))
    check(new["train"], images[:22], labels[:22])
    check(new["test"], images[22:], labels[22:])
    assert "new version (imagenet_resized)" in new["test"].description
    # Both are kept, and the published configurations name the one they use.
    check(source_from_config(imagenet_for(tmp_path, "old", *files), "train"), expected["train"])
    assert imagenet_config().data.variant == "old"
    with pytest.raises(ValueError, match=r"data.variant is ''; it must be old .* or new"):
        source_from_config(imagenet_for(tmp_path, "", *files), "train")
    with pytest.raises(ValueError, match=r"data.image_size is 16; for ImageNet it must be 32 or 64"):
        source_from_config(config_for("ImageNet", tmp_path, tmp_path, *files, variant="old", image_size=16), "train")


@pytest.mark.parametrize("spoil", [b"no image", png(random_images(31, 32, 3))])
def test_corrupt_image_in_an_archive_is_named(tmp_path, spoil):
    config = imagenet_for(tmp_path, "old", *old_imagenet(tmp_path, spoil)[0])
    with pytest.raises(ValueError, match=r"train_32x32/0002.png in .*train_32x32.tar"):
        prepare(config)
    with pytest.raises(FileNotFoundError):
        source_from_config(config, "train")


def test_what_is_not_the_published_file_is_refused(tmp_path):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    cifar10_archive(archive)
    config = config_for("CIFAR10", tmp_path, archive)
    config.data.archive_sha256 = ""
    with pytest.raises(ValueError, match=f"is not the published file.*{sha256(archive)}.*data.archive_sha256"):
        prepare(config)
    assert not (tmp_path / "data").exists()
    check_file(archive, CIFAR10, "cifar-10-binary.tar.gz", {sha256(archive)})
    # The hash is accepted, but the file is cut short.
    archive.write_bytes(archive.read_bytes()[:5000])
    config.data.archive_sha256 = sha256(archive)
    with pytest.raises(ValueError, match=r"is damaged, or not CIFAR10"):
        prepare(config)
    config.data.archive = ""
    with pytest.raises(ValueError, match=r"data.archive is empty; for CIFAR10 set it to .*cifar-10-binary.tar.gz"):
        prepare(config)
    config.data.archive = str(tmp_path / "data")
    with pytest.raises(FileNotFoundError, match=r"there is no such file or folder; get cifar-10-binary.tar.gz from"):
        prepare(config)
    (tmp_path / "data").mkdir()
    with pytest.raises(FileNotFoundError, match=r"there is no cifar-10-binary.tar.gz in"):
        prepare(config)
    config.data.dataset = "digits"
    with pytest.raises(ValueError, match=r"data.dataset is 'digits'; --mode=prepare prepares CIFAR10"):
        prepare(config)


def test_missing_data_say_what_to_supply(tmp_path):
    config = get_config()
    config.data.dir = str(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"CIFAR10 is not in .*cifar-10-binary.tar.gz.*--mode=prepare"):
        source_from_config(config, "train")


def test_damaged_prepared_data_are_named(tmp_path):
    archive = tmp_path / "cifar.tar.gz"
    cifar10_archive(archive)
    config = config_for("CIFAR10", tmp_path, archive)
    prepare(config)
    path = tmp_path / "data" / CIFAR10.name / "train_images.npy"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"CIFAR10 is damaged .*prepare the data again"):
        source_from_config(config, "train")


def test_preparing_says_what_was_written(tmp_path, capsys):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    cifar10_archive(archive)
    prepared(config_for("CIFAR10", tmp_path, archive))
    assert "CIFAR10, 15 train and 3 test images of 32x32x3" in capsys.readouterr().out
