"""The layers of Flow++. Each function takes the module whose parameters it makes as `scope`; see flowpp.py."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.resample import FeatureMap, Projected, SameSize

SMALL_OUTPUT = 0.1
"""Initial standard deviation of the outputs of residual branches and couplings; they begin near the identity."""


def concat_elu(x: Array) -> Array:
    """elu of x and of -x, side by side in the channels."""
    return nn.elu(jnp.concatenate([x, -x], axis=-1))


def conv3x3(
    x: FeatureMap, kernel: Float[Array, "3 3 channels features"], kernel_axes: str = "HWIO"
) -> Float[Array, "batch height width features"]:
    """A 3x3 convolution with zero padding."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", kernel_axes, "NHWC"))


swapped_conv3x3 = functools.partial(conv3x3, kernel_axes="WHIO")


def normal_init(std: float) -> nn.initializers.Initializer:
    """Initializer for normal values with mean 0 and this standard deviation."""

    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        # Flat arrays of few sizes: XLA takes far longer to compile random numbers of other shapes.
        size = math.prod(shape)
        return std * jax.random.normal(key, (1 << (size - 1).bit_length(),), dtype)[:size].reshape(shape)

    return init


def linear(
    scope: nn.Module,
    name: str,
    x: FeatureMap,
    features: int,
    *,
    apply: Callable[[Array, Array], Array],
    size: tuple[int, ...] = (),
    init_scale: float = 1.0,
) -> Projected:
    """A linear map of the channels, with parameters NAME_W and NAME_b."""
    shape = (*size, x.shape[-1], features)

    def first_weight(key: Array) -> Array:
        weight = normal_init(0.05)(key, shape, x.dtype)
        return weight * with_leading_axes(init_scale * _inverse_std(apply(x, weight)), weight)

    h = apply(x, scope.param(f"{name}_W", first_weight))
    return _add_bias(scope, name, h)


def nin(scope: nn.Module, name: str, x: FeatureMap, features: int, init_scale: float = 1.0) -> Projected:
    """The same linear map at every pixel."""
    return linear(scope, name, x, features, apply=jnp.matmul, init_scale=init_scale)


def conv(scope: nn.Module, name: str, x: FeatureMap, features: int, init_scale: float = 1.0) -> Projected:
    """A plain 3x3 convolution, with parameters NAME_W and NAME_b."""
    return linear(scope, name, x, features, apply=swapped_conv3x3, size=(3, 3), init_scale=init_scale)


def normed_conv(scope: nn.Module, name: str, x: FeatureMap, features: int, init_scale: float = 1.0) -> Projected:
    """A convolution with weight normalisation: g V / |V|, parameters NAME_V, NAME_g and NAME_b."""
    direction = scope.param(f"{name}_V", normal_init(0.05), (3, 3, x.shape[-1], features), x.dtype)
    h = conv3x3(x, direction * jax.lax.rsqrt(jnp.sum(jnp.square(direction), axis=(0, 1, 2), keepdims=True)))
    h = h * with_leading_axes(scope.param(f"{name}_g", lambda key: init_scale * _inverse_std(h)), h)
    return _add_bias(scope, name, h)


Conv: TypeAlias = Callable[..., SameSize]
"""`conv` or `normed_conv`."""


def _add_bias(scope: nn.Module, name: str, h: FeatureMap) -> FeatureMap:
    return h + with_leading_axes(scope.param(f"{name}_b", lambda key: -jnp.mean(h, axis=(0, 1, 2))), h)


def _inverse_std(h: FeatureMap) -> Float[Array, " channels"]:
    return jax.lax.rsqrt(jnp.var(h, axis=(0, 1, 2)) + 1e-10)


def with_leading_axes(values: Array, like: Array) -> Array:
    """Adds leading axes of size 1, so that the values broadcast with `like`."""
    return values.reshape((1,) * (like.ndim - values.ndim) + values.shape)


def layer_norm(scope: nn.Module, name: str, x: FeatureMap) -> FeatureMap:
    """Normalisation over the channels of each pixel, with parameters NAME_g and NAME_b."""
    shape = (1, 1, 1, x.shape[-1])
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    h = centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + 1e-5)
    g = scope.param(f"{name}_g", nn.initializers.ones, shape, x.dtype)
    return h * g + scope.param(f"{name}_b", nn.initializers.zeros, shape, x.dtype)


def gated(h: FeatureMap) -> Float[Array, "batch height width channels//2"]:
    """The first half of the channels, each times the sigmoid of one of the other half."""
    values, gates = jnp.split(h, 2, axis=-1)
    return values * jax.nn.sigmoid(gates)


def gated_conv(
    scope: nn.Module,
    name: str,
    x: FeatureMap,
    context: SameSize | None,
    first: Conv,
    second: Conv,
    dropout: nn.Dropout,
) -> FeatureMap:
    """Two maps with a gate, the context added between them."""
    channels = x.shape[-1]
    h = first(scope, f"{name}c1", concat_elu(x), channels)
    if context is not None:
        h += nin(scope, f"{name}a_proj", concat_elu(context), channels)
    h = dropout(concat_elu(h))
    return gated(second(scope, f"{name}c2", h, 2 * channels, init_scale=SMALL_OUTPUT))


def gated_attention(
    scope: nn.Module, name: str, x: FeatureMap, positions: Array, heads: int, dropout: nn.Dropout
) -> FeatureMap:
    """Self-attention between all pixels, with a gate."""
    channels = x.shape[-1]
    h = nin(scope, f"{name}proj1", x + with_leading_axes(positions, x), 3 * channels)
    query, key, value = jnp.moveaxis(h.reshape(len(x), -1, 3, heads, channels // heads), 2, 0)
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(channels // heads)
    h = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), value)
    return gated(nin(scope, f"{name}proj2", dropout(h.reshape(x.shape)), 2 * channels, init_scale=SMALL_OUTPUT))


def position_embedding(scope: nn.Module, name: str, x: FeatureMap, channels: int) -> Array:
    """A learned embedding of the pixel positions, [height, width, channels]."""
    return scope.param(name, normal_init(0.01), (*x.shape[1:3], channels), x.dtype)
