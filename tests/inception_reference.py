"""Inception with random weights, and the outputs of torch-fidelity's network for the same weights.

    python -m tests.inception_reference

The command stores the outputs of torch-fidelity beside this file, and needs torch and torch-fidelity. The tests compare
with the stored outputs, and also run torch-fidelity where it is installed. The weights are not stored, because they
follow from their names and shapes.
"""

import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from infra.files import write_npz
from models.inception import published_shapes

STORED = Path(__file__).with_name("inception_torch_fidelity.npz")


def random_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Draws weights of the given names and shapes, scaled so that signals keep their size through the network."""
    return {name: _random_weight(name, shape) for name, shape in shapes.items()}


def _random_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith(("bn.weight", "running_var")):
        drawn = generator.uniform(0.5, 1.5, shape)
    elif len(shape) == 1:
        drawn = 0.05 * generator.standard_normal(shape)
    else:
        drawn = generator.standard_normal(shape) * np.sqrt(1.5 / np.prod(shape[1:]))
    return drawn.astype(np.float32)


def random_images() -> np.ndarray:
    """Draws two images of 32 x 32 pixels: noise, and noise on a slope."""
    noise = np.random.default_rng(0).integers(0, 128, (2, 32, 32, 3))
    slope = np.broadcast_to(4 * np.arange(32).reshape(1, 32, 1), (32, 32, 3))
    return np.stack([2 * noise[0], noise[1] + slope]).astype(np.uint8)


def torch_outputs(weights: Mapping[str, np.ndarray], images: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the resized images and the features of torch-fidelity.

    Raises:
        ImportError: if torch or torch-fidelity is not installed.
    """
    import torch  # pyright: ignore[reportMissingImports]
    from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
        FeatureExtractorInceptionV3,
    )
    from torch_fidelity.interpolate_compat_tensorflow import (  # pyright: ignore[reportMissingImports]
        interpolate_bilinear_2d_like_tensorflow1x,
    )

    batch: Any = torch.tensor(images.transpose(0, 3, 1, 2))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        save_weights(weights, path)
        network = FeatureExtractorInceptionV3("inception", ["2048", "logits"], str(path))
    pool, logits = network(batch)
    resized = interpolate_bilinear_2d_like_tensorflow1x(batch.float(), size=(299, 299), align_corners=False)
    return {"pool": pool.numpy(), "logits": logits.numpy(), "resized": resized.numpy().transpose(0, 2, 3, 1)}


def save_weights(weights: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes weights in the format of the published file.

    Raises:
        ImportError: if torch is not installed.
    """
    import torch  # pyright: ignore[reportMissingImports]

    torch.save({name: torch.tensor(array) for name, array in weights.items()}, path)


def main() -> None:
    outputs = torch_outputs(random_weights(published_shapes()), random_images())
    write_npz(STORED, pool=outputs["pool"], logits=outputs["logits"])


if __name__ == "__main__":
    main()
