"""Files of each kind are written and read back; errors name the file that is wrong."""

import fcntl
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

import run_lib
from configs.digits.smoke import get_config
from datasets import check_classes
from sources import MemorySource, check_levels, resizing, source_from_config
from sources.image_files import find_images

RNG = np.random.default_rng(0)


def random_images(*shape):
    images = RNG.integers(0, 256, shape, dtype=np.uint8)
    images.flat[0] = 255
    return images


def config_for(dataset, tmp_path, **fields):
    config = get_config()
    config.data.update(dataset=dataset, levels=256, dir=str(tmp_path / "data"), **fields)
    return config


def both_splits(config):
    sources = []
    for split in ("train", "test"):
        source = source_from_config(config, split)
        assert isinstance(source, MemorySource)
        sources.append(source)
    return sources


def images_of(source):
    return source.images(np.arange(len(source)))


def test_npz_with_its_own_split(tmp_path):
    train, test, labels = random_images(5, 8, 8), random_images(3, 8, 8), np.arange(3)
    np.savez(tmp_path / "a.npz", x_train=train, x_test=test, y_test=labels)
    sources = both_splits(config_for("npz", tmp_path, path=str(tmp_path / "a.npz")))
    np.testing.assert_array_equal(images_of(sources[0])[..., 0], train)
    np.testing.assert_array_equal(images_of(sources[1])[..., 0], test)
    assert sources[0].labels is None
    np.testing.assert_array_equal(sources[1].labels, labels)


def test_npz_without_a_split(tmp_path):
    """Every image is in one split. Its content alone decides which, so that copies stay together."""
    images = np.concatenate([random_images(200, 8, 8, 3)] * 2)
    labels = np.arange(400) % 200
    np.savez_compressed(tmp_path / "a.npz", images=images, labels=labels)
    train, test = both_splits(config_for("npz", tmp_path, path=str(tmp_path / "a.npz"), num_channels=3))
    assert abs(len(test) / 2 - 20) < 5 * np.sqrt(200 * 0.1 * 0.9)
    assert len(train) + len(test) == 400
    assert set(train.labels) | set(test.labels) == set(range(200))
    assert set(train.labels) & set(test.labels) == set()
    for source in (train, test):
        np.testing.assert_array_equal(images_of(source), images[source.labels])


def test_descriptions_tell_contents_apart(tmp_path):
    descriptions = set()
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        path = tmp_path / str(number) / "a.npz"
        np.savez(path, x_train=random_images(4, 8, 8), x_test=random_images(4, 8, 8))
        config = config_for("npz", tmp_path, path=str(path))
        descriptions |= {source.description for source in both_splits(config)}
        descriptions |= {source.description for source in both_splits(config)}
    assert len(descriptions) == 6


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": np.zeros((4, 8, 8), np.uint8)}, "has the arrays pictures, but neither images nor x_train"),
        ({"images": np.zeros((4, 8, 8), np.float32)}, "images in .* is float32"),
        ({"images": np.zeros((4, 64), np.uint8)}, r"of shape \(4, 64\)"),
        ({"x_train": random_images(4, 8, 8), "y_train": np.arange(3)}, "4 images in x_train, but 3 labels in y_train"),
        ({"x_train": np.zeros((0, 8, 8), np.uint8)}, "has no train images"),
        ({"x_train": random_images(4, 9, 9)}, r"has images of \(9, 9, 1\), but data.image_size"),
        (dict.fromkeys(("x_train", "x_test"), np.ones((4, 8, 8), np.uint8)), "brightest pixel of .* has level 1"),
    ],
)
def test_npz_that_does_not_fit_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        source_from_config(config_for("npz", tmp_path, path=str(tmp_path / "a.npz")), "train")


def test_damaged_and_missing_npz_are_named(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x_train=random_images(4, 8, 8))
    whole = path.read_bytes()
    for damaged in (b"", b"no npz", whole[:-100], whole[:200] + bytes(50) + whole[250:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"Cannot read .*a.npz as an .npz file"):
            source_from_config(config_for("npz", tmp_path, path=str(path)), "train")
    with pytest.raises(FileNotFoundError, match=r"data.path is .*nowhere"):
        source_from_config(config_for("npz", tmp_path, path="/nowhere"), "train")
    with pytest.raises(ValueError, match=r"data.path is empty"):
        source_from_config(config_for("npz", tmp_path), "train")


@pytest.mark.parametrize(("size", "most"), [(32, 1000), (1024, 21), (8192, 1)])
def test_levels_are_looked_at_in_few_large_images(size, most):
    """An image of 1024x1024 takes 3 MB."""

    class Large:
        image_shape, description, asked = (size, size, 3), "large", range(0)

        def __len__(self):
            return 5000

        def images(self, indices):
            self.asked = indices
            return np.full((1, 1, 1, 3), 255, np.uint8)

    source = Large()
    check_levels(source, 256)
    assert len(source.asked) == most
    assert most == 1 or (source.asked[0], source.asked[-1]) == (0, 4999)
    with pytest.raises(ValueError, match=r"data.levels is 17, but the brightest pixel of large has level 255"):
        check_levels(source, 17)


def save(path, pixels, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Sixty images, in colour and grey, of several formats and sizes, two folders deep, and a text file."""
    for number in range(60):
        height, width = [(16, 16), (16, 20), (40, 32), (9, 30)][number % 4]
        pixels = random_images(height, width, 3)
        name = ["a.png", "B.PNG", "c.jpg", "d.webp" if number % 8 > 3 else "d.jpeg"][number % 4]
        save(tmp_path / "pictures" / f"{number % 3}" / f"{number}{name}", pixels, "L" if number % 5 == 0 else None)
    (tmp_path / "pictures" / "readme.txt").write_text("hello")
    return tmp_path / "pictures"


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_of_mixed_images(folder, tmp_path, channels):
    config = config_for("folder", tmp_path, path=str(folder), image_size=16, num_channels=channels)
    train, test = both_splits(config)
    assert len(train) + len(test) == 60
    assert 0 < len(test) < 20
    assert train.image_shape == (16, 16, channels)
    # An image of the right size is unchanged; a wider one is cropped to its centre.
    images = np.concatenate([images_of(train), images_of(test)])
    for number, cut in (("1/4a.png", slice(None)), ("2/5B.PNG", slice(2, 18))):
        with Image.open(folder / number) as image:
            expected = np.asarray(image.convert("L" if channels == 1 else "RGB"))[:, cut].reshape(16, 16, channels)
        assert np.any(np.all(images == expected, axis=(1, 2, 3))), number


def test_shrinking_averages(tmp_path):
    """Shrinking computes weighted means over all pixels of the original, so that stripes turn grey."""
    stripes = np.zeros((64, 32, 3), np.uint8)
    stripes[:, ::2] = 255
    for split in ("train", "test"):
        save(tmp_path / "stripes" / split / "a.png", stripes)
    config = config_for("folder", tmp_path, path=str(tmp_path / "stripes"), image_size=16, num_channels=3)
    source, _ = both_splits(config)
    inner = images_of(source)[:, :, 2:-2].astype(int)
    assert np.all(abs(inner - 127.5) <= 1.5)


def test_folder_with_train_and_test(tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        for number in range(count):
            save(tmp_path / "own" / split / f"{number}.png", random_images(8, 8))
    train, test = both_splits(config_for("folder", tmp_path, path=str(tmp_path / "own")))
    assert (len(train), len(test)) == (4, 2)


def test_the_log_counts_images_that_were_enlarged_or_are_grey(tmp_path, caplog):
    for number, (size, channels) in enumerate([(8, 3), (8, 1), (16, 1), (16, 1), (16, 3), (32, 3)]):
        for split in ("train", "test"):
            save(tmp_path / "own" / split / f"{number}.png", random_images(size, size, channels).squeeze())
    config = config_for("folder", tmp_path, path=str(tmp_path / "own"), image_size=16, num_channels=3)
    with caplog.at_level("INFO"):
        both_splits(config)
    line = "Decoded both splits: 4 images enlarged to 16 pixels, 6 grey images given 3 equal channels"
    assert caplog.text.count(line) == 1


def test_decoded_folder_is_kept_until_it_changes(folder, tmp_path, monkeypatch):
    config = config_for("folder", tmp_path, path=str(folder), image_size=16, num_channels=3)
    first = both_splits(config)[0]
    monkeypatch.setattr("sources.folder.decode_image", lambda *_, **__: pytest.fail("decoded again"))
    again = both_splits(config)[0]
    np.testing.assert_array_equal(images_of(first), images_of(again))
    assert again.description == first.description
    monkeypatch.undo()
    path = next(path for path in sorted(folder.rglob("*.png")))
    before = path.stat()
    save(path, random_images(16, 16, 3))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    changed = {source.description for source in both_splits(config)}
    assert changed != {source.description for source in (first, both_splits(config)[1])}


def test_too_little_space_is_said_before_decoding(folder, tmp_path, monkeypatch):
    config = config_for("folder", tmp_path, path=str(folder), image_size=16, num_channels=3)
    monkeypatch.setattr("sources.folder.decode_image", lambda *_, **__: pytest.fail("decoded"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2 * 60 * 16 * 16 * 3 - 1))
    with pytest.raises(OSError, match=r"data has 0.0 GB free, .* set data.dir to a larger disk"):
        source_from_config(config, "train")
    assert not list((tmp_path / "data").iterdir())


def test_what_a_killed_decoding_left_is_removed(folder, tmp_path):
    """But not the temporary folder of a decoding that is running, nor one that may not be locked yet."""
    left = {name: tmp_path / "data" / f"decoding_{name}" for name in ("killed", "running", "young")}
    for path in left.values():
        (path / "rows").mkdir(parents=True)
        (path / "in_use").touch()
    for name in ("killed", "running"):
        os.utime(left[name] / "in_use", (0, 0))
    with (left["running"] / "in_use").open("a") as running:
        fcntl.flock(running, fcntl.LOCK_EX)
        both_splits(config_for("folder", tmp_path, path=str(folder), image_size=16, num_channels=3))
    assert [path.exists() for path in left.values()] == [False, True, True]


def test_one_split_may_be_dark(tmp_path):
    """But not both: then data.levels is probably wrong."""
    path, dark = tmp_path / "a.npz", RNG.integers(0, 86, (6, 8, 8), dtype=np.uint8)
    config = config_for("npz", tmp_path, path=str(path))
    np.savez(path, x_train=random_images(6, 8, 8), x_test=dark)
    assert images_of(both_splits(config)[1]).max() < 86
    np.savez(path, x_train=dark, x_test=dark)
    with pytest.raises(ValueError, match=r"brightest pixel of npz a.npz, test, .* has level 8"):
        source_from_config(config, "test")


def test_negative_classes_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x_train=random_images(4, 8, 8), y_train=np.array([-1, 0, 1, 2]), x_test=random_images(2, 8, 8))
    with pytest.raises(ValueError, match=r"a.npz.* has class -1; classes are numbered from 0"):
        check_classes(source_from_config(config_for("npz", tmp_path, path=str(path)), "train"), 3)


def test_corrupt_image_is_named(folder, tmp_path):
    config = config_for("folder", tmp_path, path=str(folder), image_size=16, num_channels=3)
    victim = folder / "1" / "1B.PNG"
    whole = victim.read_bytes()
    for damaged in (b"", b"no image", whole[: len(whole) // 2], whole[:200] + bytes(60) + whole[260:]):
        victim.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"1B.PNG cannot be read as an image"):
            source_from_config(config, "train")
    Image.fromarray(RNG.random((16, 16), np.float32)).save(victim, "tiff")
    with pytest.raises(ValueError, match=r"1B.PNG has pixels of Pillow's mode F"):
        source_from_config(config, "train")
    assert not list((tmp_path / "data").glob("*/about.json")), "an incomplete data set is not used"
    with pytest.raises(ValueError, match=r"1B.PNG"):
        run_lib.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists(), "training does not start"


def test_folder_that_does_not_fit_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no train images"):
        source_from_config(config_for("folder", tmp_path, path=str(tmp_path / "empty")), "train")
    with pytest.raises(FileNotFoundError, match=r"which is not a folder"):
        source_from_config(config_for("folder", tmp_path, path="/nowhere"), "train")
    with pytest.raises(ValueError, match=r"num_channels is 2"):
        source_from_config(config_for("folder", tmp_path, path=str(tmp_path / "empty"), num_channels=2), "train")


def smooth_image(height, width):
    """Returns an image whose colours vary slowly over all levels."""
    row, column, channel = np.indices((height, width, 3))
    return np.rint(127.5 + 127.5 * np.sin(row / 9 + column / 13 + channel)).astype(np.uint8)


def published(image, left, top, side, size, method):
    """Crops and resizes as the published code does, with antialiasing and without rounding to levels."""
    square = image[top : top + side, left : left + side].astype(np.float32)
    return np.asarray(jax.image.resize(square, (size, size, 3), method, antialias=True))


@pytest.mark.parametrize(
    ("framing", "shape", "size", "square"),
    [
        (resizing.centre_140, (218, 178), 64, (19, 39, 140, "linear")),
        (resizing.centre_square, (256, 301), 64, (22, 0, 256, "cubic")),
        (resizing.centre_square, (300, 257), 256, (0, 21, 257, "cubic")),
        (resizing.shorter_side, (128, 130), 128, (1, 0, 128, "linear")),
        (resizing.block_means, (64, 64), 64, (0, 0, 64, "linear")),
    ],
)
def test_framing_is_the_published_one(framing, shape, size, square):
    """The tolerance allows for rounding to levels, once in each of the two directions."""
    image = smooth_image(*shape)
    left, top, side, method = square
    expected = published(image, left, top, side, size, method)
    np.testing.assert_allclose(np.asarray(framing(Image.fromarray(image), size)), expected, atol=1.1)


def test_block_means():
    image = random_images(24, 24, 3)
    expected = image.reshape(8, 3, 8, 3, 3).mean((1, 3))
    np.testing.assert_array_equal(resizing.block_means(Image.fromarray(image), 8), np.rint(expected))
    grey = resizing.block_means(Image.fromarray(image[..., 1]), 8)
    np.testing.assert_array_equal(grey, np.rint(expected[..., 1]))
    for shape in ((24, 25, 3), (20, 20, 3)):
        with pytest.raises(ValueError, match="not a square whose side is a multiple of 8"):
            resizing.block_means(Image.fromarray(random_images(*shape)), 8)


@pytest.fixture
def celeba(tmp_path):
    """Images 000001.jpg to 000006.jpg in the published layout. The last two are for training and validation."""
    folder = tmp_path / "celeba"
    for number in range(1, 7):
        save(folder / "img_align_celeba" / f"{number:06d}.jpg", smooth_image(218, 178 + number)[:, :178])
    parts = (2, 0, 0, 1, 0, 1)
    lines = [f"{number:06d}.jpg {part}" for number, part in enumerate(parts, start=1)]
    (folder / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_celeba_folder(celeba, tmp_path):
    """The list assigns the images to splits. The test images are those for validation, as published."""
    config = config_for("CelebA", tmp_path, path=str(celeba), image_size=32, num_channels=3)
    train, test = both_splits(config)
    assert (len(train), len(test)) == (3, 2)
    with Image.open(celeba / "img_align_celeba" / "000004.jpg") as image:
        expected = resizing.centre_140(image, 32)
    np.testing.assert_array_equal(test.images(np.array([0]))[0], np.asarray(expected))
    assert not list((tmp_path / "data").glob("decoding_*")), "temporary folders are removed"
    save(celeba / "img_celeba" / "000004.jpg", random_images(300, 300, 3))  # published beside the aligned images
    _, again = both_splits(config)
    np.testing.assert_array_equal(images_of(again), images_of(test))
    partition = celeba / "list_eval_partition.txt"
    partition.write_text("000002.jpg 0\n000003.jpg 1\n000005.jpg 1\n000004.jpg 1\n000006.jpg 1\n")
    assert [len(source) for source in both_splits(config)] == [1, 4], "the same images in other splits"
    partition.write_text("000001.jpg 0\n000007.jpg 0\n")
    with pytest.raises(FileNotFoundError, match=r"no 000007.jpg under .*list_eval_partition.txt names it"):
        source_from_config(config, "train")
    partition.write_text("000001.jpg 0\nhello\n")
    with pytest.raises(ValueError, match=r"has the line 'hello'; it must be a name and 0, 1 or 2"):
        source_from_config(config, "train")
    partition.write_text("000001.jpg 0\n")
    with pytest.raises(ValueError, match=r"list_eval_partition.txt has no test images"):
        source_from_config(config, "train")
    partition.unlink()
    with pytest.raises(FileNotFoundError, match=r"no list_eval_partition.txt under"):
        source_from_config(config, "train")
    save(celeba / "img_align_celeba" / "000002.jpg", smooth_image(218, 100))
    partition.write_text("000002.jpg 0\n000003.jpg 1\n")
    with pytest.raises(ValueError, match=r"000002.jpg has 100x218 pixels, fewer than the crop of 140x140"):
        source_from_config(config, "train")


def test_lsun_folder(tmp_path):
    for split in ("train", "test"):
        save(tmp_path / "church" / split / "a.png", smooth_image(256, 301))
    fields = {"path": str(tmp_path / "church"), "category": "church_outdoor", "num_channels": 3}
    for size, framing in ((64, resizing.centre_square), (128, resizing.shorter_side)):
        _, test = both_splits(config_for("LSUN", tmp_path, image_size=size, **fields))
        expected = framing(Image.fromarray(smooth_image(256, 301)), size)
        np.testing.assert_array_equal(images_of(test)[0], np.asarray(expected))
    (tmp_path / "church" / "data.mdb").write_bytes(b"")
    with pytest.raises(ValueError, match=r"church holds LSUN's lmdb; export its images"):
        source_from_config(config_for("LSUN", tmp_path, image_size=64, **fields), "train")


def test_faces_folder(tmp_path):
    image = random_images(16, 16, 3)
    for split in ("train", "test"):
        save(tmp_path / "faces" / split / "00000.png", image)
    config = config_for("FFHQ", tmp_path, path=str(tmp_path / "faces"), image_size=8, num_channels=3)
    means = np.rint(image.reshape(8, 2, 8, 2, 3).mean((1, 3)))
    np.testing.assert_array_equal(images_of(both_splits(config)[1])[0], means)


def test_npy_under_another_name(tmp_path):
    path = tmp_path / "a.npz"
    with path.open("wb") as file:
        np.save(file, random_images(4, 8, 8, 3))
    with pytest.raises(
        ValueError, match=r"Cannot read .*a.npz .* it is a single .npy array, uint8 of shape \(4, 8, 8, 3\)"
    ):
        source_from_config(config_for("npz", tmp_path, path=str(path)), "train")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"x_train": np.zeros((4, 3, 8, 8), np.uint8)},
            r"x_train in .*a.npz has shape \(4, 3, 8, 8\), with channels before",
        ),
        ({"y_train": np.array(["a"] * 4)}, "y_train in .*a.npz is <U1; labels must be integers"),
        ({"y_train": np.full(4, 0.5)}, "y_train in .*a.npz is float64; labels must be integers"),
        ({"y_train": np.zeros((4, 10), int)}, r"y_train in .*a.npz has shape \(4, 10\); it must be \[n\]"),
        ({"y_train": np.array(3)}, r"y_train in .*a.npz has shape \(\)"),
        ({"x_train": np.array([None])}, "Cannot read .*a.npz as an .npz file: Object arrays"),
    ],
)
def test_npz_with_wrong_arrays_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **({"x_train": random_images(4, 8, 8)} | arrays))
    with pytest.raises(ValueError, match=message):
        source_from_config(config_for("npz", tmp_path, path=str(tmp_path / "a.npz")), "train")


def save_folder(folder, count, first=0):
    for number in range(first, first + count):
        save(folder / f"{number}.png", random_images(8, 8))


def folder_config(tmp_path, **fields):
    return config_for("folder", tmp_path, path=str(tmp_path / "own"), **fields)


def lengths(config):
    return tuple(len(source) for source in both_splits(config))


@pytest.mark.parametrize(
    ("train", "test"), [("Train", "TEST"), ("training", "val"), ("TRAIN", "Valid"), ("train", "validation")]
)
def test_split_folders_have_the_usual_names(tmp_path, train, test, monkeypatch):
    said = []
    monkeypatch.setattr("sources.folder.logging.info", lambda message, *values: said.append(message % values))
    save_folder(tmp_path / "own" / train, 30)
    save_folder(tmp_path / "own" / test, 10)
    (tmp_path / "own" / "readme.txt").write_text("hello")
    (tmp_path / "own" / test / "labels.csv").write_text("hello")
    assert lengths(folder_config(tmp_path)) == (30, 10)
    assert said[0] == (
        f"Read 30 train images from {tmp_path / 'own'} (there are 10 test images); splits by its folders {train} "
        f"(train) and {test} (test); skipped: 1 not images ({test}/labels.csv), outside the two splits (readme.txt)"
    )


def test_validation_images_beside_test_images_are_not_used(tmp_path):
    for name, count in (("train", 30), ("val", 10), ("test", 5)):
        save_folder(tmp_path / "own" / name, count)
    assert lengths(folder_config(tmp_path)) == (30, 5)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("train", "Training", "test"), "has folders Training, train, which mean the same split"),
        (("train", "val", "valid"), "has folders val, valid, which mean the same split"),
        (("val", "cats"), "has folders cats, val, of which val looks like a split, without a folder train"),
        (("train", "dev"), "of which train looks like a split, without a folder test"),
        (("train2017", "val2017"), "has folders train2017, val2017, which look like splits; name the two splits"),
        (("data/train", "data/test"), "data has folders train, test, which look like splits; set data.path to it"),
        (
            ("cats/train", "cats/test", "dogs/train", "dogs/test"),
            "cats has folders train, test, which look like splits",
        ),
    ],
)
def test_ambiguous_splits_are_refused(tmp_path, folders, message):
    for folder in folders:
        save_folder(tmp_path / "own" / folder, 1)
    with pytest.raises(ValueError, match=message):
        source_from_config(folder_config(tmp_path), "train")


@pytest.mark.parametrize(
    "folders", [("train",), ("cats", "dogs"), ("classes/train", "classes/car"), ("trains", "tests_of")]
)
def test_folders_that_are_not_splits(tmp_path, folders):
    for number, folder in enumerate(folders):
        save_folder(tmp_path / "own" / folder, 40, 40 * number)
    train, test = lengths(folder_config(tmp_path))
    assert train + test == 40 * len(folders)
    assert 0 < test < train


def test_links_to_folders_are_followed_once(tmp_path):
    save_folder(tmp_path / "elsewhere" / "deep", 30)
    save_folder(tmp_path / "own" / "b", 30)
    (tmp_path / "own" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "own" / "a").symlink_to(tmp_path / "own" / "b")  # must not take the place of b
    (tmp_path / "own" / "b" / "loop").symlink_to(tmp_path / "own")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "own")
    (tmp_path / "own" / "nothing").symlink_to(tmp_path / "nowhere")
    (tmp_path / "own" / "itself").symlink_to(tmp_path / "own" / "itself")
    files = find_images(tmp_path / "own")
    names = [str(path.relative_to(tmp_path / "own")) for split in ("train", "test") for path in files.paths[split]]
    assert sorted(names) == sorted([f"b/{n}.png" for n in range(30)] + [f"c/deep/{n}.png" for n in range(30)])
    assert files.skipped.links == ["a", "b/loop", "c/loop", "itself", "nothing"]


def test_links_between_splits_do_not_mix_them(tmp_path):
    save_folder(tmp_path / "own" / "train", 30)
    save_folder(tmp_path / "own" / "val", 10)
    (tmp_path / "own" / "train" / "more").symlink_to(tmp_path / "own" / "val")
    (tmp_path / "own" / "train" / "all").symlink_to(tmp_path / "own")
    assert lengths(folder_config(tmp_path)) == (30, 10)


def test_hidden_files_are_ignored(tmp_path):
    save_folder(tmp_path / ".own" / "pictures", 40)
    for hidden in (".thumbnails", "pictures/.ipynb_checkpoints", "__MACOSX/pictures"):
        save_folder(tmp_path / ".own" / hidden, 2)
    (tmp_path / ".own" / "pictures" / "._0.png").write_bytes(b"\0\5\26\7")
    files = find_images(tmp_path / ".own")
    assert sum(map(len, files.paths.values())) == 40
    assert (files.skipped.hidden, files.skipped.others) == (4, [])


def test_images_are_turned_as_viewers_turn_them(tmp_path):
    stored = random_images(8, 8, 3)
    exif = Image.Exif()
    for split in ("train", "test"):
        for orientation in range(1, 9):
            exif[0x0112] = orientation
            path = tmp_path / "own" / split / f"{orientation}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(stored).save(path, exif=exif)
    flip, rotate = np.fliplr, np.rot90
    expected = [stored, flip(stored), rotate(stored, 2), np.flipud(stored)]
    expected += [flip(rotate(stored, 3)), rotate(stored, 3), flip(rotate(stored)), rotate(stored)]
    source = both_splits(folder_config(tmp_path, num_channels=3))[0]
    np.testing.assert_array_equal(images_of(source), expected)


def test_one_rule_reduces_images_to_eight_bits(tmp_path):
    """16-bit grey keeps its high byte, palettes become colours, transparency and later frames are dropped."""
    folder, colours = tmp_path / "own" / "train", random_images(8, 8, 4)
    save_folder(tmp_path / "own" / "test", 1)
    folder.mkdir()
    grey = RNG.integers(0, 2**16, (8, 8), dtype=np.uint16)
    few = Image.fromarray(colours[..., :3]).quantize(16)
    for name in ("a.png", "a.tif", "b.pgm"):
        Image.fromarray(grey).save(folder / name)
    few.save(folder / "c.gif", save_all=True, append_images=[few.rotate(90)])
    few.save(folder / "d.PNG", transparency=3)
    Image.fromarray(colours).save(folder / "e.png")
    Image.fromarray(colours[..., :3]).save(folder / "f.bmp")
    images = images_of(both_splits(folder_config(tmp_path, num_channels=3))[0])
    palette = np.asarray(few.convert("RGB"))
    high = np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
    expected = [high, high, high, palette, palette, colours[..., :3], colours[..., :3]]
    np.testing.assert_array_equal(images, expected)


def test_all_unreadable_files_are_named_and_the_others_are_kept(folder, tmp_path, monkeypatch):
    config = config_for("folder", tmp_path, path=str(folder), image_size=16, num_channels=3)
    expected = [(images_of(source), source.description) for source in both_splits(config)]
    shutil.rmtree(tmp_path / "data")
    for name in ("0/x.png", "1/y.jpg", "2/z.webp"):
        (folder / name).write_bytes(b"no image")
    with pytest.raises(
        ValueError, match=r"x.png cannot be read.*y.jpg cannot be read.*z.webp cannot .*; remove or replace"
    ):
        source_from_config(config, "train")
    for name in ("0/x.png", "1/y.jpg", "2/z.webp"):
        (folder / name).unlink()
    monkeypatch.setattr("sources.folder.decode_image", lambda *_, **__: pytest.fail("decoded again"))
    for source, (images, description) in zip(both_splits(config), expected, strict=True):
        np.testing.assert_array_equal(images_of(source), images)
        assert source.description == description
    (kept,) = (tmp_path / "data").iterdir()
    assert kept.name.startswith("folder_"), "the partial images are removed"


def test_interrupted_decoding_is_resumed(folder, tmp_path, monkeypatch):
    config = config_for("folder", tmp_path, path=str(folder), image_size=16, num_channels=3)
    decode, decoded = resizing.decode_image, []

    def interrupted(path, *settings, **keys):
        if len(decoded) == 25:
            raise KeyboardInterrupt
        decoded.append(path)
        return decode(path, *settings, **keys)

    monkeypatch.setattr("sources.folder.decode_image", interrupted)
    monkeypatch.setattr("sources.folder.ThreadPoolExecutor", lambda: ThreadPoolExecutor(1))
    with pytest.raises(KeyboardInterrupt):
        both_splits(config)
    first = set(decoded)
    decoded.clear()
    monkeypatch.setattr(
        "sources.folder.decode_image", lambda path, *s, **k: decoded.append(path) or decode(path, *s, **k)
    )
    assert sum(lengths(config)) == 60
    assert len(decoded) == 35
    assert first.isdisjoint(decoded)


def test_images_decoded_by_earlier_versions_are_replaced(folder, tmp_path, monkeypatch):
    """Earlier versions ignored the EXIF orientation, and their about.json names no version."""
    config = config_for("folder", tmp_path, path=str(folder), image_size=16, num_channels=3)
    expected = [source.description for source in both_splits(config)]
    (cache,) = (tmp_path / "data").iterdir()
    about = json.loads((cache / "about.json").read_text())
    assert about.pop("decoding") == 1
    (cache / "about.json").write_text(json.dumps({split: f"{text} of old" for split, text in about.items()}))
    said = []
    monkeypatch.setattr("sources.folder.logging.warning", lambda message, *values: said.append(message % values))
    assert [source.description for source in both_splits(config)] == expected
    assert len(said) == 1
    assert "decoded by an earlier version" in said[0]
    assert list((tmp_path / "data").iterdir()) == [cache]
