"""Metrics against independent formulas and closed forms; statistics files; the feature classifier."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from evaluation import (
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_estimate,
)
from evaluators import fid
from evaluators.classifier import ClassifierRecipe, LabelledImages, trained_classifier
from evaluators.extractor import Features, array_hash, extract_features
from evaluators.fid import evaluate_samples, self_test
from evaluators.statistics import (
    Moments,
    Statistics,
    dataset_statistics,
    load_statistics,
    measured_statistics,
    save_statistics,
    statistics_of,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def random_covariance(dims: int, seed: int) -> np.ndarray:
    factor = rng(seed).normal(size=(dims, 2 * dims))
    return factor @ factor.T / dims


# --- means ---


def test_mean_estimate_agrees_with_scipy():
    values = rng().normal(size=50)
    estimate = mean_estimate(values)
    assert estimate.n == 50
    assert estimate.mean == pytest.approx(values.mean(), abs=1e-12)
    assert estimate.se == pytest.approx(float(scipy.stats.sem(values)), rel=1e-12)
    expected = scipy.stats.t.interval(0.95, df=49, loc=estimate.mean, scale=estimate.se)
    np.testing.assert_allclose(estimate.ci95, expected, rtol=1e-10)


def test_mean_estimate_ignores_what_is_masked():
    values = np.array([1.0, np.nan, 3.0, np.inf, 8.0])
    assert mean_estimate(values, np.isfinite(values)) == mean_estimate(np.array([1.0, 3.0, 8.0]))


def test_repeats_count_each_example_once():
    values = rng().normal(size=(3, 20))
    estimate = mean_estimate(values)
    assert estimate.n == 20
    assert estimate.se == pytest.approx(float(scipy.stats.sem(values.mean(axis=0))))
    assert mean_estimate(np.tile(values[:1], (5, 1))).se == pytest.approx(mean_estimate(values[0]).se)


def test_one_value_has_no_standard_error():
    estimate = mean_estimate(np.array([2.0], np.float32))
    assert estimate.mean == 2.0
    assert np.isnan([estimate.se, *estimate.ci95]).all()


def test_no_values_are_refused():
    with pytest.raises(ValueError, match="no values"):
        mean_estimate(np.ones(3), np.zeros(3, bool))


# --- FID ---


@pytest.mark.parametrize("dims", [1, 5, 40])
def test_frechet_distance_agrees_with_the_root_of_the_product(dims):
    mu1, mu2 = rng(1).normal(size=(2, dims))
    sigma1, sigma2 = random_covariance(dims, 2), random_covariance(dims, 3)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    expected = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2 - 2 * np.real(root))
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(mu2, sigma2, mu1, sigma1) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_commuting_covariances_in_closed_form():
    """(sd1 - sd2)^2 along each common axis."""
    axes, _ = np.linalg.qr(rng().normal(size=(6, 6)))
    sd1, sd2 = rng(1).uniform(0, 3, size=(2, 6))
    mu = np.zeros(6)
    distance = frechet_distance(mu, (axes * sd1**2) @ axes.T, mu + 2, (axes * sd2**2) @ axes.T)
    assert distance == pytest.approx(np.sum((sd1 - sd2) ** 2) + 6 * 4, rel=1e-9)


def test_frechet_distance_to_itself_is_zero_for_singular_covariances():
    few = rng().normal(size=(20, 64))  # of rank 19
    mu, sigma = few.mean(0), np.cov(few, rowvar=False)
    assert 0 <= frechet_distance(mu, sigma, mu, sigma) < 1e-10


def test_frechet_distance_of_point_masses_on_subspaces():
    """Covariances on orthogonal subspaces do not overlap: the distance is the sum of their traces."""
    sigma1, sigma2 = np.diag([4.0, 9.0, 0, 0, 0]), np.diag([0, 0, 0, 1.0, 25.0])
    mu = np.ones(5)
    assert frechet_distance(mu, sigma1, mu, sigma2) == pytest.approx(39)
    assert frechet_distance(mu, 0 * sigma1, mu + 1, 0 * sigma2) == pytest.approx(5)


def test_frechet_distance_is_computed_in_float64():
    """Also of statistics that others have stored in float32; a rounded trace alone would be off by more."""
    single = [1000 * rng().normal(size=300).astype(np.float32), 1e4 * random_covariance(300, 2).astype(np.float32)]
    double = [a.astype(np.float64) for a in single]
    assert frechet_distance(*single, *single) == frechet_distance(*double, *double)
    shifted = [double[0] + 1, double[1]]
    assert frechet_distance(*single, *shifted) == frechet_distance(*double, *shifted)


def test_frechet_distance_refuses_what_does_not_fit():
    mu, sigma = np.zeros(3), np.eye(3)
    with pytest.raises(ValueError, match="dimensions differ"):
        frechet_distance(mu, sigma, np.zeros(4), np.eye(4))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(mu, sigma, mu, np.full((3, 3), np.nan))


# --- Inception Score ---


def test_inception_score_agrees_with_probabilities():
    logits = rng().normal(size=(100, 7)) * 2
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = []
    for part in np.split(probabilities, 10):
        marginal = part.mean(0)
        scores.append(np.exp(np.mean([scipy.stats.entropy(p, marginal) for p in part])))
    result = inception_score(logits)
    assert result.mean == pytest.approx(np.mean(scores), rel=1e-6)
    assert result.std == pytest.approx(np.std(scores), rel=1e-6)


def test_inception_score_at_its_bounds():
    """Sure and balanced: the number of classes. The same for all images: 1."""
    sure = np.tile(1000.0 * np.eye(10), (10, 1))
    assert inception_score(sure) == pytest.approx((10, 0))
    assert inception_score(np.tile(rng().normal(size=10), (100, 1))) == pytest.approx((1, 0))


def test_inception_score_uses_every_sample_when_splits_do_not_divide():
    logits = rng().normal(size=(7, 3))
    expected = [inception_score(part, splits=1).mean for part in (logits[:2], logits[2:4], logits[4:])]
    assert inception_score(logits, splits=3).mean == pytest.approx(np.mean(expected))
    with pytest.raises(ValueError, match="splits is 8"):
        inception_score(logits, splits=8)


# --- KID ---


def mmd_by_pairs(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    within_x = np.mean([kernel(a, b) for a, b in itertools.permutations(x, 2)])
    within_y = np.mean([kernel(a, b) for a, b in itertools.permutations(y, 2)])
    return float(within_x + within_y - 2 * np.mean([kernel(a, b) for a in x for b in y]))


def test_kernel_distance_agrees_with_a_loop_over_pairs():
    x, y = rng(0).normal(size=(21, 6)), rng(1).normal(size=(34, 6)) + 0.3
    result = kernel_distance(x, y)
    assert result.subsets == 1
    assert result.mean == pytest.approx(mmd_by_pairs(x, y), rel=1e-6)
    assert kernel_distance(y, x).mean == pytest.approx(result.mean, rel=1e-6)


def test_kernel_distance_averages_over_disjoint_subsets():
    x, y = rng(0).normal(size=(30, 4)), rng(1).normal(size=(25, 4)) + 0.3
    generator = rng(7)
    order_x, order_y = generator.permutation(30).reshape(3, 10), generator.permutation(25)[:24].reshape(3, 8)
    expected = np.mean([mmd_by_pairs(x[i], y[j]) for i, j in zip(order_x, order_y, strict=True)])
    result = kernel_distance(x, y, subset_size=10, seed=7)
    assert result.subsets == 3
    assert result.mean == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_leaves_out_one_part_at_a_time():
    """With at most 20 vectors each part is one pair, so the jackknife can be done by hand."""
    x, y = rng(0).normal(size=(8, 3)), rng(1).normal(size=(8, 3)) + 0.5
    generator = rng()
    x_order, y_order = x[generator.permutation(8)], y[generator.permutation(8)]
    left_out = [mmd_by_pairs(np.delete(x_order, j, 0), np.delete(y_order, j, 0)) for j in range(8)]
    assert kernel_distance(x, y).se == pytest.approx(np.sqrt(7 * np.var(left_out)), rel=1e-9)


def test_kernel_distance_is_unbiased_and_its_standard_error_right():
    """Gaussians in one dimension: E k(x, y) from the moments of xy + 1."""
    shift = 0.7
    draws = [
        kernel_distance(rng(2 * s).normal(size=(40, 1)), rng(2 * s + 1).normal(size=(50, 1)) + shift)
        for s in range(400)
    ]
    means, ses = np.array([d.mean for d in draws]), np.array([d.se for d in draws])
    # E (ab + 1)^3 = 1 + 3 E[a]E[b] + 3 E[a^2]E[b^2] + E[a^3]E[b^3]
    data, model = (0.0, 1.0, 0.0), (shift, 1 + shift**2, shift**3 + 3 * shift)
    factors = (3, 3, 1)
    truth = sum(f * (a - b) ** 2 for f, a, b in zip(factors, data, model, strict=True))
    assert abs(means.mean() - truth) < 5 * means.std() / np.sqrt(len(means))
    assert 0.9 < np.sqrt(np.mean(ses**2)) / means.std() < 1.25  # a jackknife errs upwards, by less than this


def test_kernel_distance_of_equal_distributions_vanishes():
    x, y = rng(0).normal(size=(600, 5)), rng(1).normal(size=(500, 5))
    result = kernel_distance(x, y, subset_size=100)
    assert result.subsets == 5
    assert abs(result.mean) < 5 * result.se
    assert kernel_distance(x, y + 1, subset_size=100).mean > 5 * result.se


def test_kernel_distance_of_two_vectors_has_no_standard_error():
    result = kernel_distance(np.eye(2), np.eye(2) + 1)
    assert result.mean == pytest.approx(mmd_by_pairs(np.eye(2), np.eye(2) + 1))
    assert np.isnan(result.se)
    with pytest.raises(ValueError, match="at least two vectors"):
        kernel_distance(np.eye(1), np.ones((2, 1)))


# --- statistics and evaluation ---


@dataclasses.dataclass(frozen=True)
class MeanColour:
    """A feature extractor without a network."""

    name: str = "mean colour"
    hash: str = "0123"
    num_features: int = 3

    def __call__(self, images: np.ndarray) -> Features:
        pool = images.reshape(len(images), -1, images.shape[-1]).mean(axis=1)
        return Features(pool, pool - pool.mean(axis=1, keepdims=True))


def random_images(n: int, seed: int = 0) -> np.ndarray:
    return rng(seed).integers(0, 256, size=(n, 4, 4, 3)).astype(np.uint8)


def assert_equal_statistics(a: Statistics, b: Statistics) -> None:
    for field in dataclasses.fields(Statistics):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


def test_statistics_survive_the_disk(tmp_path):
    pool = rng().normal(size=(30, 5)).astype(np.float32)
    statistics = statistics_of([pool], features="f", features_hash="12ab", data="noise", max_stored=20)
    assert statistics.pool is not None
    assert statistics.pool.shape == (20, 5)
    np.testing.assert_allclose(statistics.mu, pool.mean(0), atol=1e-6)
    np.testing.assert_allclose(statistics.sigma, np.cov(pool.astype(np.float64).T), rtol=1e-12)
    path = tmp_path / "new folder" / "statistics.npz"
    save_statistics(path, statistics)
    assert_equal_statistics(load_statistics(path), statistics)
    assert [p.name for p in path.parent.iterdir()] == ["statistics.npz"]


def test_moments_of_parts_are_those_of_the_whole():
    """Also where the mean is large beside the spread, and parts are empty, single, or longer than a block."""
    pool = (1000 + rng().normal(size=(9000, 3)) * [1, 2, 0.01]).astype(np.float32)
    moments = Moments()
    for part in np.split(pool, [1, 1, 300, 8999]):
        moments.add(part)
    mean, covariance = moments.mean_and_covariance()
    np.testing.assert_allclose(mean, pool.astype(np.float64).mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(covariance, np.cov(pool.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12)


def test_the_part_kept_is_a_fair_draw_from_all_batches():
    """Each vector at most once; the kept ones' places are spread evenly, whatever batch they came in."""
    pool = np.arange(4000.0).reshape(-1, 1)
    statistics = statistics_of(
        np.split(pool, [10, 1500, 1501]), features="f", features_hash="", data="d", max_stored=1000
    )
    assert statistics.pool is not None
    places = statistics.pool[:, 0]
    assert len(np.unique(places)) == len(places) == 1000
    counts = np.histogram(places, bins=4, range=(0, 4000))[0]
    assert np.abs(counts - 250).max() < 5 * np.sqrt(1000 * 0.25 * 0.75 * 0.75)


def test_published_statistics_formats(tmp_path):
    pool = rng().normal(size=(30, 5))
    np.savez(tmp_path / "activations.npz", pool_3=pool.reshape(30, 1, 1, 5))
    np.savez(tmp_path / "moments.npz", mu=pool.mean(0), sigma=np.cov(pool.T))
    activations, moments = (load_statistics(tmp_path / f"{name}.npz") for name in ("activations", "moments"))
    np.testing.assert_allclose(activations.sigma, moments.sigma, rtol=1e-12)
    assert (activations.n, moments.n) == (30, None)
    assert activations.features == moments.features == "inception"
    np.testing.assert_array_equal(activations.pool, pool)
    assert moments.pool is None


def test_unreadable_statistics_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        load_statistics(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(ValueError, match=r"cannot read .*bad\.npz as an \.npz file"):
        load_statistics(tmp_path / "bad.npz")
    np.savez(tmp_path / "other.npz", weights=np.ones(3))
    with pytest.raises(ValueError, match="contains weights, but needs pool_3"):
        load_statistics(tmp_path / "other.npz")
    for mu, sigma in ((np.ones(3), np.eye(2)), (np.ones(2), np.full((2, 2), np.nan))):
        np.savez(tmp_path / "impossible.npz", mu=mu, sigma=sigma)
        with pytest.raises(
            ValueError, match=r"impossible\.npz has mu of shape .* must be \[d\] and \[d, d\], and finite"
        ):
            load_statistics(tmp_path / "impossible.npz")


def test_dataset_statistics_are_computed_once_for_each_extractor_and_data(tmp_path):
    path, batches = tmp_path / "s.npz", [random_images(8), random_images(5, 1)]
    first = dataset_statistics(path, MeanColour(), "noise", batches)
    assert first.n == 13
    assert_equal_statistics(dataset_statistics(path, MeanColour(), "noise", []), first)
    changed = dataset_statistics(path, MeanColour(hash="4567"), "noise", batches[:1])
    assert (changed.n, load_statistics(path).features_hash) == (8, "4567")
    path.write_bytes(path.read_bytes()[:100])
    assert_equal_statistics(dataset_statistics(path, MeanColour(), "noise", batches), first)


def test_statistics_that_cannot_be_kept_are_of_use(tmp_path, monkeypatch):
    said, batches = [], [random_images(8)]
    monkeypatch.setattr("evaluators.statistics.logging.warning", lambda *message: said.append(message))
    (tmp_path / "file").touch()
    statistics = dataset_statistics(tmp_path / "file" / "s.npz", MeanColour(), "noise", batches)
    assert_equal_statistics(statistics, measured_statistics(MeanColour(), "noise", batches))
    assert "Cannot save the statistics" in said[0][0]


def test_evaluation_holds_the_metrics_and_what_they_rest_on():
    extractor = MeanColour()
    real, samples = extractor(random_images(40)), extractor(random_images(25, 1) // 2)
    statistics = statistics_of([real.pool], features=extractor.name, features_hash=extractor.hash, data="noise")
    result = evaluate_samples(samples, extractor, statistics, splits=10)
    covariance = np.cov(samples.pool.T)
    fid = frechet_distance(samples.pool.mean(0), covariance, real.pool.mean(0), np.cov(real.pool.T))
    assert result["fid"] == pytest.approx(fid, rel=1e-9)
    assert (result["is_mean"], result["is_std"]) == inception_score(samples.logits)
    assert (result["kid_mean"], result["kid_se"]) == kernel_distance(samples.pool, real.pool)[:2]
    assert (result["n"], result["statistics_n"]) == (25, 40)
    assert (result["fid_features"], result["features_hash"]) == (extractor.name, extractor.hash)
    assert result["statistics_hash"] == array_hash(statistics.mu, statistics.sigma)
    assert "25 samples" in result["warning"]
    published = evaluate_samples(samples, extractor, statistics)
    assert (published["is_mean"], published["is_splits"]) == (inception_score(samples.logits, splits=1).mean, 1)


def test_no_warning_at_the_published_number_of_samples(monkeypatch):
    monkeypatch.setattr(fid, "PUBLISHED_SAMPLES", 25)
    extractor = MeanColour()
    samples = extractor(random_images(25))
    statistics = statistics_of([samples.pool], features=extractor.name, features_hash=extractor.hash, data="noise")
    assert "warning" not in evaluate_samples(samples, extractor, statistics)


def test_statistics_of_other_features_are_refused():
    extractor = MeanColour()
    samples = extractor(random_images(10))
    for name, digest in (("other", extractor.hash), (extractor.name, "4567")):
        statistics = statistics_of([samples.pool], features=name, features_hash=digest, data="noise")
        with pytest.raises(ValueError, match="are measured by mean colour 0123"):
            evaluate_samples(samples, extractor, statistics)
    other_size = statistics_of([samples.pool[:, :2]], features=extractor.name, features_hash="", data="noise")
    with pytest.raises(ValueError, match="have 2 features, but mean colour has 3"):
        evaluate_samples(samples, extractor, other_size)
    published = statistics_of([samples.pool], features=extractor.name, features_hash="", data="noise")
    assert evaluate_samples(samples, extractor, published)["fid"] < 1e-9


def test_self_test_is_zero_on_train_and_the_floor_on_test():
    extractor = MeanColour()
    train, test = random_images(200), random_images(50, 1)
    statistics = measured_statistics(extractor, "noise", [train])
    again = measured_statistics(extractor, "noise", [train[:90], train[90:]])
    result = self_test(extractor, statistics, again, extractor(test))
    assert result["same"]["fid"] < 1e-9
    assert result["same"]["n"] == 200
    difference = evaluate_samples(extractor(test), extractor, statistics)
    assert result["other"] == difference
    assert difference["fid"] > 0.01


def test_features_of_batches_keep_their_order():
    images = random_images(9)
    joined = extract_features(MeanColour(), [images[:4], images[4:]])
    np.testing.assert_array_equal(joined.pool, MeanColour()(images).pool)
    with pytest.raises(ValueError, match="no images"):
        extract_features(MeanColour(), [])


# --- the feature classifier ---

SHORT = ClassifierRecipe(num_epochs=3, batch_size=16)


def bars(n: int, seed: int, levels: int = 17) -> LabelledImages:
    """Noisy images of one bright row; the row is the class."""
    labels = rng(seed).integers(0, 4, size=n)
    images = rng(seed + 1).integers(0, levels // 2, size=(n, 4, 4, 1))
    images[np.arange(n), labels] = levels - 1
    return LabelledImages(images.astype(np.uint8), labels)


def bar_classifier(folder: Path, **changes):
    arguments = {"train": bars(256, 0), "test": bars(64, 10), "levels": 17, "recipe": SHORT} | changes
    return trained_classifier(arguments.pop("train"), arguments.pop("test"), cache_dir=folder, **arguments)


def test_classifier_is_the_same_bit_for_bit_when_trained_again(tmp_path):
    first, second = bar_classifier(tmp_path / "a"), bar_classifier(tmp_path / "b")
    assert first.hash == second.hash
    np.testing.assert_array_equal(first(bars(5, 3).images).pool, second(bars(5, 3).images).pool)
    assert bar_classifier(tmp_path / "a", recipe=dataclasses.replace(SHORT, seed=1)).hash != first.hash


def test_classifier_learns_and_its_features_do_not_depend_on_the_batch(tmp_path):
    classifier = bar_classifier(tmp_path)
    assert classifier.test_accuracy > 0.95
    images = bars(600, 5).images  # more than one chunk
    features = classifier(images)
    assert features.pool.shape == (600, 64)
    assert features.logits.shape == (600, 4)
    np.testing.assert_array_equal(classifier(images[590:]).pool, features.pool[590:])


def test_classifier_comes_from_the_cache(tmp_path, monkeypatch):
    trained = bar_classifier(tmp_path)
    monkeypatch.setattr("evaluators.classifier._train", lambda *_: pytest.fail("trained again"))
    cached = bar_classifier(tmp_path)
    assert cached.hash == trained.hash
    assert cached.test_accuracy == trained.test_accuracy


def test_one_host_of_several_writes_the_classifier(tmp_path, monkeypatch):
    monkeypatch.setattr("infra.parallel.local_rows", slice)  # the other host is not there
    monkeypatch.setattr("jax.process_index", lambda: 1)
    assert bar_classifier(tmp_path).test_accuracy > 0.95
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["truncated", "empty", "scrambled", "changed", "other data"])
def test_damaged_cache_is_replaced(tmp_path, damage):
    trained = bar_classifier(tmp_path)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "scrambled":
        path.write_bytes(good[:300] + bytes(100) + good[400:])
    else:
        with np.load(path) as file:
            arrays = dict(file)
        if damage == "changed":
            arrays["Dense_0/bias"] += 1
        else:
            arrays["identity"] = np.array("other data")
        np.savez(path, **arrays)
    assert bar_classifier(tmp_path).hash == trained.hash
    assert path.read_bytes() == good


def test_classifier_refuses_data_that_does_not_fit(tmp_path):
    train = bars(32, 0)
    with pytest.raises(ValueError, match="train split: image level 16, but levels is 16"):
        bar_classifier(tmp_path, train=train, levels=16)
    with pytest.raises(ValueError, match="test split: 32 images and labels of shape"):
        bar_classifier(tmp_path, test=train._replace(labels=train.labels[:5]))
    for labels, said in ((train.labels - 1, "-1"), (np.array(["cat"] * 32), "cat"), (train.labels / 2, r"0\.0")):
        with pytest.raises(
            ValueError, match=rf"train split: labels such as {said}; they must be integers of at least 0"
        ):
            bar_classifier(tmp_path, train=train._replace(labels=labels))
    assert not any(tmp_path.iterdir())
