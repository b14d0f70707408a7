"""The layers of NCSN++ and DDPM++ ([S21a] App. H).

Classes keep the published names, because parameters are stored under the class name and a count: so published
checkpoints load. Feature maps are [batch, height, width, channels], time embeddings [batch, embedding].
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from arrays import PerExample
from models import cpu_convolution  # noqa: F401  # changes how JAX lowers convolutions for CPUs
from models.resample import AnySize, FeatureMap, SameSize, Taps, conv_downsample, downsample, upsample, upsample_conv

Embedding: TypeAlias = Float[Array, "batch embedding"]
GroupMean: TypeAlias = Float[Array, "batch 1 1 channels"]
"""One number for each channel, the same for the channels of a group."""
Nonlinearity: TypeAlias = Callable[[Array], Array]
Normalization: TypeAlias = Callable[[], Callable[[FeatureMap], FeatureMap]]
"""Builds a layer that normalises feature maps, e.g. a module class. Each layer has its own parameters."""


@jax.custom_jvp
def _swish(x: Array) -> Array:
    """x sigmoid(x). Each of its first three derivatives is a function of x alone, so a backward pass saves only x.

    The sigmoid has another form here than in the derivatives: if XLA recognised that they are the same, it would save
    the sigmoid, as large as x, for the backward pass. The derivatives have no hyperbolic tangent: with it, programs for
    GPUs store more, and need 10 % more memory at order 3.
    """
    small = jnp.exp(-jnp.abs(x))
    return jnp.where(x < 0, x * small, x) / (1 + small)


@jax.custom_jvp
def _first_derivative(x: Array) -> Array:
    s = jax.nn.sigmoid(x)
    return s * (1 + x * (1 - s))


@jax.custom_jvp
def _second_derivative(x: Array) -> Array:
    s = jax.nn.sigmoid(x)
    return s * (1 - s) * (2 + x * (1 - 2 * s))


def _third_derivative(x: Array) -> Array:
    s = jax.nn.sigmoid(x)
    slope, odd = s * (1 - s), 1 - 2 * s
    return slope * (odd * (3 + x * odd) - 2 * x * slope)


_swish.defjvps(lambda tangent, _, x: tangent * _first_derivative(x))
_first_derivative.defjvps(lambda tangent, _, x: tangent * _second_derivative(x))
_second_derivative.defjvps(lambda tangent, _, x: tangent * _third_derivative(x))

swish = jax.jit(_swish)
"""x sigmoid(x), traced once for each shape, as `group_norm` is."""

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
    features: int, size: int = 3, stride: int = 1, init_scale: float = 1.0, gain: float = 1.0
) -> Callable[[FeatureMap], Float[Array, "batch _ _ {features}"]]:
    """A convolution whose result is multiplied by `gain`, in the precision of the feature maps."""
    return Conv(features, size, stride, init_scale, gain)


class Conv(nn.Module):
    """A convolution with zero padding. See `conv`."""

    features: int
    size: int
    stride: int
    init_scale: float
    gain: float

    @nn.compact
    def __call__(self, x: FeatureMap) -> AnySize:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.gain * self.param("kernel", kernel_init(self.init_scale), shape)
        bias = self.gain * self.param("bias", nn.initializers.zeros, (self.features,))
        strides, numbers = (self.stride, self.stride), ("NHWC", "HWIO", "NHWC")
        h = lax.conv_general_dilated(x, kernel.astype(x.dtype), strides, "SAME", dimension_numbers=numbers)
        return h + _per_channel(bias, h).astype(x.dtype)


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He, 2018): at most 32 groups of equal size, each of at least 4 channels.

    `groups` sets another number of groups, which must divide the channels.

    Pixels are averaged first, and the rest works on one number for each channel: this makes third derivatives cheaper.
    The result is one multiplication and one addition for each pixel, and derivatives of the moments are averages of
    products with x, so a backward pass needs x only. Moments are 32-bit floats even for 16-bit feature maps.
    """

    epsilon: float = 1e-6
    groups: int | None = None

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        return group_norm(x, scale, bias, self.groups or num_groups(channels), self.epsilon)


@functools.partial(jax.jit, static_argnums=(3, 4))
def group_norm(
    x: FeatureMap, scale: Float[Array, " channels"], bias: Float[Array, " channels"], groups: int, epsilon: float
) -> FeatureMap:
    """Normalises the groups of channels of each example, then multiplies and shifts each channel.

    With `jax.jit`, JAX traces and differentiates this function once for each shape, not for each layer, so order 3 is
    traced faster. XLA inlines it. It also changes what JAX saves in recomputed blocks; see docs/results/cost.md.
    """
    precision = x.dtype
    x = x.astype(jnp.promote_types(precision, jnp.float32))
    mean, variance = _group_moments(x, groups)
    factor = jax.lax.rsqrt(variance + epsilon) * _per_channel(scale, x)
    return (x * factor + (_per_channel(bias, x) - mean * factor)).astype(precision)


def num_groups(channels: int) -> int:
    """The largest number of groups that divides the channels, within the limits of `GroupNorm`."""
    most = max(1, min(channels // 4, 32))
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


def _per_channel(values: Float[Array, " channels"], like: Array) -> Array:
    """Reshapes one number for each channel so that it broadcasts against `like`."""
    return values.reshape((1,) * (like.ndim - 1) + values.shape)


def _group_mean(x: FeatureMap, groups: int) -> GroupMean:
    """The mean over pixels and the channels of a group, for each channel."""
    batch, _, _, channels = x.shape
    means = x.mean((1, 2)).reshape(batch, groups, -1).mean(2)
    return jnp.repeat(means, channels // groups, axis=1)[:, None, None, :]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _group_moments(x: FeatureMap, groups: int) -> tuple[GroupMean, GroupMean]:
    """The mean and the variance over pixels and the channels of a group, for each channel."""
    # One pass over the pixels gives both. The second moment is about the first pixel, because about zero the variance
    # of values far from zero would cancel.
    anchor = _group_mean(x[:, :1, :1], groups)
    mean = _group_mean(x, groups)
    variance = _group_mean(jnp.square(x - anchor), groups) - jnp.square(mean - anchor)
    return mean, jnp.maximum(variance, 0)


@_group_moments.defjvp
def _group_moments_jvp(
    groups: int, primals: tuple[FeatureMap], tangents: tuple[FeatureMap]
) -> tuple[tuple[GroupMean, GroupMean], tuple[GroupMean, GroupMean]]:
    (x,), (tangent,) = primals, tangents
    mean, variance = _group_moments(x, groups)
    # The product comes first. Then XLA stores the gradient of x once, because the last terms added to it are products.
    product = _group_mean(x * tangent, groups)
    mean_tangent = _group_mean(tangent, groups)
    covariance = product - mean * mean_tangent
    return (mean, variance), (mean_tangent, 2 * covariance)


def residual_gain(rescale: bool) -> float:
    """The factor of both terms of a residual sum: 1 / sqrt(2) if `rescale`, which keeps the variance; otherwise 1.

    Layers multiply their weights by it. If the sum were multiplied instead, XLA would store or compute it twice.
    """
    return math.sqrt(0.5) if rescale else 1.0


def residual_sum(x: FeatureMap, h: FeatureMap, rescale: bool) -> FeatureMap:
    """x + h, divided by sqrt(2) if `rescale`, which keeps the variance."""
    return residual_gain(rescale) * x + residual_gain(rescale) * h


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
    """The same linear map at every pixel, with its result multiplied by `gain`."""

    features: int
    init_scale: float = 0.1
    gain: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weight = self.gain * self.param("W", kernel_init(self.init_scale), (x.shape[-1], self.features))
        bias = self.gain * self.param("b", nn.initializers.zeros, (self.features,))
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


class Dropout(nn.Module):
    """Sets each value to 0 with probability `rate` in training, and divides the others by 1 - rate.

    A backward pass saves the random numbers, so there are only 8 bits for each value. Few rates are multiples of
    1 / 256: for each channel of each example, the rate is rounded to one at random, so that `rate` is its mean.
    """

    rate: float

    @nn.compact
    def __call__(self, x: FeatureMap, train: bool) -> FeatureMap:
        if not train or not self.rate:
            return x
        bits_key, rounding_key = jax.random.split(self.make_rng("dropout"))
        size = math.prod(x.shape[1:])
        words = jax.random.bits(bits_key, (len(x), -(-size // 4)), jnp.uint32)
        numbers = lax.bitcast_convert_type(words, jnp.uint8).reshape(len(x), -1)[:, :size].reshape(x.shape)
        rounding = jax.random.uniform(rounding_key, (len(x), 1, 1, x.shape[-1]))
        kept = numbers < jnp.floor((1 - self.rate) * 256 + rounding).astype(jnp.uint16)
        return jnp.where(kept, x / (1 - self.rate), 0)


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
        h = attention(NIN(channels)(h), NIN(channels)(h), NIN(channels)(h))
        gain = residual_gain(self.skip_rescale)
        return gain * x + NIN(channels, init_scale=self.init_scale, gain=gain)(h).reshape(x.shape)


@jax.jit
def attention(
    query: Float[Array, "batch q channels"], key: Float[Array, "batch k channels"], value: Float[Array, "batch k _"]
) -> Float[Array, "batch q _"]:
    """Returns means of the values with weights softmax(query.key / sqrt(channels)). Sums have at least 32 bits."""
    precision = jnp.promote_types(query.dtype, jnp.float32)
    scaled = query / math.sqrt(query.shape[-1])
    logits = jnp.einsum("bqc,bkc->bqk", scaled, key, preferred_element_type=precision)
    weights = jnp.exp(logits - lax.stop_gradient(logits).max(-1, keepdims=True))
    # The means are divided, not the weights, of which there are more.
    total = weights.sum(-1, keepdims=True)
    sums = jnp.einsum("bqk,bkc->bqc", weights.astype(value.dtype), value, preferred_element_type=precision)
    return (sums / total).astype(value.dtype)


class _ResnetBlock(nn.Module):
    """The common fields of the residual blocks, and their residual branch, with the gain of a residual sum."""

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
        h = Dropout(self.dropout)(h, train)
        return conv(features, init_scale=self.init_scale, gain=residual_gain(self.skip_rescale))(h)


class ResnetBlockDDPMpp(_ResnetBlock):
    """The residual block of DDPM ([H20] App. B)."""

    @nn.compact
    def __call__(self, x: FeatureMap, embedding: Embedding | None, train: bool) -> SameSize:
        gain = residual_gain(self.skip_rescale)
        h = self.branch(x, embedding, train, resample=lambda x: x)
        if x.shape[-1] != h.shape[-1]:
            return NIN(h.shape[-1], gain=gain)(x) + h
        return gain * x + h


class ResnetBlockBigGANpp(_ResnetBlock):
    """The residual block of BigGAN (Brock et al., 2019), which can resample inside."""

    # A function of models/resample.py; None keeps the resolution.
    resample: Callable[[FeatureMap, Taps | None], AnySize] | None = None
    taps: Taps | None = None

    @nn.compact
    def __call__(self, x: FeatureMap, embedding: Embedding | None, train: bool) -> AnySize:
        gain = residual_gain(self.skip_rescale)
        h = self.branch(x, embedding, train, self._resample)
        x = self._resample(x)
        if x.shape[-1] != h.shape[-1] or self.resample is not None:
            return conv(h.shape[-1], size=1, gain=gain)(x) + h
        return gain * x + h

    def _resample(self, x: FeatureMap) -> Float[Array, "batch _ _ channels"]:
        return x if self.resample is None else self.resample(x, self.taps)
