"""Networks whose features measure sample quality, behind one interface: Inception, and a classifier trained here.

FID and KID compare pooled features, the Inception Score reads class logits. Where Inception makes no sense (8x8
digits), a small classifier trained on the training split stands in for it; every number then carries its name.
Images are measured in chunks of a fixed size, shared out over all devices of all hosts.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import linen as nn
from flax import traverse_util
from jaxtyping import Array, Float, Int, UInt8

from infra import parallel
from infra.files import read_npz, write_npz
from models.inception import NUM_FEATURES, Inception, InceptionOutput, resize

Images = UInt8[np.ndarray, "n height width channels"]
"""Images as the integer levels 0, ..., levels - 1 of each channel."""


class Features(NamedTuple):
    """What a network says about n images: pooled features for FID and KID, class logits for the Inception Score."""

    pool: Float[np.ndarray, "n d"]
    logits: Float[np.ndarray, "n classes"]


class FeatureExtractor(Protocol):
    """A fixed network that measures images. Numbers are comparable only between equal `hash`es."""

    @property
    def name(self) -> str:
        """What results are labelled with."""
        ...

    @property
    def hash(self) -> str:
        """The first digits of the SHA-256 of the network's parameters, and what else its features depend on."""
        ...

    @property
    def num_features(self) -> int:
        """d, how many features FID compares."""
        ...

    def __call__(self, images: Images) -> Features: ...


def extract_features(extractor: FeatureExtractor, batches: Iterable[Images]) -> Features:
    """Features of all images of all batches, in order."""
    parts = [extractor(images) for images in batches]
    if not parts:
        raise ValueError("no images to extract features from")
    return Features(np.concatenate([p.pool for p in parts]), np.concatenate([p.logits for p in parts]))


def array_hash(*arrays: np.ndarray) -> str:
    """The first 16 digits of the SHA-256 of the arrays' shapes, types and contents."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def in_chunks(measure: Callable[[Array], tuple[Array, Array]], images: Images, per_device: int) -> Features:
    """What `measure` gives for images, in chunks of so many for each device; the last one is filled up with images.

    A chunk is sent off before the features of the one before are waited for.
    """
    mesh, size = parallel.device_mesh(), per_device * jax.device_count()
    parts: list[Features] = []
    under_way: tuple[tuple[Array, Array], int] | None = None
    for start in range(0, len(images), size):
        chunk = images[start : start + size]
        (padded,) = parallel.pad_rows(size, chunk)
        outputs = measure(parallel.global_array(mesh, padded[parallel.local_rows(size)]))
        if under_way is not None:
            parts.append(_fetched(*under_way))
        under_way = outputs, len(chunk)
    if under_way is None:
        raise ValueError("no images to extract features from")
    parts.append(_fetched(*under_way))
    return Features(np.concatenate([p.pool for p in parts]), np.concatenate([p.logits for p in parts]))


def _fetched(outputs: tuple[Array, Array], count: int) -> Features:
    pool, logits = parallel.fetch(outputs)
    return Features(np.asarray(pool)[:count], np.asarray(logits)[:count])


@dataclasses.dataclass(frozen=True)
class InceptionFeatures:
    """Inception-2015-12-05 as a `FeatureExtractor`.

    Levels are spread over 0, ..., 255, grey images repeated to three channels, and both resized as by TensorFlow 1. The
    network sees (level - centre) / centre: 128 is what the graph itself does, 127.5 what TF-GAN does before it. Logits
    have their bias; the first Inception Scores, and torch-fidelity's, are without.
    """

    params: dict
    params_hash: str
    levels: int
    centre: float = 128.0
    per_device: int = 32  # images measured together on a device

    @property
    def name(self) -> str:
        return "inception"

    @property
    def hash(self) -> str:
        return self.params_hash if self.centre == 128 else f"{self.params_hash}-{self.centre:g}"

    @property
    def num_features(self) -> int:
        return NUM_FEATURES

    def __call__(self, images: Images) -> Features:
        def measure(chunk: Array) -> InceptionOutput:
            return _inception(self.params, inception_input(chunk, self.levels, self.centre))

        return in_chunks(measure, images, self.per_device)


@functools.partial(jax.jit, static_argnames=("levels", "centre"))
def inception_input(images: Array, levels: int, centre: float) -> Float[Array, "n 299 299 3"]:
    """What Inception sees of integer levels, of one channel or three."""
    x = images.astype(jnp.float32) * (255 / (levels - 1))
    return (resize(jnp.repeat(x, 3 // x.shape[-1], axis=-1)) - centre) / centre


@jax.jit
def _inception(params: dict, x: Float[Array, "n 299 299 3"]) -> InceptionOutput:
    outputs: Any = Inception().apply({"params": params}, x)
    return outputs


def inception_features(path: Path, *, levels: int, centre: float = 128.0) -> InceptionFeatures:
    """Inception with the weights that `save_inception` wrote, on every device.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or not what was written; or for levels or a centre that are not allowed.
    """
    if levels < 2 or centre not in (128.0, 127.5):
        raise ValueError(f"levels is {levels} and centre {centre}; they must be at least 2, and 128 or 127.5")
    arrays = read_npz(path)
    stored_hash = str(arrays.pop("hash", ""))
    arrays.pop("source_sha256", None)
    params = traverse_util.unflatten_dict(arrays, sep="/")
    if _params_hash(params) != stored_hash:
        raise ValueError(f"{path} is not as the conversion wrote it; convert the weights of Inception again")
    return InceptionFeatures(
        jax.device_put(params, parallel.replicated(parallel.device_mesh())), stored_hash, levels, centre
    )


def save_inception(path: Path, params: dict, *, source_sha256: str) -> None:
    """Writes the parameters of `Inception`, with their hash and that of the file they came from."""
    write_npz(path, hash=_params_hash(params), source_sha256=source_sha256, **_flat(params))


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
        highest = jax.lax.Precision.HIGHEST  # features are compared across machines, so no reduced precision
        # Biases of convolutions are left out: XLA splits the sums of their gradients over threads, so that the trained
        # parameters would depend on the number of processors.
        x = nn.relu(nn.Conv(self.width, (3, 3), use_bias=False, precision=highest)(x))
        x = nn.relu(nn.Conv(2 * self.width, (3, 3), strides=(2, 2), use_bias=False, precision=highest)(x))
        pool = nn.relu(nn.Dense(self.num_features, precision=highest)(x.reshape(len(x), -1)))
        return pool, nn.Dense(self.num_classes, precision=highest)(pool)


@dataclasses.dataclass(frozen=True)
class ClassifierRecipe:
    """How the classifier is trained. Any change, as of `version`, makes another network of another hash."""

    num_epochs: int = 15
    batch_size: int = 64
    learning_rate: float = 3e-3  # of Adam, falling to 0 along a cosine
    label_smoothing: float = 0.02
    seed: int = 0
    version: int = 1


DEFAULT_RECIPE = ClassifierRecipe()
_PER_DEVICE = 128  # images that the classifier measures together on a device


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
        return _params_hash(self.params)

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
    """The classifier of a training split, from `cache_dir` or trained now (a few seconds for 8x8 images).

    It is a function of the training split, `levels` and `recipe` alone: the same on every run on one machine, whatever
    its number of processors. A cache file of other data or another recipe, or one that is damaged, is replaced. The
    test accuracy is logged.

    Raises:
        ValueError: empty splits, labels that do not match the images or are no classes, or images beyond `levels`.
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
            write_npz(path, identity=identity, hash=_params_hash(params), **_flat(params))
    logits = _measure(network, params, test.images, levels).logits
    accuracy = float(np.mean(logits.argmax(-1) == test.labels))
    logging.info("Feature classifier %s: accuracy %.4f on %d test images", path.name, accuracy, len(test.labels))
    return ClassifierFeatures(network, params, levels, accuracy)


def _check_split(split: str, data: LabelledImages, levels: int) -> None:
    if len(data.images) == 0 or data.labels.shape != data.images.shape[:1]:
        raise ValueError(f"{split} split: {len(data.images)} images and labels of shape {data.labels.shape}")
    least = np.sort(data.labels)[0]
    if not np.issubdtype(least.dtype, np.integer) or least < 0:
        raise ValueError(f"{split} split: labels such as {least}; they must be integers from 0 on")
    if data.images.max() >= levels:
        raise ValueError(f"{split} split: image level {data.images.max()}, but levels is {levels}")


def _load_params(path: Path, identity: str) -> dict | None:
    """The cached parameters, or None if there are none or they cannot be trusted."""
    if not path.exists():
        return None
    try:
        arrays = read_npz(path)
    except ValueError as error:
        logging.warning("%s; training the classifier again", error)
        return None
    matches, stored_hash = str(arrays.pop("identity", "")) == identity, str(arrays.pop("hash", ""))
    params = traverse_util.unflatten_dict(arrays, sep="/")
    if not matches or _params_hash(params) != stored_hash:
        logging.warning("%s is of other data or changed; training the classifier again", path)
        return None
    return params


def _params_hash(params: dict) -> str:
    flat = _flat(params)
    return array_hash(np.array(sorted(flat)), *(flat[name] for name in sorted(flat)))


def _flat(params: dict) -> dict[str, np.ndarray]:
    return {str(name): np.asarray(leaf) for name, leaf in traverse_util.flatten_dict(params, sep="/").items()}


def _train(network: Classifier, train: LabelledImages, levels: int, recipe: ClassifierRecipe) -> dict:
    """Minimises the cross-entropy by Adam; each epoch takes whole batches of a new permutation."""
    images = _normalize(jnp.asarray(train.images), levels)
    labels = jnp.asarray(train.labels, jnp.int32)
    init_key, order_key = jax.random.split(jax.random.key(recipe.seed))
    params = network.init(init_key, images[:1])["params"]
    params = _fit(network, recipe, params, order_key, images, labels)
    return jax.tree.map(np.asarray, params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fit(network: Classifier, recipe: ClassifierRecipe, params: dict, key: Array, images: Array, labels: Array) -> dict:
    batch_size = min(recipe.batch_size, len(images))
    steps_per_epoch = len(images) // batch_size
    schedule = optax.cosine_decay_schedule(recipe.learning_rate, recipe.num_epochs * steps_per_epoch)
    optimizer = optax.adam(schedule)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, network.num_classes), recipe.label_smoothing)

    def cross_entropy(params: dict, batch: Array) -> Array:
        _, logits = _apply(network, params, images[batch])
        return optax.softmax_cross_entropy(logits, targets[batch]).mean()

    def step(carry: tuple, batch: Array) -> tuple[tuple, None]:
        params, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(cross_entropy)(params, batch), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    orders = jax.vmap(lambda k: jax.random.permutation(k, len(images)))(jax.random.split(key, recipe.num_epochs))
    batches = orders[:, : steps_per_epoch * batch_size].reshape(-1, batch_size)
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), batches)
    return params


def _normalize(images: Array, levels: int) -> Float[Array, "n height width channels"]:
    """Levels to [-1, 1]."""
    return images.astype(jnp.float32) * (2 / (levels - 1)) - 1


def _measure(network: Classifier, params: dict, images: Images, levels: int) -> Features:
    return in_chunks(functools.partial(_apply_to_levels, network, levels, params), images, _PER_DEVICE)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply_to_levels(network: Classifier, levels: int, params: dict, images: Array) -> tuple[Array, Array]:
    return _apply(network, params, _normalize(images, levels))


def _apply(network: Classifier, params: dict, x: Array) -> tuple[Array, Array]:
    outputs: Any = network.apply({"params": params}, x)
    return outputs
