"""The blocks of NCSN and NCSNv2 (RefineNet (Lin et al., 2017); [SE19] App. A; [SE20]).

Residual blocks lower the resolution, or enlarge the receptive field by dilation. RefineNet blocks then combine the
feature maps of all resolutions. Classes keep the published names, because parameters are stored under the class name
and a count. NCSN tells all its blocks the noise level through their normalisation. The names of these blocks begin with
Cond.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.layers import Nonlinearity
from models.resample import AnySize, FeatureMap, SameSize, downsample

Normalize: TypeAlias = Callable[[FeatureMap], FeatureMap]
"""Normalises feature maps, with new parameters at each call, or returns them unchanged."""

INTERPOLATIONS: dict[str, str] = {"bilinear": "bilinear", "nearest_neighbor": "nearest"}
"""Names of `jax.image.resize` for methods of interpolation, by config.model.interpolation."""


def keep(x: FeatureMap) -> FeatureMap:
    """Returns its argument: a `Normalize` that does nothing."""
    return x


def conv(
    features: int, dilation: int = 1, bias: bool = True
) -> Callable[[FeatureMap], Float[Array, "batch height width {features}"]]:
    """A 3x3 convolution with initial weights and biases uniform within 1 / sqrt(number of inputs of an output)."""

    def apply(x: FeatureMap) -> SameSize:
        init = _uniform_within(1 / math.sqrt(9 * x.shape[-1]))
        dilations = (dilation, dilation)
        return nn.Conv(features, (3, 3), kernel_dilation=dilations, use_bias=bias, kernel_init=init, bias_init=init)(x)

    return apply


def _uniform_within(bound: float) -> Callable[..., Array]:
    def init(key: Array, shape: Sequence[int], dtype: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class ConvMeanPool(nn.Module):
    """A convolution, and then the mean over blocks of 2x2 pixels."""

    features: int
    size: int

    @nn.compact
    def __call__(self, x: FeatureMap) -> Float[Array, "batch height//2 width//2 {self.features}"]:
        return downsample(nn.Conv(self.features, (self.size, self.size))(x), None)


class ResidualBlock(nn.Module):
    """Two convolutions on a residual branch.

    A block with `down` changes the number of channels. Without dilation, it also halves the resolution.
    """

    features: int
    nonlinearity: Nonlinearity
    normalize: Normalize
    dilation: int = 1
    down: bool = False

    @nn.compact
    def __call__(self, x: FeatureMap) -> AnySize:
        h = conv(x.shape[-1], self.dilation)(self.nonlinearity(self.normalize(x)))
        h = self.nonlinearity(self.normalize(h))
        if not self.down:
            return conv(self.features, self.dilation)(h) + x
        if self.dilation > 1:
            return conv(self.features, self.dilation)(h) + conv(self.features, self.dilation)(x)
        return ConvMeanPool(self.features, 3)(h) + ConvMeanPool(self.features, 1)(x)


class RCUBlock(nn.Module):
    """Residual convolution units, which keep the number of channels."""

    units: int
    nonlinearity: Nonlinearity
    normalize: Normalize

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        for _ in range(self.units):
            h = conv(x.shape[-1], bias=False)(self.nonlinearity(self.normalize(x)))
            h = conv(x.shape[-1], bias=False)(self.nonlinearity(self.normalize(h)))
            x = x + h
        return x


class CRPBlock(nn.Module):
    """Chained residual pooling: adds maps that were pooled once and twice over 5x5 pixels."""

    nonlinearity: Nonlinearity
    normalize: Normalize

    pool: ClassVar[Callable[..., Array]] = staticmethod(nn.max_pool)

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        pooled = total = self.nonlinearity(x)
        for _ in range(2):
            pooled = self.pool(self.normalize(pooled), (5, 5), padding="SAME")
            pooled = conv(x.shape[-1], bias=False)(pooled)
            total = total + pooled
        return total


class MSFBlock(nn.Module):
    """Multi-resolution fusion: adds feature maps at the resolution of the first, with `features` channels."""

    features: int
    normalize: Normalize
    interpolation: str

    @nn.compact
    def __call__(self, maps: list[AnySize]) -> Float[Array, "batch _ _ {self.features}"]:
        fitted = [self._fit(conv(self.features)(self.normalize(h)), maps[0]) for h in maps]
        return functools.reduce(jnp.add, fitted)

    def _fit(self, h: AnySize, like: AnySize) -> AnySize:
        return jax.image.resize(h, (*like.shape[:3], self.features), INTERPOLATIONS[self.interpolation])


class RefineBlock(nn.Module):
    """Joins feature maps of several resolutions at the resolution of the first, with `features` channels.

    A single feature map keeps its channels. The last block of a network has more units at its end.
    """

    features: int
    nonlinearity: Nonlinearity
    normalize: Normalize
    interpolation: str
    last: bool = False

    rcu_block: ClassVar[type[RCUBlock]] = RCUBlock
    crp_block: ClassVar[type[CRPBlock]] = CRPBlock
    msf_block: ClassVar[type[MSFBlock]] = MSFBlock

    @nn.compact
    def __call__(self, maps: list[AnySize]) -> Float[Array, "batch _ _ {self.features}"]:
        maps = [self.rcu_block(2, self.nonlinearity, self.normalize)(h) for h in maps]
        h = maps[0]
        if len(maps) > 1:
            h = self.msf_block(self.features, self.normalize, self.interpolation)(maps)
        h = self.crp_block(self.nonlinearity, self.normalize)(h)
        return self.rcu_block(3 if self.last else 1, self.nonlinearity, self.normalize)(h)


class ConditionalResidualBlock(ResidualBlock):
    """The residual block of NCSN."""


class CondRCUBlock(RCUBlock):
    """The residual convolution units of NCSN."""


class CondCRPBlock(CRPBlock):
    """The chained residual pooling of NCSN, by means that include the zeros around the image."""

    pool = staticmethod(nn.avg_pool)


class CondMSFBlock(MSFBlock):
    """The multi-resolution fusion of NCSN."""


class CondRefineBlock(RefineBlock):
    """The RefineNet block of NCSN."""

    rcu_block = CondRCUBlock
    crp_block = CondCRPBlock
    msf_block = CondMSFBlock
