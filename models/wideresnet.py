"""The classifier of noisy images that guides samples towards a class ([S21a] App. I.1).

It is a wide residual network (Zagoruyko & Komodakis, 2016) with group normalisation, conditioned on the noise level.
Parameters have the published names, so that published checkpoints load.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from arrays import Batch, PerExample, append_dims
from models.layers import Embedding, GaussianFourierProjection, GroupNorm
from models.resample import AnySize, FeatureMap
from sde_lib import SDE

Logits = Float[Array, "batch classes"]

EMBEDDING = 128
"""Frequencies of the embedding of the noise level."""


class WideResnet(nn.Module):
    """Three groups of residual blocks; the second and the third halve the resolution.

    The published network has 4 blocks in a group and channel multiplier 10: 38.9 million parameters for 10 classes.
    """

    num_outputs: int
    blocks_per_group: int = 4
    channel_multiplier: int = 10

    @nn.compact
    def __call__(self, x: FeatureMap, sigmas: PerExample) -> Logits:
        """Returns the logits of images with noise of standard deviation `sigmas`, which must be positive."""
        x = _standardize(x)
        embedding = GaussianFourierProjection(EMBEDDING, scale=16.0)(jnp.log(sigmas))
        embedding = nn.Dense(4 * EMBEDDING)(embedding)
        embedding = nn.Dense(4 * EMBEDDING)(nn.swish(embedding))
        x = _conv(16, "init_conv")(x)
        for number in range(3):
            channels, stride = 16 * 2**number * self.channel_multiplier, 1 if number == 0 else 2
            x = WideResnetGroup(self.blocks_per_group, channels, stride, activate_first=number == 0)(x, embedding)
        x = nn.relu(GroupNorm(name="pre-pool-bn")(x))
        return nn.Dense(self.num_outputs)(x.mean((1, 2)))


class WideResnetGroup(nn.Module):
    """Blocks of equal width, of which the first changes the resolution and the width."""

    blocks: int
    channels: int
    stride: int
    activate_first: bool

    @nn.compact
    def __call__(self, x: FeatureMap, embedding: Embedding) -> AnySize:
        for number in range(self.blocks):
            stride, activate = (self.stride, self.activate_first) if number == 0 else (1, False)
            x = WideResnetBlock(self.channels, stride, activate)(x, embedding)
        return x


class WideResnetBlock(nn.Module):
    """Two convolutions on a residual branch; the embedding shifts the channels between them.

    With `activate_shortcut`, the shortcut starts after the first activation, as the branch does.
    """

    channels: int
    stride: int
    activate_shortcut: bool

    @nn.compact
    def __call__(self, x: FeatureMap, embedding: Embedding) -> AnySize:
        h = nn.relu(GroupNorm(name="init_bn")(x))
        shortcut = h if self.activate_shortcut else x
        h = _conv(self.channels, "conv1", self.stride)(h)
        h += nn.Dense(self.channels)(nn.swish(embedding))[:, None, None, :]
        h = nn.relu(GroupNorm(name="bn_2")(h))
        h = _conv(self.channels, "conv2")(h)
        return h + _shortcut(shortcut, h.shape[-1], self.stride)


def _shortcut(x: FeatureMap, channels: int, stride: int) -> AnySize:
    """Averages pixels if the resolution falls, and appends channels of zeros if the width grows."""
    if stride > 1:
        # An odd size is rounded up, as by the convolution beside it.
        x = nn.avg_pool(x, (stride, stride), (stride, stride), "SAME", count_include_pad=False)
    return jnp.pad(x, [(0, 0), (0, 0), (0, 0), (0, channels - x.shape[-1])])


def _conv(channels: int, name: str, stride: int = 1) -> nn.Conv:
    init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    return nn.Conv(channels, (3, 3), (stride, stride), use_bias=False, kernel_init=init, name=name)


def _standardize(x: FeatureMap) -> FeatureMap:
    """Returns each image with mean 0 and standard deviation 1 over all its pixels and channels."""
    mean, std = (moment(x, axis=(1, 2, 3), keepdims=True) for moment in (jnp.mean, jnp.std))
    return (x - mean) / jnp.maximum(std, 1 / math.sqrt(x[0].size))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("params", "mean", "std"), meta_fields=("network", "sde")
)
@dataclasses.dataclass(frozen=True)
class NoisyClassifier:
    """Logits of ln p_t(class | x) for an SDE, as a pytree that holds the parameters.

    The network sees x / alpha, which is the image with noise of standard deviation sigma / alpha. For VE, this is the
    published form; for other SDEs, the published code passes sigma, which does not say how noisy x is.

    Attributes:
        mean, std: for each channel of the score network's data. `network` sees images that are normalised by them.
    """

    params: Any
    network: WideResnet
    sde: SDE
    mean: Float[Array, " channels"]
    std: Float[Array, " channels"]

    def __call__(self, x: Batch, t: PerExample) -> Logits:
        image = x / append_dims(self.sde.alpha_sigma(t)[0], x)
        normalized = (image - _per_channel(self.mean, x)) / _per_channel(self.std, x)
        logits: Any = self.network.apply({"params": self.params}, normalized, jnp.exp(self.sde.log_noise_level(t)))
        return logits


def _per_channel(values: Float[Array, " channels"], x: Batch) -> Float[Array, "1 1 1 channels"]:
    return jnp.asarray(values).reshape((1,) * (x.ndim - 1) + (-1,))
