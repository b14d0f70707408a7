"""Doubling and halving the resolution of images: by repeating and averaging, or with a smoothing FIR filter.

The filter is separable, so resampling is one small matrix for each of the two image axes. On a CPU that is far cheaper
than a depthwise convolution, above all in the higher derivatives; on a GPU it is a batched matrix product.
Source of the filtered forms: Karras et al., StyleGAN2 (2020), upfirdn.
"""

from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

FeatureMap: TypeAlias = Float[Array, "batch height width channels"]
"""Feature maps. All of them in one signature have the same shape."""
SameSize: TypeAlias = Float[Array, "batch height width _"]
"""Feature maps of the same height and width, with any number of channels."""
AnySize: TypeAlias = Float[Array, "batch _ _ _"]
"""Feature maps of any height, width and number of channels."""
Projected: TypeAlias = Float[Array, "batch height width {features}"]
"""Feature maps with `features` channels, an argument of the function that returns them."""
Doubled: TypeAlias = Float[Array, "batch 2*height 2*width channels"]
Halved: TypeAlias = Float[Array, "batch height//2 width//2 channels"]
Weight: TypeAlias = Float[Array, "size size channels features"]

Taps: TypeAlias = tuple[float, ...]
"""A one-dimensional FIR filter, up to its scale."""


def upsample(x: FeatureMap, taps: Taps | None) -> Doubled:
    """Twice the height and width; `taps` None repeats every pixel."""
    if taps is None:
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    excess = len(taps) - 2
    # One more at the end: the zero that follows the last pixel.
    return _filter(x, taps, up=2, pad=((excess + 1) // 2 + 1, excess // 2 + 1))


def downsample(x: FeatureMap, taps: Taps | None) -> Halved:
    """Half the height and width, which are even; `taps` None averages squares of four pixels."""
    if taps is None:
        batch, height, width, channels = x.shape
        return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))
    excess = len(taps) - 2
    return _filter(x, taps, down=2, pad=((excess + 1) // 2, excess // 2))


def upsample_conv(x: FeatureMap, weight: Weight, taps: Taps) -> Float[Array, "batch 2*height 2*width features"]:
    """Filtered upsampling joined with a convolution, so that the image's border is padded once.

    The published code applies a transposed convolution, and then the filter. Here the filter comes first, with enough
    padding that the convolution needs none. The result is the same, and the convolution does not process inserted
    zeros.
    """
    size = weight.shape[0]
    excess = len(taps) - 1 - size
    pad = ((excess + 1) // 2 + size, excess // 2 + size)
    return _valid_conv(_filter(x, taps, up=2, pad=pad), weight, stride=1)


def conv_downsample(x: FeatureMap, weight: Weight, taps: Taps) -> Float[Array, "batch height//2 width//2 features"]:
    """A convolution joined with filtered downsampling, so that the image's border is padded once."""
    excess = len(taps) + weight.shape[0] - 3
    return _valid_conv(_filter(x, taps, pad=((excess + 1) // 2, excess // 2)), weight, stride=2)


def _valid_conv(x: FeatureMap, weight: Weight, stride: int) -> Float[Array, "batch _ _ features"]:
    return lax.conv_general_dilated(x, weight, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _filter(
    x: FeatureMap, taps: Taps, pad: tuple[int, int], up: int = 1, down: int = 1
) -> Float[Array, "batch _ _ channels"]:
    """Inserts up - 1 zeros between pixels, pads with zeros, convolves with the filter, keeps every down-th pixel."""
    rows = _filter_matrix(x.shape[1], taps, pad, up, down)
    columns = _filter_matrix(x.shape[2], taps, pad, up, down)
    x = jnp.einsum("oh,bhwc->bowc", rows.astype(x.dtype), x)
    return jnp.einsum("ow,bhwc->bhoc", columns.astype(x.dtype), x)


def _filter_matrix(length: int, taps: Taps, pad: tuple[int, int], up: int, down: int) -> np.ndarray:
    """The matrix of `_filter` along one axis. Upsampling keeps the mean, so its taps add up to `up`, not to 1."""
    normalized = np.asarray(taps, np.float64) * up / np.sum(taps)
    padded = up * (length - 1) + 1 + sum(pad)
    matrix = np.zeros(((padded - len(taps)) // down + 1, length))
    for output in range(len(matrix)):
        for k, tap in enumerate(normalized[::-1]):
            pixel, inserted = divmod(output * down + k - pad[0], up)
            if not inserted and 0 <= pixel < length:
                matrix[output, pixel] += tap
    return matrix
