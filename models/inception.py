"""Inception-2015-12-05, the network of published FIDs (Szegedy et al., 2016), with the weights of TensorFlow.

Modules keep the names of the published weights. Batch normalisation has fixed statistics, so it is folded into the
convolutions when the weights are converted. This network differs from later versions of Inception-v3 in three points:
average pools do not count padding, the last block pools by the maximum, and the resize is TensorFlow 1's.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Shaped

from models.resample import AnySize, FeatureMap, SameSize

INPUT_SIZE = 299
NUM_FEATURES = 2048
NUM_CLASSES = 1008
BATCH_NORM_EPSILON = 1e-3

Size: TypeAlias = tuple[int, int]


class InceptionOutput(NamedTuple):
    """The features `pool_3`, which FID and KID compare, and the class logits, which include the bias."""

    pool: Float[Array, "batch 2048"]
    logits: Float[Array, "batch 1008"]


class Inception(nn.Module):
    """The network, for images in [-1, 1] of 299 x 299 pixels. It accepts images from 75 x 75 pixels on."""

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width 3"]) -> InceptionOutput:
        x = unit(x, "Conv2d_1a_3x3", 32, (3, 3), stride=2)
        x = unit(x, "Conv2d_2a_3x3", 32, (3, 3), padding="VALID")
        x = halve(unit(x, "Conv2d_2b_3x3", 64, (3, 3)))
        x = unit(x, "Conv2d_3b_1x1", 80)
        x = halve(unit(x, "Conv2d_4a_3x3", 192, (3, 3), padding="VALID"))
        for name, pool_features in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = Mixed5(pool_features, name=name)(x)
        x = Reduction6(name="Mixed_6a")(x)
        for name, inner in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x = Mixed6(inner, name=name)(x)
        x = Reduction7(name="Mixed_7a")(x)
        x = Mixed7(max_pool=False, name="Mixed_7b")(x)
        x = Mixed7(max_pool=True, name="Mixed_7c")(x)
        pool = x.mean((1, 2))
        return InceptionOutput(pool, nn.Dense(NUM_CLASSES, precision=jax.lax.Precision.HIGHEST, name="fc")(pool))


def unit(
    x: FeatureMap, name: str, features: int, size: Size = (1, 1), stride: int = 1, padding: str = "SAME"
) -> Float[Array, "batch _ _ {features}"]:
    """Applies a convolution with bias, then a ReLU. A convolution with a stride does not pad."""
    padding = "VALID" if stride > 1 else padding
    # Features are compared across machines, so the precision must not be reduced.
    highest = jax.lax.Precision.HIGHEST
    return nn.relu(nn.Conv(features, size, (stride, stride), padding, precision=highest, name=name)(x))


def units(x: FeatureMap, name: str, *layers: tuple[int, Size]) -> AnySize:
    """Applies units in sequence, numbered from 1. Each layer gives the features and the kernel size of a unit."""
    for number, (features, size) in enumerate(layers, start=1):
        x = unit(x, f"{name}_{number}", features, size)
    return x


def halve(x: FeatureMap) -> Float[Array, "batch _ _ channels"]:
    """Halves the resolution by the maximum over 3 x 3 pixels."""
    return nn.max_pool(x, (3, 3), (2, 2))


def average(x: FeatureMap) -> FeatureMap:
    """Returns the mean of the 3 x 3 neighbourhood of each pixel, without pixels outside the image."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


class Mixed5(nn.Module):
    """The block at 35 x 35 pixels."""

    pool_features: int

    @nn.compact
    def __call__(self, x: FeatureMap) -> SameSize:
        branches = (
            unit(x, "branch1x1", 64),
            units(x, "branch5x5", (48, (1, 1)), (64, (5, 5))),
            units(x, "branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
            unit(average(x), "branch_pool", self.pool_features),
        )
        return jnp.concatenate(branches, axis=-1)


class Reduction6(nn.Module):
    """The reduction from 35 x 35 to 17 x 17 pixels."""

    @nn.compact
    def __call__(self, x: FeatureMap) -> AnySize:
        double = units(x, "branch3x3dbl", (64, (1, 1)), (96, (3, 3)))
        branches = (
            unit(x, "branch3x3", 384, (3, 3), stride=2),
            unit(double, "branch3x3dbl_3", 96, (3, 3), stride=2),
            halve(x),
        )
        return jnp.concatenate(branches, axis=-1)


class Mixed6(nn.Module):
    """The block at 17 x 17 pixels, with 7x7 convolutions split into rows and columns."""

    inner: int
    """The number of features between the convolutions."""

    @nn.compact
    def __call__(self, x: FeatureMap) -> SameSize:
        n, row, column = self.inner, (1, 7), (7, 1)
        branches = (
            unit(x, "branch1x1", 192),
            units(x, "branch7x7", (n, (1, 1)), (n, row), (192, column)),
            units(x, "branch7x7dbl", (n, (1, 1)), (n, column), (n, row), (n, column), (192, row)),
            unit(average(x), "branch_pool", 192),
        )
        return jnp.concatenate(branches, axis=-1)


class Reduction7(nn.Module):
    """The reduction from 17 x 17 to 8 x 8 pixels."""

    @nn.compact
    def __call__(self, x: FeatureMap) -> AnySize:
        small = units(x, "branch3x3", (192, (1, 1)))
        large = units(x, "branch7x7x3", (192, (1, 1)), (192, (1, 7)), (192, (7, 1)))
        branches = (
            unit(small, "branch3x3_2", 320, (3, 3), stride=2),
            unit(large, "branch7x7x3_4", 192, (3, 3), stride=2),
            halve(x),
        )
        return jnp.concatenate(branches, axis=-1)


class Mixed7(nn.Module):
    """The block at 8 x 8 pixels, with 3x3 convolutions that end in a row and a column side by side."""

    max_pool: bool

    @nn.compact
    def __call__(self, x: FeatureMap) -> SameSize:
        small = units(x, "branch3x3", (384, (1, 1)))
        double = units(x, "branch3x3dbl", (448, (1, 1)), (384, (3, 3)))
        pooled = nn.max_pool(x, (3, 3), padding="SAME") if self.max_pool else average(x)
        branches = (
            unit(x, "branch1x1", 320),
            unit(small, "branch3x3_2a", 384, (1, 3)),
            unit(small, "branch3x3_2b", 384, (3, 1)),
            unit(double, "branch3x3dbl_3a", 384, (1, 3)),
            unit(double, "branch3x3dbl_3b", 384, (3, 1)),
            unit(pooled, "branch_pool", 192),
        )
        return jnp.concatenate(branches, axis=-1)


def resize(x: FeatureMap, size: int = INPUT_SIZE) -> Float[Array, "batch {size} {size} channels"]:
    """Applies TensorFlow 1's bilinear resize to size x size: pixel i reads from i * in / out, without antialiasing.

    There is no offset of half a pixel. Each operation is TensorFlow's, in float32.
    """
    return _resize_axis(_resize_axis(x, 2, size), 1, size)


def _resize_axis(x: FeatureMap, axis: int, size: int) -> Float[Array, "batch _ _ channels"]:
    length = x.shape[axis]
    position = np.arange(size, dtype=np.float32) * np.float32(length / size)
    low = position.astype(np.int32)
    high = np.minimum(low + 1, length - 1)
    fraction = jnp.asarray(position - low.astype(np.float32), x.dtype).reshape((-1,) + (1,) * (x.ndim - 1 - axis))
    below, above = jnp.take(x, low, axis), jnp.take(x, high, axis)
    return below + (above - below) * fraction.reshape((1,) * axis + fraction.shape)


def param_shapes() -> dict[str, tuple[int, ...]]:
    """Returns the shape of each parameter by its path, such as `Mixed_5b/branch1x1/kernel`."""
    x = jax.ShapeDtypeStruct((1, INPUT_SIZE, INPUT_SIZE, 3), jnp.float32)
    tree: Any = jax.eval_shape(Inception().init, jax.random.key(0), x)["params"]
    flat: dict[str, Any] = flatten_dict(tree, sep="/")
    return {name: leaf.shape for name, leaf in flat.items()}


@functools.cache
def published_shapes() -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array of the published weights by name, such as `Mixed_5b.branch1x1.conv.weight`.

    The axes are in PyTorch's order.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path, shape in param_shapes().items():
        layer, leaf = path.rsplit("/", 1)
        name = layer.replace("/", ".")
        if layer == "fc":
            shapes[f"fc.{'weight' if leaf == 'kernel' else 'bias'}"] = shape[::-1]
        elif leaf == "kernel":
            height, width, inputs, outputs = shape
            shapes[f"{name}.conv.weight"] = (outputs, inputs, height, width)
        else:
            shapes |= {f"{name}.bn.{each}": shape for each in ("weight", "bias", "running_mean", "running_var")}
    return shapes


def params_from_published(weights: Mapping[str, Shaped[np.ndarray, "..."]]) -> dict[str, Any]:
    """Converts the published weights to parameters of the network, and folds in batch normalisation in float64.

    Raises:
        ValueError: if an array is missing, unknown or of another shape.
    """
    arrays = {name: w for name, w in weights.items() if not name.endswith("num_batches_tracked")}
    got, wanted = {name: np.shape(w) for name, w in arrays.items()}, published_shapes()
    wrong = sorted(name for name in got.keys() | wanted.keys() if got.get(name) != wanted.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"these are not the weights of Inception-2015-12-05: {name} has shape {got.get(name, 'none')}, "
            f"not {wanted.get(name, 'none')}; {len(wrong)} arrays differ"
        )
    params = {"fc/kernel": arrays["fc.weight"].T, "fc/bias": arrays["fc.bias"]}
    for name in arrays:
        if layer := re.fullmatch(r"(.*)\.conv\.weight", name):
            kernel, bias = _folded(arrays, layer[1])
            path = layer[1].replace(".", "/")
            params |= {f"{path}/kernel": kernel, f"{path}/bias": bias}
    return unflatten_dict({path: np.ascontiguousarray(leaf, np.float32) for path, leaf in params.items()}, sep="/")


def _folded(weights: Mapping[str, np.ndarray], layer: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the kernel [height, width, in, out] and the bias of a convolution and its batch normalisation."""
    normal = {key: weights[f"{layer}.bn.{key}"].astype(np.float64) for key in ("weight", "running_var")}
    scale = normal["weight"] / np.sqrt(normal["running_var"] + BATCH_NORM_EPSILON)
    kernel = weights[f"{layer}.conv.weight"].transpose(2, 3, 1, 0) * scale
    return kernel, weights[f"{layer}.bn.bias"] - weights[f"{layer}.bn.running_mean"] * scale
