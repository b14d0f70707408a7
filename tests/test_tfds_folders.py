"""Data sets in records are written and read back without TensorFlow."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.default import get_config
from datasets import training_batches
from sources import MemorySource, catalogue, source_from_config
from sources.archives import read_cifar10
from sources.source import RecordSource
from sources.tfds_folders import TfdsSet, load_tfds
from sources.tfrecord import TFRecords, decode_raw
from tests.test_published_data import cifar10_archive, sha256
from tests.tfds_folder import encoded, raw_example, write_tfds, write_tfrecords

ROOT = Path(__file__).parent.parent
PREPARED = ROOT / "tests" / "prepared"
"""A small CIFAR-10 that tensorflow-datasets 4.9.10 with TensorFlow 2.21 prepared in its TFRecord format."""
RNG = np.random.default_rng(0)
SPLITS = ("train", "test")


def random_images(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def config_for(dataset, data_dir, **fields):
    config = get_config()
    config.data.update(dataset=dataset, dir=str(data_dir), **fields)
    return config


def images_of(source):
    return source.images(np.arange(len(source)))


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """The images of an archive in CIFAR-10's binary format, prepared as a data set of tfds."""
    folder = tmp_path_factory.mktemp("tfds")
    cifar10_archive(folder / "cifar-10-binary.tar.gz")
    splits = read_cifar10({"cifar-10-binary.tar.gz": folder / "cifar-10-binary.tar.gz"})
    write_tfds(
        folder / "cifar10" / "3.0.2",
        {split: [encoded(image) for image in held.images] for split, held in splits.items()},
        {split: np.asarray(held.labels).tolist() for split, held in splits.items()},
    )
    return folder, splits


def test_small_sets_are_decoded_at_once(cifar):
    folder, splits = cifar
    descriptions = set()
    for split in SPLITS:
        source = source_from_config(config_for("CIFAR10", folder), split)
        assert isinstance(source, MemorySource)
        np.testing.assert_array_equal(images_of(source), splits[split].images)
        np.testing.assert_array_equal(source.labels, splits[split].labels)
        assert source.description.startswith(f"tfds cifar10 3.0.2 (array_record), {split}")
        descriptions.add(source.description)
    assert len(descriptions) == 2


def test_large_sets_are_read_by_index(cifar, monkeypatch):
    folder, splits = cifar
    prepared = folder / "cifar10" / "3.0.2"
    source, again = (load_tfds(prepared, TfdsSet("cifar10"), "train", 32, in_memory=0) for _ in range(2))
    assert isinstance(source, RecordSource)
    order = np.array([14, 0, 3, 3, 9])
    np.testing.assert_array_equal(source.images(order), splits["train"].images[order])
    assert source.images(order[:0]).shape == (0, 32, 32, 3)
    assert source.description == again.description

    def batches(hosts):
        monkeypatch.setattr(jax, "process_count", lambda: hosts)
        parts = []
        for host in range(hosts):
            monkeypatch.setattr(jax, "process_index", lambda host=host: host)
            parts.append(np.stack(list(training_batches(source, 8, seed=1, first_step=2, num_steps=5))))
        return np.concatenate(parts, axis=1)

    one = batches(1)
    assert one.shape == (3, 8, 32, 32, 3)
    for hosts in (2, 4):
        np.testing.assert_array_equal(one, batches(hosts))


def gradient(number):
    """Returns image `number` of the data set in tests/prepared."""
    row, column, channel = np.indices((32, 32, 3))
    return ((13 * number + 3 * row + 5 * column + 50 * channel) % 256).astype(np.uint8)


@pytest.mark.parametrize("split", SPLITS)
def test_tfrecord_files_as_tfds_writes_them(split):
    """Reads files that tfds wrote with TensorFlow. It has shuffled them, so the labels identify the images."""
    source = source_from_config(config_for("CIFAR10", PREPARED), split)
    numbers = {"train": range(10), "test": range(10, 12)}[split]
    assert isinstance(source, MemorySource)
    assert source.labels is not None
    assert sorted(source.labels) == [number % 10 for number in numbers]
    first = numbers[0]
    np.testing.assert_array_equal(images_of(source), [gradient(first + label) for label in source.labels])
    assert source.description.startswith(f"tfds cifar10 3.0.2 (tfrecord), {split}")


def copied(tmp_path):
    shutil.copytree(PREPARED, tmp_path / "tfds")
    return tmp_path / "tfds", tmp_path / "tfds" / "cifar10" / "3.0.2"


def tfrecords(tmp_path, whole, old, new):
    """Returns the file with other bytes in its first record, and correct checksums."""
    path = tmp_path / "changed.tfrecords"
    path.write_bytes(whole)
    first, *others = (records := TFRecords([path])).__getitems__(range(len(records)))
    write_tfrecords(path, [first.replace(old, new), *others])
    return path.read_bytes()


@pytest.mark.parametrize("place", [0, 8, 12, -5, -1], ids=["length", "its checksum", "first", "last", "checksum"])
def test_a_flipped_bit_in_a_record_is_found(tmp_path, place):
    """The checksum finds it at every place; in raw images nothing else would."""
    paths, images = [tmp_path / name for name in ("a.tfrecords", "b.tfrecords")], random_images(7, 4, 4, 3)
    write_tfrecords(paths[0], [raw_example(image) for image in images[:4]])
    write_tfrecords(paths[1], [raw_example(image) for image in images[4:]])
    records = TFRecords(paths)
    assert [decode_raw(record).tobytes() for record in records.__getitems__(range(7))] == [i.tobytes() for i in images]
    data = bytearray(paths[1].read_bytes())
    size = len(data) // 3  # of a record with its header and footer; the second record of the second file is changed
    data[size + place % size] ^= 16
    paths[1].write_bytes(data)
    with pytest.raises(
        ValueError, match=r"b.tfrecords is (not a TFRecord file, or is )?damaged.*record 1 (is wrong|begins)"
    ):
        TFRecords(paths).__getitems__([5])
    if place not in (0, 8):
        assert decode_raw(TFRecords(paths).__getitems__([6])[0]).tobytes() == images[6].tobytes()


def test_damaged_folders_are_named(tmp_path):
    data_dir, folder = copied(tmp_path)
    config = config_for("CIFAR10", data_dir)
    (file,) = folder.glob("cifar10-train.tfrecord*")
    whole, info = file.read_bytes(), folder / "dataset_info.json"
    for damaged, message in (
        (whole[:-5], "cifar10-train.tfrecord.* is cut short: its record 9"),
        (b"no records at all", "is not a TFRecord file"),
        (b"", "train has 0 records instead of 10"),
        (tfrecords(tmp_path, whole, b"IHDR", b"IHDX"), "record 0 of tfds cifar10 .* cannot be read as an image"),
        (
            tfrecords(tmp_path, whole, b"image", b"imago"),
            "record 0 of .* has no bytes 'image'; its features are id, imago, lab",
        ),
    ):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            source_from_config(config, "train")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"cifar10-train.tfrecord-.* is missing"):
        source_from_config(config, "train")
    with pytest.raises(ValueError, match=r"record 0 of .*, test.* has 32x32 pixels, not 16x16"):
        source_from_config(config_for("CIFAR10", data_dir, image_size=16), "test")
    told = json.loads(info.read_text())
    info.write_text(json.dumps(told | {"fileFormat": "riegeli"}))
    with pytest.raises(ValueError, match=r"format riegeli; supported are array_record, tfrecord"):
        source_from_config(config, "test")
    info.write_text("{")
    with pytest.raises(ValueError, match=r"Cannot read .*3.0.2 as a data set of tensorflow-datasets"):
        source_from_config(config, "test")


def test_damaged_array_records_are_named(cifar, tmp_path):
    shutil.copytree(cifar[0] / "cifar10", tmp_path / "cifar10")
    file = sorted((tmp_path / "cifar10" / "3.0.2").glob("*train*"))[1]
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[1000] ^= 16
    for damaged in (whole[:1000], bytes(flipped)):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"3.0.2 is damaged"):
            source_from_config(config_for("CIFAR10", tmp_path), "train")


def test_the_newest_version_and_our_own_form_come_first(cifar, tmp_path):
    shutil.copytree(cifar[0] / "cifar10", tmp_path / "cifar10")
    for version in ("10.0.0", "9.0.0"):
        shutil.copytree(tmp_path / "cifar10" / "3.0.2", tmp_path / "cifar10" / version)
    (tmp_path / "cifar10" / "incomplete.X_11.0.0").mkdir()
    config = config_for("CIFAR10", tmp_path)
    assert "tfds cifar10 10.0.0" in source_from_config(config, "test").description
    config.data.archive = str(cifar[0] / "cifar-10-binary.tar.gz")
    config.data.archive_sha256 = sha256(cifar[0] / "cifar-10-binary.tar.gz")
    catalogue.prepare_entry(config.data)
    own = source_from_config(config, "test")
    assert own.description.startswith("CIFAR10, test")
    np.testing.assert_array_equal(images_of(own), cifar[1]["test"].images)


WHERE = {
    "celeb_a": ("CelebA", {}, (200, 150), "validation"),
    "lsun/church_outdoor": ("LSUN", {"category": "church_outdoor"}, (40, 50), "validation"),
    "celeb_a_hq/32": ("CelebAHQ", {}, (32, 32), None),
    "svhn_cropped": ("SVHN", {}, (32, 32), "test"),
    "downsampled_imagenet/32x32": ("ImageNet", {"variant": "old"}, (32, 32), "validation"),
    "imagenet_resized/32x32": ("ImageNet", {"variant": "new"}, (32, 32), "validation"),
}


@pytest.mark.parametrize("name", WHERE)
def test_published_names_find_their_folders_and_splits(name, tmp_path):
    dataset, fields, size, part = WHERE[name]
    images = {"train": random_images(30, *size, 3)} | ({part: random_images(3, *size, 3)} if part else {})
    write_tfds(tmp_path / name / "1.0.0", {held: [encoded(i) for i in images[held]] for held in images}, per_file=20)
    train, test = (source_from_config(config_for(dataset, tmp_path, **fields), split) for split in SPLITS)
    assert train.image_shape == test.image_shape == (32, 32, 3)
    assert f"tfds {name} 1.0.0 (array_record), {part or 'train'}" in test.description
    if part is None:  # one file has both splits
        assert len(train) + len(test) == 30
        assert 0 < len(test) < 10
        both = np.concatenate([images_of(train), images_of(test)])
        assert len(np.unique(both.reshape(30, -1), axis=0)) == 30
    else:
        assert (len(train), len(test)) == (30, 3)
    if size == (32, 32) and part:
        np.testing.assert_array_equal(images_of(train), images["train"])


def test_grey_images(tmp_path):
    images = random_images(5, 28, 28, 1)
    write_tfds(tmp_path / "mnist" / "3.0.1", {s: [encoded(i) for i in images] for s in SPLITS}, channels=1)
    source = source_from_config(config_for("MNIST", tmp_path, image_size=28, num_channels=1), "test")
    np.testing.assert_array_equal(images_of(source), images)
    with pytest.raises(ValueError, match=r"has images of \(28, 28, 1\), but data.image_size and data.num_channels"):
        source_from_config(config_for("MNIST", tmp_path, image_size=28), "test")


@pytest.mark.parametrize("dataset", ["FFHQ", "CelebAHQ"])
def test_records_of_raw_levels(dataset, tmp_path):
    """The .tfrecords files in which FFHQ and CelebA-HQ are published are read record by record."""
    path, images = tmp_path / "ffhq-r03.tfrecords", random_images(40, 8, 8, 3)
    write_tfrecords(path, [raw_example(image) for image in images])
    config = config_for(dataset, tmp_path, path=str(path), image_size=8)
    train, test = (source_from_config(config, split) for split in SPLITS)
    assert isinstance(train, RecordSource)
    assert isinstance(test, RecordSource)
    assert sorted([*train.positions, *test.positions]) == list(range(40))
    assert 0 < len(test) < 12
    for source in (train, test):
        np.testing.assert_array_equal(images_of(source), images[source.positions])
    config.data.image_size = 16
    with pytest.raises(ValueError, match=r"ffhq-r03.tfrecords, train, .* has images of \(8, 8, 3\)"):
        source_from_config(config, "train")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"ffhq-r03.tfrecords is cut short"):
        source_from_config(config, "train")
    write_tfrecords(path, [raw_example(image) for image in (*images[:5], images[5, :4])])
    config.data.image_size = 8
    with pytest.raises(ValueError, match=r"record 5 of .*ffhq-r03.tfrecords has \d+ bytes, but record 0 has \d+"):
        source_from_config(config, "train")
    write_tfrecords(path, [raw_example(image) for image in (*images[:39], images[39].reshape(4, 16, 3))])
    with pytest.raises(ValueError, match=r"record 39 of .* has shape \(4, 16, 3\) instead of \(8, 8, 3\)"):
        _ = [source_from_config(config, split) for split in SPLITS]
    write_tfrecords(path, [b"\xff\xff"])
    with pytest.raises(ValueError, match=r"record 0 of .*ffhq-r03.tfrecords is not a tf.train.Example"):
        source_from_config(config, "train")


TRAINING = """
import sys
from pathlib import Path
import run_lib
from configs.digits.smoke import get_config
config = get_config()
config.data.update(dataset="CIFAR10", image_size=32, num_channels=3, levels=256, random_flip=True, dir=sys.argv[1])
config.model.ch_mult = (1,)  # quick to compile
config.model.num_res_blocks = 1
config.model.attn_resolutions = ()
config.training.n_iters = 3
config.training.batch_size = 4
run_lib.train(config, Path(sys.argv[2]))
assert "tensorflow_datasets" in sys.modules
assert "tensorflow" not in sys.modules
"""


def python(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_trained_on_without_tensorflow(cifar, tmp_path):
    """Training runs on images that the writer of tfds stored."""
    python(TRAINING, cifar[0], tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()


PREPARING = """
import sys, tarfile
from pathlib import Path
from unittest import mock
import tensorflow_datasets as tfds
import run_lib
from configs.default import get_config
extracted = Path(sys.argv[3])
tarfile.open(sys.argv[2]).extractall(extracted, filter="data")
config = get_config()
config.data.dir = sys.argv[1]
with mock.patch.object(tfds.download.DownloadManager, "download_and_extract", lambda *_: extracted):
    prepare(config)
"""


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="tfds prepares data with TensorFlow only")
def test_tfds_itself_prepares_the_archive(cifar, tmp_path):
    """--mode=prepare has tfds prepare the archive, which replaces its download; the result is read back."""
    said = python(PREPARING, tmp_path / "data", cifar[0] / "cifar-10-binary.tar.gz", tmp_path / "extracted")
    assert "tfds cifar10, 15 train and 3 test images" in said
    source = source_from_config(config_for("CIFAR10", tmp_path / "data"), "train")
    rows = [row.tobytes() for row in images_of(source)]
    assert sorted(rows) == sorted(row.tobytes() for row in cifar[1]["train"].images)
    python(TRAINING, tmp_path / "data", tmp_path / "run")


@pytest.mark.parametrize(
    ("dataset", "fields", "message"),
    [
        ("CIFAR10", {}, "get cifar-10-binary.tar.gz.*or set data.dir to .* prepared cifar10.*requirements-prepare.txt"),
        ("CelebA", {}, "set data.path to the folder with img_align_celeba and list_eval_partition.txt; or .*celeb_a"),
        ("LSUN", {"category": "bedroom"}, "set data.path to a folder of its images.*prepared lsun/bedroom"),
        (
            "ImageNet",
            {"variant": "old"},
            "32x32, old version .* is not in .*: get train_32x32.tar.*or .*downsampled_im",
        ),
        ("FFHQ", {}, "FFHQ is not in .*: set data.path to its .tfrecords file of this size"),
        ("CelebAHQ", {}, "tfrecords.*prepared celeb_a_hq/32"),
    ],
)
def test_what_is_missing_is_said(dataset, fields, message, tmp_path):
    with pytest.raises(FileNotFoundError, match=message):
        source_from_config(config_for(dataset, tmp_path, **fields), "train")


@pytest.mark.parametrize(
    ("dataset", "fields", "message"),
    [
        ("CIFAR10", {}, "data.archive is empty; for CIFAR10 .*cifar-10-binary.tar.gz, or .*requirements-prepare.txt"),
        ("LSUN", {"category": "bedroom"}, "Nothing to prepare LSUN from: set data.path .*requirements-prepare.txt"),
        ("LSUN", {}, "data.category is empty"),
        ("FFHQ", {"archive": "x"}, "data.archive is 'x', but FFHQ does not use it: set data.path"),
        ("FFHQ", {}, "Nothing to prepare FFHQ from: set data.path"),
    ],
)
def test_what_cannot_be_prepared(dataset, fields, message, tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "can_download", lambda: False)
    with pytest.raises(ValueError, match=message):
        catalogue.prepare_entry(config_for(dataset, tmp_path, **fields).data)


def test_a_path_where_none_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"data.path is 'x', but CIFAR10 is read from data.dir"):
        source_from_config(config_for("CIFAR10", tmp_path, path="x"), "train")
