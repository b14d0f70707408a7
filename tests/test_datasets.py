import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.digits.smoke import get_config
from datasets import (
    BatchOrder,
    MemorySource,
    Preprocess,
    evaluation_batch,
    evaluation_batch_sizes,
    source_from_config,
    training_batches,
    uniform_dequantize,
)
from infra import parallel


@pytest.fixture(scope="module")
def digits():
    return source_from_config(get_config(), "train")


def test_digits_splits_are_disjoint_and_complete(digits):
    test = source_from_config(get_config(), "test")
    assert (len(digits), len(test)) == (1438, 359)
    assert digits.image_shape == (8, 8, 1)
    assert digits.images(np.arange(10)).dtype == np.uint8
    # every image of scikit-learn's is in one of them
    import sklearn.datasets

    both = np.concatenate([s.images(np.arange(len(s))).reshape(-1, 64) for s in (digits, test)])
    expected = np.asarray(sklearn.datasets.load_digits(return_X_y=True)[0], np.uint8)
    assert np.array_equal(np.sort(both, axis=0), np.sort(expected, axis=0))
    assert isinstance(test, MemorySource)
    assert test.labels is not None
    assert set(np.unique(test.labels)) == set(range(10))


def test_every_epoch_sees_every_image_once():
    order = BatchOrder(num_images=10, batch_size=4, seed=3)
    stream = np.concatenate([order[k] for k in range(15)])
    for epoch in range(6):
        assert sorted(stream[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert not np.array_equal(stream[:10], stream[10:20]), "epochs are shuffled differently"
    assert np.array_equal(order[7], BatchOrder(10, 4, 3)[7]), "a batch follows from seed and number"
    assert not np.array_equal(order[7], BatchOrder(10, 4, 4)[7])


def test_a_batch_can_hold_several_epochs():
    indices = BatchOrder(num_images=3, batch_size=8, seed=0)[1]
    # the last image of epoch 2, epochs 3 and 4, the first of epoch 5
    assert sorted(indices[1:4]) == sorted(indices[4:7]) == [0, 1, 2]


def test_resumed_batches_are_those_of_the_whole_run(digits):
    whole = list(training_batches(digits, 16, seed=1, first_step=0, num_steps=9))
    resumed = list(training_batches(digits, 16, seed=1, first_step=5, num_steps=9))
    assert len(whole) == 9
    np.testing.assert_array_equal(np.stack(whole[5:]), np.stack(resumed))


def test_hosts_share_out_the_global_batch(digits, monkeypatch):
    """The rows of 1, 2 and 4 hosts put together are the same batches."""

    def batches(hosts):
        monkeypatch.setattr(jax, "process_count", lambda: hosts)
        parts = []
        for host in range(hosts):
            monkeypatch.setattr(jax, "process_index", lambda host=host: host)
            assert parallel.local_rows(16) == slice(host * 16 // hosts, (host + 1) * 16 // hosts)
            parts.append(np.stack(list(training_batches(digits, 16, seed=1, first_step=0, num_steps=3))))
        return np.concatenate(parts, axis=1)

    one = batches(1)
    np.testing.assert_array_equal(one, batches(2))
    np.testing.assert_array_equal(one, batches(4))


def test_each_hosts_devices_are_together_and_in_order(monkeypatch):
    """Where rows lie along the mesh is where `local_rows` says, in whatever order the platform lists its devices."""
    devices = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda: devices[::-1])
    assert list(parallel.device_mesh().devices) == devices


def test_hosts_with_other_data_are_told(monkeypatch):
    """Else they would train on a mixture of both, say of two versions of a data set."""
    parallel.require_same("MNIST, train, images 1", "training data")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    other = np.frombuffer(hashlib.sha256(b"MNIST, train, images 2").digest(), np.uint8)
    gather = "jax.experimental.multihost_utils.process_allgather"
    monkeypatch.setattr(gather, lambda mine: np.stack([mine, mine]))
    parallel.require_same("MNIST, train, images 1", "training data")
    monkeypatch.setattr(gather, lambda mine: np.stack([other, mine]))
    message = "training data differ between hosts; on host 0 they are MNIST, train, images 1"
    with pytest.raises(ValueError, match=message):
        parallel.require_same("MNIST, train, images 1", "training data")


def test_an_evaluation_pass_counts_every_image_once(digits):
    sizes = evaluation_batch_sizes(digits, 100)
    assert sum(sizes) == len(digits)
    assert sizes[-1] == 38
    counted = [b.indices[b.counts] for b in (evaluation_batch(digits, 100, n) for n in range(len(sizes)))]
    np.testing.assert_array_equal(np.concatenate(counted), np.arange(len(digits)))
    last = evaluation_batch(digits, 100, len(sizes) - 1)
    assert last.images.shape == (100, 8, 8, 1)
    assert sum(evaluation_batch_sizes(digits, 100, max_examples=130)) == 130


def test_dequantized_levels_fill_their_bins():
    levels = 17
    images = jnp.arange(levels, dtype=jnp.uint8).reshape(1, levels, 1, 1).repeat(2000, axis=0)
    x = uniform_dequantize(jax.random.key(0), images, levels)
    noise = x * levels - images
    assert jnp.all((noise > -1e-5) & (noise < 1 + 1e-5))
    assert abs(jnp.mean(noise) - 0.5) < 5 * np.sqrt(1 / 12 / noise.size)
    assert abs(jnp.var(noise) - 1 / 12) < 5 * np.sqrt(1 / 180 / noise.size)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("dequantize", [False, True])
def test_preprocessing_and_its_inverse(digits, centered, dequantize):
    images = digits.images(np.arange(64))
    preprocess = Preprocess(levels=17, centered=centered, dequantize=dequantize)
    x = preprocess(jax.random.key(0), jnp.asarray(images))
    assert x.min() >= (-1 if centered else 0)
    assert x.max() <= 1
    np.testing.assert_array_equal(preprocess.to_levels(x), images)
    np.testing.assert_allclose(preprocess.scale(preprocess.unscale(x)), x, atol=1e-6)
    derivative = jax.grad(lambda x: preprocess.unscale(x).sum())(x)
    np.testing.assert_allclose(derivative, preprocess.unit_scale)


def test_mirroring_is_fair_and_left_to_right(digits):
    images = jnp.asarray(digits.images(np.arange(1000)))
    x = Preprocess(levels=17, centered=False, random_flip=True)(jax.random.key(0), images)
    plain = Preprocess(levels=17, centered=False)(jax.random.key(0), images)
    mirrored = jnp.all(x == plain[:, :, ::-1], axis=(1, 2, 3))
    assert jnp.all(mirrored | jnp.all(x == plain, axis=(1, 2, 3)))
    assert abs(jnp.mean(mirrored) - 0.5) < 5 * np.sqrt(0.25 / 1000)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dataset", "digitz", "data.dataset is 'digitz'; known: .*digits"),
        ("image_size", 16, "data.image_size"),
        ("levels", 256, "data.levels is 256, but the brightest pixel .* has level 16"),
        ("levels", 16, "data.levels is 16"),
        ("levels", 1, "data.levels is 1; it must lie between 2 and 256"),
        ("levels", 257, "data.levels is 257; it must lie between 2 and 256"),
        ("image_size", 0, "data.image_size is 0"),
        ("num_channels", 0, "data.num_channels is 0"),
        ("path", "mine.npz", "data.path is 'mine.npz', but data.dataset=digits reads no files; set .* npz or folder"),
    ],
)
def test_data_that_do_not_fit_are_refused(field, value, message):
    config = get_config()
    config.data[field] = value
    with pytest.raises(ValueError, match=message):
        source_from_config(config, "train")


@pytest.mark.parametrize(("size", "parts", "message"), [(6, 1, "use 4 or 8"), (3, 1, "use 4"), (12, 2, "use 8 or 16")])
def test_indivisible_batches_are_refused(size, parts, message):
    assert jax.device_count() == 4
    with pytest.raises(ValueError, match=f"training.batch_size is {size}.*{message}"):
        parallel.divisible(size, "training.batch_size", parts)


@pytest.mark.parametrize(("rounding", "expected"), [("truncate", [0, 0, 2, 4]), ("nearest", [0, 1, 3, 4])])
def test_samples_of_models_of_bare_levels_are_truncated_or_rounded(rounding, expected):
    preprocess = Preprocess(levels=5, centered=False, rounding=rounding)
    x = jnp.array([-0.3, 0.15, 0.7, 1.2]).reshape(4, 1, 1, 1)
    assert preprocess.to_levels(x).ravel().tolist() == expected
    with pytest.raises(ValueError, match=r"eval.rounding is 'up'; known: truncate, nearest"):
        Preprocess(levels=5, centered=False, rounding="up")
