"""The feature extractors by name: Inception, and a classifier trained here.

extractor.py has their interface.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float

import datasets
from configs.default import Config
from evaluators.classifier import classifier_from_config
from evaluators.extractor import FeatureExtractor, Features, Images, flat_params, in_chunks, params_hash
from infra import parallel
from infra.files import read_npz, write_npz
from models.inception import NUM_FEATURES, Inception, InceptionOutput, resize

PUBLISHED_INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
"""The file that `evaluators/convert_inception.py` converts."""


@dataclasses.dataclass(frozen=True)
class InceptionFeatures:
    """Inception-2015-12-05 as a `FeatureExtractor`.

    Levels are scaled to 0, ..., 255, grey images are repeated to three channels, and all images are resized as by
    TensorFlow 1. The network sees (level - centre) / centre: the graph itself uses 128, and TF-GAN uses 127.5 before
    the graph. Logits include their bias; those of the first Inception Scores, and of torch-fidelity, do not.
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
        centre = "" if self.centre == 128 else f"-{self.centre:g}"
        return f"{self.params_hash}{centre}" + ("" if self.levels == 256 else f"-levels{self.levels}")

    @property
    def num_features(self) -> int:
        return NUM_FEATURES

    def __call__(self, images: Images) -> Features:
        def measure(chunk: Array) -> InceptionOutput:
            return _inception(self.params, inception_input(chunk, self.levels, self.centre))

        return in_chunks(measure, images, self.per_device)


@functools.partial(jax.jit, static_argnames=("levels", "centre"))
def inception_input(images: Array, levels: int, centre: float) -> Float[Array, "n 299 299 3"]:
    """Converts integer levels of one or three channels to the input of Inception."""
    x = images.astype(jnp.float32) * (255 / (levels - 1))
    return (resize(jnp.repeat(x, 3 // x.shape[-1], axis=-1)) - centre) / centre


@jax.jit
def _inception(params: dict, x: Float[Array, "n 299 299 3"]) -> InceptionOutput:
    outputs: Any = Inception().apply({"params": params}, x)
    return outputs


def inception_features(path: Path, *, levels: int, centre: float = 128.0) -> InceptionFeatures:
    """Loads the weights that `save_inception` wrote, on every device.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or was changed, or for levels or a centre that are not allowed.
    """
    if levels < 2 or centre not in (128.0, 127.5):
        raise ValueError(f"levels is {levels} and centre {centre}; they must be at least 2, and 128 or 127.5")
    arrays = read_npz(path)
    stored_hash = str(arrays.pop("hash", ""))
    arrays.pop("source_sha256", None)
    params = traverse_util.unflatten_dict(arrays, sep="/")
    if params_hash(params) != stored_hash:
        raise ValueError(f"{path} has changed since its conversion; convert the weights of Inception again")
    return InceptionFeatures(
        jax.device_put(params, parallel.replicated(parallel.device_mesh())), stored_hash, levels, centre
    )


def save_inception(path: Path, params: dict, *, source_sha256: str) -> None:
    """Writes the parameters of `Inception`, with their hash and the hash of the file that they came from."""
    write_npz(path, hash=params_hash(params), source_sha256=source_sha256, **flat_params(params))


def extractor_from_config(config: Config) -> Callable[[], FeatureExtractor]:
    """Returns a function that builds, and if necessary trains, the feature extractor that `eval.features` names.

    Raises:
        FileNotFoundError: if the weights of Inception are missing. The message says how to get them.
        ValueError: for points, an unknown name, damaged weights, or a classifier where the data have no labels.
    """
    if datasets.has_points(config):
        raise ValueError(
            f"data.dataset is {config.data.dataset!r}, which has points, but FID, IS and KID compare images"
        )
    if config.eval.features not in EXTRACTORS:
        raise ValueError(f"eval.features is {config.eval.features!r}; known: {', '.join(EXTRACTORS)}")
    return EXTRACTORS[config.eval.features](config)


def inception_from_config(config: Config) -> Callable[[], InceptionFeatures]:
    """Loads the weights in the file `eval.inception`. Raises as `extractor_from_config` does."""
    path, centre = Path(config.eval.inception), config.eval.inception_centre
    if not path.is_file():
        raise FileNotFoundError(
            f"eval.inception is {str(path)!r}, but there is no such file. FID needs the weights of Inception; convert "
            f"them once from {PUBLISHED_INCEPTION} by python -m evaluators.convert_inception PATH. "
            "To do without them, set eval.features=classifier if the data have labels, or, for --mode=eval, "
            "eval.enable_sampling=False"
        )
    if config.data.num_channels not in (1, 3):
        raise ValueError(f"data.num_channels is {config.data.num_channels}; Inception needs images of 1 or 3 channels")
    if centre not in (128.0, 127.5):
        raise ValueError(f"eval.inception_centre is {centre:g}; it must be 128 or 127.5")
    inception = inception_features(path, levels=config.data.levels, centre=centre)
    return lambda: inception


EXTRACTORS: dict[str, Callable[[Config], Callable[[], FeatureExtractor]]] = {
    "inception": inception_from_config,
    "classifier": classifier_from_config,
}
"""Functions that check a configuration and return a function that builds the feature extractor, by name."""
