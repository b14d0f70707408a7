"""Inception against torch-fidelity's network, its resize against TensorFlow's formula, and its weights on disk."""

import hashlib
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import build
import run_lib
from configs.digits.smoke import get_config
from evaluators.convert_inception import convert
from evaluators.convert_inception import main as convert_main
from evaluators.features import (
    InceptionFeatures,
    extractor_from_config,
    inception_features,
    inception_input,
    save_inception,
)
from evaluators.fid import comparison_from_config
from infra.files import write_npz
from models.inception import average, params_from_published, published_shapes, resize
from tests import inception_reference

TORCH = importlib.util.find_spec("torch") is not None and importlib.util.find_spec("torch_fidelity") is not None


@pytest.fixture(scope="module")
def weights():
    """Random weights under the published names."""
    return inception_reference.random_weights(published_shapes())


@pytest.fixture(scope="module")
def extractor(weights):
    return InceptionFeatures(params_from_published(weights), "12ab", levels=256, per_device=1)


# --- the network ---


def expected_outputs(weights):
    """torch-fidelity's features, of its network where that is installed, and as stored."""
    with np.load(inception_reference.STORED) as file:
        yield dict(file)
    if TORCH:
        yield inception_reference.torch_outputs(weights, inception_reference.random_images())


def test_features_agree_with_torch_fidelity(weights, extractor):
    """For each image, and for the difference of the two, which rests on less."""
    got = extractor(inception_reference.random_images())
    for expected in expected_outputs(weights):
        for name, value in got._asdict().items():
            scale = np.abs(expected[name]).max()
            assert np.abs(value - expected[name]).max() < 1e-4 * scale, name
            difference, wanted = value[0] - value[1], expected[name][0] - expected[name][1]
            assert np.abs(difference - wanted).max() < 1e-4 * np.abs(wanted).max(), name


def test_features_do_not_depend_on_the_other_images(extractor):
    """Five images on four devices are two chunks, of which the second is filled up."""
    images = np.concatenate(
        [inception_reference.random_images()[[0, 1, 0, 1]], inception_reference.random_images()[1:]]
    )
    features = extractor(images)
    assert features.pool.shape == (5, 2048)
    assert features.logits.shape == (5, 1008)
    np.testing.assert_array_equal(features.pool[[2, 3, 4]], features.pool[[0, 1, 1]])
    assert np.abs(features.pool[0] - features.pool[1]).max() > 0.01


def test_average_pools_do_not_count_what_is_outside():
    np.testing.assert_allclose(average(jnp.ones((1, 4, 5, 2))), 1.0, rtol=1e-6)
    corner = average(jnp.zeros((1, 4, 4, 1)).at[0, 0, 0, 0].set(1.0))
    np.testing.assert_allclose(corner[0, :2, :2, 0], [[1 / 4, 1 / 6], [1 / 6, 1 / 9]], rtol=1e-6)


# --- the resize ---


def tensorflow_resize(image: np.ndarray, size: int) -> np.ndarray:
    """The kernel of TensorFlow 1's ResizeBilinear, pixel by pixel, for [height, width] in float32."""
    height, width = image.shape
    rows, columns = (np.float32(length) / np.float32(size) for length in (height, width))
    result = np.empty((size, size), np.float32)
    for i in range(size):
        y = np.float32(i) * rows
        top, bottom = int(np.floor(y)), min(int(np.floor(y)) + 1, height - 1)
        for j in range(size):
            x = np.float32(j) * columns
            left, right = int(np.floor(x)), min(int(np.floor(x)) + 1, width - 1)
            across = x - np.float32(left)
            upper = image[top, left] + (image[top, right] - image[top, left]) * across
            lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * across
            result[i, j] = upper + (lower - upper) * (y - np.float32(top))
    return result


@pytest.mark.parametrize(("shape", "size"), [((32, 32), 299), ((70, 61), 37), ((1, 5), 7)])
def test_resize_is_tensorflow_1s_exactly(shape, size):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.float32)
    expected = tensorflow_resize(image, size)
    got = resize(jnp.asarray(image)[None, :, :, None], size)
    np.testing.assert_array_equal(np.asarray(got)[0, :, :, 0], expected)


def test_resize_when_compiled_differs_by_rounding_at_most():
    """A compiler may fuse a product with a sum, which rounds once instead of twice."""
    images = jnp.asarray(inception_reference.random_images(), jnp.float32)
    np.testing.assert_allclose(jax.jit(resize)(images), resize(images), rtol=0, atol=2**-14)


@pytest.mark.skipif(not TORCH, reason="torch and torch-fidelity are not installed")
def test_resize_is_torch_fidelitys_exactly(weights):
    images = inception_reference.random_images()
    expected = inception_reference.torch_outputs(weights, images)["resized"]
    np.testing.assert_array_equal(resize(jnp.asarray(images, jnp.float32)), expected)


# --- what it is fed ---


def test_levels_are_spread_over_those_of_a_byte():
    images = np.random.default_rng(1).integers(0, 16, (2, 5, 5, 3)).astype(np.uint8)
    of_few = inception_input(jnp.asarray(images), levels=16, centre=128.0)
    of_bytes = inception_input(jnp.asarray(images * 17), levels=256, centre=128.0)
    np.testing.assert_allclose(of_few, of_bytes, atol=1e-6)
    assert of_few.shape == (2, 299, 299, 3)


def test_grey_images_are_repeated():
    grey = np.random.default_rng(2).integers(0, 256, (2, 6, 6, 1)).astype(np.uint8)
    both = [
        inception_input(jnp.asarray(images), levels=256, centre=128.0) for images in (grey, grey.repeat(3, axis=-1))
    ]
    np.testing.assert_array_equal(*both)


@pytest.mark.parametrize(("centre", "black", "white"), [(128.0, -1, 127 / 128), (127.5, -1, 1)])
def test_centres(centre, black, white):
    images = jnp.asarray([0, 255], jnp.uint8)[:, None, None, None]
    x = inception_input(images, levels=256, centre=centre)
    np.testing.assert_allclose(x[:, 0, 0, 0], [black, white], rtol=1e-6)


def test_the_centre_and_the_levels_are_part_of_the_hash(extractor):
    assert extractor.hash == "12ab"
    assert InceptionFeatures(extractor.params, "12ab", levels=256, centre=127.5).hash == "12ab-127.5"
    assert InceptionFeatures(extractor.params, "12ab", levels=17).hash == "12ab-levels17", "pixels are scaled by it"


# --- weights ---


def test_batch_normalisation_is_folded_in(weights, extractor):
    """At a 1x1 convolution, against the two steps one after the other."""
    layer = "Mixed_5b.branch1x1"
    kernel, bias = (extractor.params["Mixed_5b"]["branch1x1"][leaf] for leaf in ("kernel", "bias"))
    x = np.random.default_rng(3).normal(size=(10, kernel.shape[2]))
    convolved = x @ weights[f"{layer}.conv.weight"][:, :, 0, 0].astype(np.float64).T
    gamma, beta, mean, variance = (
        weights[f"{layer}.bn.{name}"].astype(np.float64) for name in ("weight", "bias", "running_mean", "running_var")
    )
    expected = gamma * (convolved - mean) / np.sqrt(variance + 1e-3) + beta
    np.testing.assert_allclose(x @ kernel[0, 0] + bias, expected, rtol=1e-5, atol=1e-5)


def test_there_are_as_many_weights_as_published():
    """23.9 million with the statistics, in 94 convolutions and one dense layer, which make the 95.6 MB of the file."""
    shapes = published_shapes()
    assert len(shapes) == 94 * 5 + 2
    size = 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    assert 0 < 95_628_359 - size < 0.001 * size
    assert shapes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert shapes["Mixed_6b.branch7x7_2.conv.weight"] == (128, 128, 1, 7)
    assert shapes["fc.weight"] == (1008, 2048)


def test_other_weights_are_refused(weights):
    for change in ({"fc.bias": np.zeros(1000)}, {"AuxLogits.fc.bias": np.zeros(1008)}):
        (name,) = change
        with pytest.raises(ValueError, match=f"not the weights of Inception-2015-12-05: {name} has shape"):
            params_from_published(weights | change)
    few = {name: array for name, array in weights.items() if name != "Mixed_7c.branch1x1.bn.bias"}
    with pytest.raises(ValueError, match=r"Mixed_7c\.branch1x1\.bn\.bias has shape none, not \(320,\); 1 arrays"):
        params_from_published(few)


def small_params() -> dict:
    return {"fc": {"kernel": np.eye(2, dtype=np.float32), "bias": np.ones(2, np.float32)}}


def test_weights_survive_the_disk(tmp_path):
    path = tmp_path / "inception.npz"
    save_inception(path, small_params(), source_sha256="ab")
    read = inception_features(path, levels=256)
    np.testing.assert_array_equal(read.params["fc"]["kernel"], np.eye(2))
    assert len(read.hash) == 16
    with np.load(path) as file:
        arrays = dict(file)
    assert str(arrays["source_sha256"]) == "ab"
    write_npz(path, **arrays | {"fc/bias": np.zeros(2, np.float32)})
    with pytest.raises(ValueError, match="has changed since its conversion"):
        inception_features(path, levels=256)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot read .*inception\.npz as an \.npz file"):
        inception_features(path, levels=256)


def test_conversion_refuses_other_files(tmp_path, capsys):
    path, out = tmp_path / "weights.pth", tmp_path / "out.npz"
    path.write_bytes(b"part of a download")
    with pytest.raises(ValueError, match="is not the published file, or only a part of it: its SHA-256 is"):
        convert(path, out)
    assert convert_main([str(tmp_path / "none.pth"), f"--out={out}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"there is no file {tmp_path / 'none.pth'}; torch-fidelity and pytorch-fid distribute" in said
    assert not out.exists()


@pytest.mark.skipif(not TORCH, reason="torch is not installed")
def test_conversion_of_a_torch_file(tmp_path, weights, extractor):
    path, out = tmp_path / "weights.pth", tmp_path / "out.npz"
    inception_reference.save_weights(weights, path)
    assert convert_main([str(path), f"--out={out}", f"--sha256={hashlib.sha256(path.read_bytes()).hexdigest()}"]) == 0
    converted = inception_features(out, levels=256).params
    assert jax.tree.structure(converted) == jax.tree.structure(extractor.params)
    jax.tree.map(np.testing.assert_array_equal, converted, extractor.params)


# --- as configured ---


def config_with(tmp_path: Path, **fields):
    config = get_config()
    config.eval.statistics_dir = str(tmp_path / "stats")
    config.eval.update(fields)
    return config


def test_without_weights_evaluation_says_so_before_any_work(tmp_path, monkeypatch):
    """Also before bits/dim; and bits/dim alone does not ask for them."""
    config = config_with(tmp_path, features="inception", inception=str(tmp_path / "none.npz"))
    message = r"none\.npz.*python -m evaluators\.convert_inception PATH.*eval\.features=classifier .* for --mode=eval"
    with monkeypatch.context() as patch:
        patch.setattr(build.Run, "existing_checkpoints", lambda *_: pytest.fail("work before the check"))
        with pytest.raises(FileNotFoundError, match=message) as raised:
            run_lib.evaluate(config, tmp_path / "run", "eval")
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())
    config.eval.enable_sampling = False
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        run_lib.evaluate(config, tmp_path / "run", "eval")


BAD_FIELDS = {
    "unknown features": ({"features": "vgg"}, "eval.features is 'vgg'; known: inception, classifier"),
    "unknown split": ({"statistics_split": "dev"}, "eval.statistics_split is 'dev'; it must be train or test"),
    "unknown centre": (
        {"features": "inception", "inception_centre": 1.0},
        "eval.inception_centre is 1; it must be 128",
    ),
    "one sample": ({"num_samples": 1}, "eval.num_samples is 1; FID needs at least 2"),
    "no such statistics": (
        {"features": "inception", "statistics": "/nowhere.npz"},
        "eval.statistics is '/nowhere.npz', but there is no such file",
    ),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_bad_fields_are_named(name, tmp_path, monkeypatch):
    fields, message = BAD_FIELDS[name]
    save_inception(tmp_path / "inception.npz", small_params(), source_sha256="")
    monkeypatch.setattr("evaluators.classifier._train", lambda *_: pytest.fail("work before the check"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        comparison_from_config(config_with(tmp_path, inception=str(tmp_path / "inception.npz"), **fields))


def test_statistics_of_another_network_are_refused_at_once(tmp_path):
    save_inception(tmp_path / "inception.npz", small_params(), source_sha256="")
    np.savez(tmp_path / "moments.npz", mu=np.zeros(64), sigma=np.eye(64))
    config = config_with(
        tmp_path,
        features="inception",
        inception=str(tmp_path / "inception.npz"),
        statistics=str(tmp_path / "moments.npz"),
    )
    with pytest.raises(ValueError, match=r"moments\.npz have 64 features, but inception has 2048"):
        comparison_from_config(config)
    np.savez(tmp_path / "moments.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    assert comparison_from_config(config).statistics.data == "moments.npz"
    config.data.num_channels = 2
    with pytest.raises(ValueError, match=r"data\.num_channels is 2; Inception needs images of 1 or 3 channels"):
        extractor_from_config(config)
