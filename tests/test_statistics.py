"""--mode=stats: the statistics of a data set, their file, and the test of what FIDs against them are worth."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from configs.digits.smoke import get_config
from evaluation import frechet_distance
from evaluators.extractor import Features
from evaluators.features import EXTRACTORS
from evaluators.fid import comparison_from_config, evaluate_samples, prepare_statistics, stats
from evaluators.statistics import load_statistics
from sources import source_from_config


@dataclasses.dataclass(frozen=True)
class Quarters:
    """The mean level of each quarter of an 8x8 image: a feature extractor without a network."""

    name: str = "quarters"
    hash: str = "0123"
    num_features: int = 4

    def __call__(self, images: np.ndarray) -> Features:
        pool = images.reshape(len(images), 2, 4, 2, 4).mean(axis=(2, 4)).reshape(len(images), 4)
        return Features(pool.astype(np.float32), pool - 8)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setitem(EXTRACTORS, "quarters", lambda _: Quarters)
    config = get_config()
    config.eval.features = "quarters"
    config.eval.statistics_dir = str(tmp_path)
    return config


def pool_of(config, split: str) -> np.ndarray:
    source = source_from_config(config, split)
    return Quarters()(source.images(np.arange(len(source)))).pool.astype(np.float64)


@pytest.mark.parametrize(("split", "other"), [("train", "test"), ("test", "train")])
def test_statistics_of_either_split(config, tmp_path, split, other):
    config.eval.statistics_split = split
    result = prepare_statistics(config)
    path = Path(result["statistics"])
    assert path == tmp_path / f"digits8_{split}_quarters_0123.npz"
    statistics, pool = load_statistics(path), pool_of(config, split)
    np.testing.assert_allclose(statistics.mu, pool.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.sigma, np.cov(pool, rowvar=False), rtol=1e-9)
    assert (result["n"], result["hash"]) == (len(pool), statistics.hash)
    assert (result["features"], result["features_hash"]) == ("quarters", "0123")
    assert json.loads(path.with_suffix(".json").read_text()) == result
    test = result["self_test"]
    assert test[split]["fid"] < 1e-9
    assert test[split]["n"] == len(pool)
    others = pool_of(config, other)
    floor = frechet_distance(others.mean(0), np.cov(others.T), pool.mean(0), np.cov(pool.T))
    assert test[other]["fid"] == pytest.approx(floor, rel=1e-6)
    assert test[other]["n"] == len(others)


def test_statistics_are_printed_and_kept(config, tmp_path, capsys):
    stats(config)
    first = json.loads(capsys.readouterr().out)
    (path,) = tmp_path.glob("*.npz")
    before = path.read_bytes()
    stats(config)
    assert json.loads(capsys.readouterr().out) == first
    assert path.read_bytes() == before
    found = comparison_from_config(config).statistics
    assert found.hash == first["hash"], "evaluation compares with the same"


def test_wrong_statistics_show_in_the_test(config, tmp_path):
    """Those of images a level brighter: the FID of the same images is the squared distance, not 0."""
    pool = pool_of(config, "train")
    np.savez(tmp_path / "theirs.npz", mu=pool.mean(0) + 1, sigma=np.cov(pool.T), features="quarters")
    config.eval.statistics = str(tmp_path / "theirs.npz")
    result = prepare_statistics(config)
    assert result["statistics"] == config.eval.statistics
    assert result["self_test"]["train"]["fid"] == pytest.approx(4, rel=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "theirs.npz",
        "theirs_digits8_train_quarters_0123.json",
    ]


@pytest.mark.parametrize(
    "arrays",
    [
        {"mu": np.zeros(2), "sigma": np.eye(2), "n": np.array([5, 6])},
        {"mu": np.array(["a", "b"]), "sigma": np.eye(2)},
        {"pool_3": np.float64(3)},
    ],
    ids=["n", "mu", "pool_3"],
)
def test_statistics_of_wrong_types_are_named(tmp_path, arrays):
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(ValueError, match=r"wrong.npz has arrays of a wrong type or shape"):
        load_statistics(tmp_path / "wrong.npz")


def test_samples_are_compared_with_the_file_that_is_named(config, tmp_path):
    """Published files: all features, or mean and covariance."""
    pool = pool_of(config, "test")
    np.savez(tmp_path / "activations.npz", pool_3=pool.astype(np.float32), features="quarters")
    np.savez(tmp_path / "moments.npz", mu=pool.mean(0), sigma=np.cov(pool.T), features="quarters")
    source = source_from_config(config, "train")
    images = source.images(np.arange(100))
    results = []
    for name in ("activations.npz", "moments.npz"):
        config.eval.statistics = str(tmp_path / name)
        comparison = comparison_from_config(config)
        results.append(comparison(images))
        statistics = load_statistics(tmp_path / name)
        assert results[-1] == evaluate_samples(Quarters()(images), Quarters(), statistics, splits=10)
        assert results[-1]["statistics_data"] == name
    assert results[0]["fid"] == pytest.approx(results[1]["fid"], rel=1e-5)
    assert "kid_mean" in results[0]
    assert "kid_mean" not in results[1]


def test_real_images_are_measured_before_samples_are_drawn(config, tmp_path):
    comparison = comparison_from_config(config)
    assert not list(tmp_path.iterdir()), "nothing is measured while evaluation checks what it has"
    comparison.prepare()
    (path,) = tmp_path.glob("*.npz")
    path.unlink()
    assert comparison(np.zeros((10, 8, 8, 1), np.uint8))["statistics_n"] == 1438
    assert not list(tmp_path.iterdir()), "they are measured once"


def test_points_are_not_measured(config):
    config.data.dataset = "checkerboard"
    with pytest.raises(
        ValueError, match=r"data\.dataset is 'checkerboard', which has points, but FID, IS and KID compare"
    ):
        stats(config)


def test_a_classifier_needs_labels(config, tmp_path):
    images = source_from_config(config, "train").images(np.arange(60))
    np.savez(tmp_path / "unlabelled.npz", x_train=images[:40], x_test=images[40:])
    config.data.dataset, config.data.path = "npz", str(tmp_path / "unlabelled.npz")
    config.eval.features = "classifier"
    with pytest.raises(
        ValueError, match=r"eval\.features is 'classifier', but npz unlabelled\.npz.* has no class labels"
    ):
        comparison_from_config(config)
