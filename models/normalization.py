"""The normalisations of NCSN and NCSNv2 ([SE19] App. A, [SE20]), and a table of all normalisations by name.

Classes and parameters keep the published names. Means and variances are over the pixels of one channel of one example.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from arrays import PerExample
from models.layers import GroupNorm, Normalization
from models.resample import FeatureMap

EPSILON = 1e-5
"""Added to each variance before its square root."""


def _near_one(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Draws initial factors: normal with mean 1 and standard deviation 0.02."""
    return 1 + 0.02 * jax.random.normal(key, shape, dtype)


def _standardize(x: Array, axis: int | tuple[int, ...]) -> Array:
    return (x - x.mean(axis, keepdims=True)) * jax.lax.rsqrt(x.var(axis, keepdims=True) + EPSILON)


def _standard_means(x: FeatureMap) -> Float[Array, "batch 1 1 channels"]:
    """Returns the means of the channels, standardised over the channels of each example."""
    return _standardize(x.mean((1, 2), keepdims=True), axis=-1)


class VarianceNorm2d(nn.Module):
    """Divides each channel by its standard deviation, without subtracting its mean."""

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        scale = self.param("scale", _near_one, (1, 1, 1, x.shape[-1]))
        return x * jax.lax.rsqrt(x.var((1, 2), keepdims=True) + EPSILON) * scale


class InstanceNorm2d(nn.Module):
    """Standardises each channel, which loses its mean (Ulyanov et al., 2016)."""

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        shape = (1, 1, 1, x.shape[-1])
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        return _standardize(x, axis=(1, 2)) * scale + bias


class InstanceNorm2dPlus(nn.Module):
    """InstanceNorm++: instance normalisation that adds back the standardised means of the channels ([SE19] App. A)."""

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        shape = (1, 1, 1, x.shape[-1])
        alpha = self.param("alpha", _near_one, shape)
        gamma = self.param("gamma", _near_one, shape)
        beta = self.param("beta", nn.initializers.zeros, shape)
        return gamma * (_standardize(x, axis=(1, 2)) + alpha * _standard_means(x)) + beta


class ConditionalInstanceNorm2dPlus(nn.Module):
    """InstanceNorm++ with separate factors for each of `levels` noise levels. `labels` are level numbers."""

    levels: int

    @nn.compact
    def __call__(self, x: FeatureMap, labels: PerExample) -> FeatureMap:
        factors = nn.Embed(self.levels, 3 * x.shape[-1], embedding_init=_factors)(labels.astype(jnp.int32))
        gamma, alpha, beta = jnp.split(factors[:, None, None, :], 3, axis=-1)
        return gamma * (_standardize(x, axis=(1, 2)) + alpha * _standard_means(x)) + beta


def _factors(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Float[Array, "levels _"]:
    """Draws initial gamma and alpha near 1, and beta 0, side by side for each noise level."""
    levels, size = shape
    factors = _near_one(key, (levels, size // 3 * 2), dtype)
    return jnp.concatenate([factors, jnp.zeros((levels, size // 3), dtype)], axis=-1)


PUBLISHED_GROUPS = 32
"""The number of groups of the published DDPM, whatever its width."""

NORMALIZATIONS: dict[str, Normalization] = {
    "GroupNorm": functools.partial(GroupNorm, groups=PUBLISHED_GROUPS),
    "InstanceNorm": InstanceNorm2d,
    "InstanceNorm++": InstanceNorm2dPlus,
    "VarianceNorm": VarianceNorm2d,
}
"""The normalisations of DDPM and NCSNv2, by config.model.normalization."""


def check_normalization(name: str, nf: int) -> None:
    """Raises ValueError if the name is unknown, or cannot divide multiples of `nf` channels into groups."""
    if name not in NORMALIZATIONS:
        raise ValueError(f"normalization is {name!r}; known: {', '.join(NORMALIZATIONS)}")
    if name == "GroupNorm" and nf % PUBLISHED_GROUPS:
        raise ValueError(f"nf is {nf!r}; with GroupNorm it must be a multiple of {PUBLISHED_GROUPS}")
