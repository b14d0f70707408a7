"""The interface of feature extractors, fixed networks whose features measure sample quality, and their shared code.

FID and KID compare pooled features, and the Inception Score reads class logits. features.py lists the extractors.
Images are measured in chunks of a fixed size, sharded over all devices of all hosts.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, UInt8

from infra import parallel

Images = UInt8[np.ndarray, "n height width channels"]
"""Images as the integer levels 0, ..., levels - 1 of each channel."""

ImageBatches: TypeAlias = Iterable[UInt8[np.ndarray, "_ height width channels"]]
"""Batches of images, which may have different sizes."""


class Features(NamedTuple):
    """The outputs of a network for n images: pooled features for FID and KID, class logits for the Inception Score."""

    pool: Float[np.ndarray, "n d"]
    logits: Float[np.ndarray, "n classes"]


@runtime_checkable
class FeatureExtractor(Protocol):
    """A fixed network that measures images. Results are comparable only if their `hash` is the same."""

    @property
    def name(self) -> str:
        """The label of its results."""
        ...

    @property
    def hash(self) -> str:
        """The first digits of the SHA-256 of the parameters, and the other settings that the features depend on."""
        ...

    @property
    def num_features(self) -> int:
        """d, the number of features that FID compares."""
        ...

    def __call__(self, images: Images) -> Features: ...


def extract_features(extractor: FeatureExtractor, batches: ImageBatches) -> Features:
    """Extracts the features of all images of all batches, in order."""
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


def params_hash(params: dict) -> str:
    """The `array_hash` of the names and values of all parameters."""
    flat = flat_params(params)
    return array_hash(np.array(sorted(flat)), *(flat[name] for name in sorted(flat)))


def flat_params(params: dict) -> dict[str, np.ndarray]:
    """The parameters by their path, as NumPy arrays."""
    return {str(name): np.asarray(leaf) for name, leaf in traverse_util.flatten_dict(params, sep="/").items()}


def in_chunks(measure: Callable[[Array], tuple[Array, Array]], images: Images, per_device: int) -> Features:
    """Applies `measure` to images in chunks of `per_device` images for each device; the last chunk is padded.

    Each chunk is dispatched before the features of the previous one are fetched.

    Raises:
        KeyboardInterrupt: after a request to stop.
        ValueError: if there are no images.
    """
    mesh, size = parallel.device_mesh(), per_device * jax.device_count()
    parts: list[Features] = []
    pending: tuple[tuple[Array, Array], int] | None = None
    for start in range(0, len(images), size):
        parallel.check_stop()
        chunk = images[start : start + size]
        (padded,) = parallel.pad_rows(size, chunk)
        outputs = measure(parallel.global_array(mesh, padded[parallel.local_rows(size)]))
        if pending is not None:
            parts.append(_fetched(*pending))
        pending = outputs, len(chunk)
    if pending is None:
        raise ValueError("no images to extract features from")
    parts.append(_fetched(*pending))
    return Features(np.concatenate([p.pool for p in parts]), np.concatenate([p.logits for p in parts]))


def _fetched(outputs: tuple[Array, Array], count: int) -> Features:
    pool, logits = parallel.fetch(outputs)
    return Features(np.asarray(pool)[:count], np.asarray(logits)[:count])
