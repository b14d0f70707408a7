"""A feature extractor for images to which Inception does not apply: a small classifier trained on the data set.

For example, Inception makes no sense for 8x8 digits. Every result of the classifier is labelled with its name.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import linen as nn
from flax import traverse_util
from jaxtyping import Array, Float, Int

import datasets
from configs.default import Config
from datasets import Source
from evaluators.extractor import Features, Images, array_hash, flat_params, in_chunks, params_hash
from infra import parallel
from infra.files import read_npz, write_npz


class LabelledImages(NamedTuple):
    """Images with their classes 0, ..., K - 1."""

    images: Images
    labels: Int[np.ndarray, " n"]


class Classifier(nn.Module):
    """Two convolutions and two dense layers; the hidden dense layer is the pooled feature."""

    num_classes: int
    width: int = 16
    num_features: int = 64

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> tuple[Float[Array, "n d"], Float[Array, "n classes"]]:
        highest = jax.lax.Precision.HIGHEST  # Features are compared across machines, so they need full precision.
        # Convolutions have no biases, because XLA splits the sums of their gradients over threads, so that the trained
        # parameters would depend on the number of processors.
        x = nn.relu(nn.Conv(self.width, (3, 3), use_bias=False, precision=highest)(x))
        x = nn.relu(nn.Conv(2 * self.width, (3, 3), strides=(2, 2), use_bias=False, precision=highest)(x))
        pool = nn.relu(nn.Dense(self.num_features, precision=highest)(x.reshape(len(x), -1)))
        return pool, nn.Dense(self.num_classes, precision=highest)(pool)


@dataclasses.dataclass(frozen=True)
class ClassifierRecipe:
    """How the classifier is trained. Any change, for example of `version`, gives another network with another hash."""

    num_epochs: int = 15
    batch_size: int = 64
    learning_rate: float = 3e-3  # The learning rate of Adam at the start; it falls to 0 along a cosine.
    label_smoothing: float = 0.02
    seed: int = 0
    version: int = 1


DEFAULT_RECIPE = ClassifierRecipe()
_PER_DEVICE = 128  # images that are measured together on a device


@dataclasses.dataclass(frozen=True)
class ClassifierFeatures:
    """A trained classifier as a `FeatureExtractor`."""

    network: Classifier
    params: dict
    levels: int
    test_accuracy: float

    @property
    def name(self) -> str:
        return "classifier"

    @property
    def hash(self) -> str:
        return params_hash(self.params)

    @property
    def num_features(self) -> int:
        return self.network.num_features

    def __call__(self, images: Images) -> Features:
        return _measure(self.network, self.params, images, self.levels)


def trained_classifier(
    train: LabelledImages,
    test: LabelledImages,
    *,
    levels: int,
    cache_dir: Path,
    recipe: ClassifierRecipe = DEFAULT_RECIPE,
) -> ClassifierFeatures:
    """Loads the classifier of a training split from `cache_dir`, or trains it (a few seconds for 8x8 images).

    The classifier depends only on the training split, `levels` and `recipe`. Every run on one machine gives the same
    classifier, for any number of processors. A cache file that is damaged, or belongs to other data or another recipe,
    is replaced. The test accuracy is logged.

    Raises:
        ValueError: empty splits, labels that do not match the images or are not classes, or image levels of at least
            `levels`.
    """
    _check_split("train", train, levels)
    _check_split("test", test, levels)
    network = Classifier(num_classes=int(train.labels.max()) + 1)
    identity = f"{array_hash(*train)} {levels} {network.width} {network.num_features} {recipe}"
    path = cache_dir / f"classifier_{hashlib.sha256(identity.encode()).hexdigest()[:12]}.npz"
    params = _load_params(path, identity)
    if params is None:
        params = _train(network, train, levels, recipe)
        if jax.process_index() == 0:
            write_npz(path, identity=identity, hash=params_hash(params), **flat_params(params))
    logits = _measure(network, params, test.images, levels).logits
    accuracy = float(np.mean(logits.argmax(-1) == test.labels))
    logging.info("Feature classifier %s: accuracy %.4f on %d test images", path.name, accuracy, len(test.labels))
    return ClassifierFeatures(network, params, levels, accuracy)


def _check_split(split: str, data: LabelledImages, levels: int) -> None:
    if len(data.images) == 0 or data.labels.shape != data.images.shape[:1]:
        raise ValueError(f"{split} split: {len(data.images)} images and labels of shape {data.labels.shape}")
    least = np.sort(data.labels)[0]
    if not np.issubdtype(least.dtype, np.integer) or least < 0:
        raise ValueError(f"{split} split: labels such as {least}; they must be integers of at least 0")
    if data.images.max() >= levels:
        raise ValueError(f"{split} split: image level {data.images.max()}, but levels is {levels}")


def _load_params(path: Path, identity: str) -> dict | None:
    """Loads the cached parameters. Returns None if the file is missing, damaged, or has other parameters."""
    if not path.exists():
        return None
    try:
        arrays = read_npz(path)
    except ValueError as error:
        logging.warning("%s; training the classifier again", error)
        return None
    matches, stored_hash = str(arrays.pop("identity", "")) == identity, str(arrays.pop("hash", ""))
    params = traverse_util.unflatten_dict(arrays, sep="/")
    if not matches or params_hash(params) != stored_hash:
        logging.warning("%s belongs to other data or has changed; training the classifier again", path)
        return None
    return params


def _train(network: Classifier, train: LabelledImages, levels: int, recipe: ClassifierRecipe) -> dict:
    """Minimises the cross-entropy by Adam. Each epoch takes full batches from a new permutation."""
    images = _normalize(jnp.asarray(train.images), levels)
    labels = jnp.asarray(train.labels, jnp.int32)
    state, keys = _first_state(network, recipe, jax.random.key(recipe.seed), images)
    for key in keys:
        parallel.check_stop()
        state = jax.block_until_ready(_fit_epoch(network, recipe, state, key, images, labels))
    return jax.tree.map(np.asarray, state[0])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _first_state(network: Classifier, recipe: ClassifierRecipe, key: Array, images: Array) -> tuple[tuple, Array]:
    """Returns the parameters and the state of the optimizer before the first epoch, and a key for each epoch."""
    init_key, order_key = jax.random.split(key)
    params = network.init(init_key, images[:1])["params"]
    state = params, _classifier_optimizer(recipe, len(images)).init(params)
    return state, jax.random.split(order_key, recipe.num_epochs)


def _classifier_optimizer(recipe: ClassifierRecipe, num_images: int) -> optax.GradientTransformation:
    steps = recipe.num_epochs * (num_images // min(recipe.batch_size, num_images))
    return optax.adam(optax.cosine_decay_schedule(recipe.learning_rate, steps))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fit_epoch(
    network: Classifier, recipe: ClassifierRecipe, state: tuple, key: Array, images: Array, labels: Array
) -> tuple:
    """Trains for one epoch. The state holds the parameters and the state of the optimizer."""
    batch_size = min(recipe.batch_size, len(images))
    optimizer = _classifier_optimizer(recipe, len(images))
    targets = optax.smooth_labels(jax.nn.one_hot(labels, network.num_classes), recipe.label_smoothing)

    def cross_entropy(params: dict, batch: Array) -> Array:
        _, logits = _apply(network, params, images[batch])
        return optax.softmax_cross_entropy(logits, targets[batch]).mean()

    def step(carry: tuple, batch: Array) -> tuple[tuple, None]:
        params, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(cross_entropy)(params, batch), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    order = jax.random.permutation(key, len(images))
    batches = order[: len(images) // batch_size * batch_size].reshape(-1, batch_size)
    return jax.lax.scan(step, state, batches)[0]


@functools.partial(jax.jit, static_argnums=1)
def _normalize(images: Array, levels: int) -> Float[Array, "n height width channels"]:
    """Scales levels to [-1, 1]."""
    return images.astype(jnp.float32) * (2 / (levels - 1)) - 1


def _measure(network: Classifier, params: dict, images: Images, levels: int) -> Features:
    return in_chunks(functools.partial(_apply_to_levels, network, levels, params), images, _PER_DEVICE)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply_to_levels(network: Classifier, levels: int, params: dict, images: Array) -> tuple[Array, Array]:
    return _apply(network, params, _normalize(images, levels))


def _apply(network: Classifier, params: dict, x: Array) -> tuple[Array, Array]:
    outputs: Any = network.apply({"params": params}, x)
    return outputs


def classifier_from_config(config: Config) -> Callable[[], ClassifierFeatures]:
    """Returns a function that finds or trains the classifier for the data of a configuration.

    Raises:
        OSError, ValueError: if the data are missing or have no labels, before the classifier is trained.
    """
    sources = [datasets.source_from_config(config, split) for split in datasets.SPLITS]
    labels = [_labels(source) for source in sources]

    def find() -> ClassifierFeatures:
        train, test = (
            LabelledImages(source.images(np.arange(len(source))), each)
            for source, each in zip(sources, labels, strict=True)
        )
        return trained_classifier(train, test, levels=config.data.levels, cache_dir=Path(config.eval.statistics_dir))

    return find


def _labels(source: Source) -> np.ndarray:
    labels = getattr(source, "labels", None)
    if labels is None:
        raise ValueError(
            f"eval.features is 'classifier', but {source.description} has no class labels; use eval.features=inception"
        )
    return labels
