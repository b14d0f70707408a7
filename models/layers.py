"""The layers of NCSN++ and DDPM++ ([S21a] App. H).

Classes keep the published names, because parameters are stored under the class name and a count: so published
checkpoints load. Feature maps are [batch, height, width, channels], time embeddings [batch, embedding].
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from arrays import PerExample
from models.resample import AnySize, FeatureMap, SameSize, Taps, conv_downsample, downsample, upsample, upsample_conv

Embedding: TypeAlias = Float[Array, "batch embedding"]
Nonlinearity: TypeAlias = Callable[[Array], Array]
Normalization: TypeAlias = Callable[[], Callable[[FeatureMap], FeatureMap]]
"""Builds a layer that normalises feature maps, e.g. a module class. Each layer has its own parameters."""


@jax.custom_jvp
def swish(x: Array) -> Array:
    """x sigmoid(x). Each of its first three derivatives is a function of x alone, so a backward pass saves only x.

    The derivatives have the sigmoid in another form, 0.5 (1 + tanh(x / 2)). XLA would save the sigmoid of the forward
    pass, as large as x, if it recognised it in the backward pass.
    """
    return x * jax.nn.sigmoid(x)


@jax.custom_jvp
def _first_derivative(x: Array) -> Array:
    s = _sigmoid(x)
    return s * (1 + x * (1 - s))


@jax.custom_jvp
def _second_derivative(x: Array) -> Array:
    s = _sigmoid(x)
    return s * (1 - s) * (2 + x * (1 - 2 * s))


def _third_derivative(x: Array) -> Array:
    s = _sigmoid(x)
    slope, odd = s * (1 - s), 1 - 2 * s
    return slope * (odd * (3 + x * odd) - 2 * x * slope)


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + jnp.tanh(0.5 * x))


swish.defjvps(lambda tangent, _, x: tangent * _first_derivative(x))
_first_derivative.defjvps(lambda tangent, _, x: tangent * _second_derivative(x))
_second_derivative.defjvps(lambda tangent, _, x: tangent * _third_derivative(x))

NONLINEARITIES: dict[str, Nonlinearity] = {
    "swish": swish,
    "elu": nn.elu,
    "relu": nn.relu,
    "lrelu": lambda x: nn.leaky_relu(x, negative_slope=0.2),
}


def kernel_init(scale: float = 1.0) -> nn.initializers.Initializer:
    """Uniform with variance scale / mean of fan-in and fan-out. Scale 0 means nearly 0, so that gradients flow."""

    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        pixels, size = math.prod(shape[:-2]), math.prod(shape)
        variance = (scale or 1e-10) * 2 / (pixels * (shape[-2] + shape[-1]))
        # Sizes are powers of two, so that few programs are compiled for the many shapes of a network.
        drawn = jax.random.uniform(key, (1 << (size - 1).bit_length(),), dtype, -1, 1)
        return math.sqrt(3 * variance) * drawn[:size].reshape(shape)

    return init


def conv(
    features: int, size: int = 3, stride: int = 1, init_scale: float = 1.0
) -> Callable[[FeatureMap], Float[Array, "batch _ _ {features}"]]:
    """A convolution, in the precision of the feature maps that it is applied to."""

    def apply(x: FeatureMap) -> AnySize:
        init = kernel_init(init_scale)
        return nn.Conv(features, (size, size), (stride, stride), kernel_init=init, dtype=x.dtype)(x)

    return apply


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He, 2018): at most 32 groups of equal size, each of at least 4 channels.

    `groups` sets another number of groups, which must divide the channels.

    Pixels are averaged first, and the rest works on one number for each channel: this makes third derivatives cheaper.
    The result is one multiplication and one addition for each pixel, so a backward pass needs x only. Moments are
    32-bit floats even for 16-bit feature maps.
    """

    epsilon: float = 1e-6
    groups: int | None = None

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        groups, precision = self.groups or num_groups(channels), x.dtype
        x = x.astype(jnp.promote_types(precision, jnp.float32))
        # One pass over the pixels gives both moments. They are moments about the first pixel: about zero, the variance
        # of values far from zero would cancel.
        anchor = jax.lax.stop_gradient(_group_mean(x[:, :1, :1], groups))
        offset = _group_mean(x - anchor, groups)
        variance = jnp.maximum(_group_mean(jnp.square(x - anchor), groups) - jnp.square(offset), 0)
        mean = anchor + offset
        factor = jax.lax.rsqrt(variance + self.epsilon) * _per_channel(scale, x)
        return (x * factor + (_per_channel(bias, x) - mean * factor)).astype(precision)


def num_groups(channels: int) -> int:
    """The largest number of groups that divides the channels, within the limits of `GroupNorm`."""
    most = max(1, min(channels // 4, 32))
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


def _per_channel(values: Float[Array, " channels"], like: Array) -> Array:
    """Reshapes one number for each channel so that it broadcasts against `like`."""
    return values.reshape((1,) * (like.ndim - 1) + values.shape)


def _group_mean(x: FeatureMap, groups: int) -> Float[Array, "batch 1 1 channels"]:
    """The mean over pixels and the channels of a group, for each channel."""
    batch, _, _, channels = x.shape
    means = x.mean((1, 2)).reshape(batch, groups, -1).mean(2)
    return jnp.repeat(means, channels // groups, axis=1)[:, None, None, :]


def residual_sum(x: FeatureMap, h: FeatureMap, rescale: bool) -> FeatureMap:
    """x + h, divided by sqrt(2) if `rescale`, which keeps the variance."""
    return (x + h) * math.sqrt(0.5) if rescale else x + h


def positional_embedding(times: PerExample, size: int, max_period: float = 10_000.0) -> Embedding:
    """Sines and cosines of `times` at size / 2 frequencies, from 1 down to 1 / max_period in geometric steps."""
    half = size // 2
    frequencies = jnp.exp(-math.log(max_period) / (half - 1) * jnp.arange(half))
    angles = times[:, None] * frequencies[None, :]
    embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
    return jnp.pad(embedding, ((0, 0), (0, size % 2)))


class GaussianFourierProjection(nn.Module):
    """Sines and cosines of a scalar at `size` fixed random frequencies (Tancik et al., 2020)."""

    size: int
    scale: float

    @nn.compact
    def __call__(self, x: PerExample) -> Embedding:
        frequencies = self.param("W", nn.initializers.normal(self.scale), (self.size,))
        angles = 2 * math.pi * x[:, None] * jax.lax.stop_gradient(frequencies)[None, :]
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


class NIN(nn.Module):
    """The same linear map at every pixel."""

    features: int
    init_scale: float = 0.1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weight = self.param("W", kernel_init(self.init_scale), (x.shape[-1], self.features))
        bias = self.param("b", nn.initializers.zeros, (self.features,))
        return x @ weight.astype(x.dtype) + _per_channel(bias, x).astype(x.dtype)


class Conv2d(nn.Module):
    """A 3x3 convolution joined with filtered resampling."""

    features: int
    taps: Taps
    resample: Callable[[FeatureMap, Array, Taps], AnySize]

    @nn.compact
    def __call__(self, x: FeatureMap) -> AnySize:
        weight = self.param("weight", kernel_init(), (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return self.resample(x, weight.astype(x.dtype), self.taps) + _per_channel(bias, x).astype(x.dtype)


class Downsample(nn.Module):
    """Halves the resolution, with a convolution to `features` channels (None: without)."""

    features: int | None
    taps: Taps | None

    @nn.compact
    def __call__(self, x: FeatureMap) -> Float[Array, "batch height//2 width//2 _"]:
        if self.features is None:
            return downsample(x, self.taps)
        if self.taps is None:
            return conv(self.features, stride=2)(x)
        return Conv2d(self.features, self.taps, conv_downsample)(x)


class Upsample(nn.Module):
    """Doubles the resolution, with a convolution to `features` channels (None: without)."""

    features: int | None
    taps: Taps | None

    @nn.compact
    def __call__(self, x: FeatureMap) -> Float[Array, "batch 2*height 2*width _"]:
        if self.features is None:
            return upsample(x, self.taps)
        if self.taps is None:
            return conv(self.features)(upsample(x, None))
        return Conv2d(self.features, self.taps, upsample_conv)(x)


class Combine(nn.Module):
    """Maps an input pyramid to the channels of the feature maps and joins the two."""

    method: str  # sum or cat

    @nn.compact
    def __call__(self, pyramid: SameSize, h: FeatureMap) -> SameSize:
        pyramid = conv(h.shape[-1], size=1)(pyramid)
        return pyramid + h if self.method == "sum" else jnp.concatenate([pyramid, h], axis=-1)


class AttnBlockpp(nn.Module):
    """Self-attention between all pixels, one head, on a residual branch."""

    init_scale: float
    skip_rescale: bool
    normalize: Normalization = GroupNorm

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        channels = x.shape[-1]
        h = self.normalize()(x).reshape(len(x), -1, channels)
        query, key, value = NIN(channels)(h), NIN(channels)(h), NIN(channels)(h)
        precision = jnp.promote_types(x.dtype, jnp.float32)
        logits = jnp.einsum("bqc,bkc->bqk", query, key, preferred_element_type=precision) / math.sqrt(channels)
        h = jnp.einsum("bqk,bkc->bqc", jax.nn.softmax(logits).astype(x.dtype), value)
        h = NIN(channels, init_scale=self.init_scale)(h)
        return residual_sum(x, h.reshape(x.shape), self.skip_rescale)


class _ResnetBlock(nn.Module):
    """The common fields of the residual blocks, and their residual branch."""

    nonlinearity: Nonlinearity
    dropout: float
    init_scale: float
    skip_rescale: bool
    features: int | None = None  # channels of the output; None: as many as the input has
    normalize: Normalization = GroupNorm

    def branch(
        self, x: FeatureMap, embedding: Embedding | None, train: bool, resample: Callable[[FeatureMap], AnySize]
    ) -> AnySize:
        """Two convolutions; the time embedding shifts the channels between them."""
        features = self.features or x.shape[-1]
        h = resample(self.nonlinearity(self.normalize()(x)))
        h = conv(features)(h)
        if embedding is not None:
            shift = nn.Dense(features, kernel_init=kernel_init())(self.nonlinearity(embedding))
            h += shift.astype(h.dtype)[:, None, None, :]
        h = self.nonlinearity(self.normalize()(h))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        return conv(features, init_scale=self.init_scale)(h)


class ResnetBlockDDPMpp(_ResnetBlock):
    """The residual block of DDPM ([H20] App. B)."""

    @nn.compact
    def __call__(self, x: FeatureMap, embedding: Embedding | None, train: bool) -> SameSize:
        h = self.branch(x, embedding, train, resample=lambda x: x)
        if x.shape[-1] != h.shape[-1]:
            x = NIN(h.shape[-1])(x)
        return residual_sum(x, h, self.skip_rescale)


class ResnetBlockBigGANpp(_ResnetBlock):
    """The residual block of BigGAN (Brock et al., 2019), which can resample inside."""

    # A function of models/resample.py; None keeps the resolution.
    resample: Callable[[FeatureMap, Taps | None], AnySize] | None = None
    taps: Taps | None = None

    @nn.compact
    def __call__(self, x: FeatureMap, embedding: Embedding | None, train: bool) -> AnySize:
        h = self.branch(x, embedding, train, self._resample)
        x = self._resample(x)
        if x.shape[-1] != h.shape[-1] or self.resample is not None:
            x = conv(h.shape[-1], size=1)(x)
        return residual_sum(x, h, self.skip_rescale)

    def _resample(self, x: FeatureMap) -> Float[Array, "batch _ _ channels"]:
        return x if self.resample is None else self.resample(x, self.taps)
